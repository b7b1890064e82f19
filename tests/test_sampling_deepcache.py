"""DeepCache: which layers run when, what a shallow call computes, and what it is counted as."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lora_dae.adapter.inject import inject
from lora_dae.backbone.layout import CONFIGS, STUDIO
from lora_dae.config import AdapterConfig, Config
from lora_dae.enhancement.hook import enhance_scheduler
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.sampling.loop import Conditions, Guidance, initial_noise, sample_latents
from lora_dae.sampling.methods import build_method
from lora_dae.sampling.methods.deepcache import SHALLOW
from lora_dae.sweep.table import network_calls


@pytest.fixture(scope="module")
def unet(tiny_backbone: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_backbone / "unet").eval()


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 8, 16, 16, generator=chance), torch.randn(2, 16, 32, generator=chance)
    return x, torch.tensor(500 - 100 * seed), text


@torch.no_grad()
def test_a_shallow_call_is_the_last_layer_on_the_features_of_the_whole_one(unet: UNet2DConditionModel) -> None:
    """Written out by hand; and on the whole call's own inputs it is that call's output."""
    last, seen = unet.up_blocks[-1], []
    note = last.attentions[-2].register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    first, second = inputs(0), inputs(1)
    with build_method("deepcache", {"interval": 3}).around(unet):
        whole, again, other = (unet(*given).sample for given in (first, first, second))
    note.remove()
    (deep,) = seen
    x, t, text = second
    embedding = unet.time_embedding(unet.get_time_embed(x, t))
    hidden = last.resnets[-1](torch.cat([deep, unet.conv_in(x)], dim=1), embedding)
    hidden = last.attentions[-1](hidden, encoder_hidden_states=text, return_dict=False)[0]
    expected = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
    torch.testing.assert_close(other, expected)
    torch.testing.assert_close(again, whole)
    assert torch.equal(whole, unet(*first).sample) and not torch.allclose(other, unet(*second).sample, atol=1e-3)


@pytest.mark.parametrize(("interval", "deep_calls"), [(1, 6), (2, 3), (3, 2), (4, 2)])
def test_deep_layers_run_in_one_call_of_interval_also_with_the_enhancement(
    interval: int, deep_calls: int, unet: UNet2DConditionModel
) -> None:
    calls = {"deep": 0, "outermost": 0}

    def count(name: str) -> object:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    layers = {"deep": unet.mid_block.resnets[0], "outermost": unet.up_blocks[-1].resnets[-1]}
    hooks = [layer.register_forward_pre_hook(count(name)) for name, layer in layers.items()]
    torch.manual_seed(0)
    module = EnhancementModule(source_channels=8).requires_grad_(False).eval()
    torch.nn.init.normal_(module.gain.output.weight)
    text = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    conditions, noise = Conditions(text[:2], text[2]), initial_noise(0, [0, 1], (8, 16, 16))
    found = []
    for strength in (0.0, 1.0):
        base = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        chain = enhance_scheduler(base, module, strength)
        method = build_method("deepcache", {"interval": interval})
        found.append(sample_latents(unet, chain, noise, conditions, Guidance(3.0), 6, method))
    for hook in hooks:
        hook.remove()
    assert calls == {"deep": 2 * deep_calls, "outermost": 12}
    assert torch.isfinite(found[1]).all() and not torch.allclose(*found)
    if interval == 1:
        base = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        chain = enhance_scheduler(base, module)
        assert torch.equal(found[1], sample_latents(unet, chain, noise, conditions, Guidance(3.0), 6))


@torch.no_grad()
def test_an_adapter_on_the_first_convolution_is_no_obstacle(unet: UNet2DConditionModel) -> None:
    adapted = copy.deepcopy(unet)
    inject(adapted, AdapterConfig(rank=2, targets=["conv_in", "conv"]))  # B is zero: the same network
    found = []
    for network in (unet, adapted):
        with build_method("deepcache", {"interval": 2}).around(network):
            found.append([network(*inputs(k)).sample for k in range(2)])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(("family", "size"), [("studio", 32), ("sd1", 64), ("sd2", 96), ("sdxl", 128)])
def test_a_shallow_call_costs_no_more_than_it_is_counted_as(family: str, size: int) -> None:
    """Multiply-adds by torch's own counter, at the family's own size; nothing is computed."""
    folder = STUDIO if family == "studio" else CONFIGS / family
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).eval()
        x, text = (
            torch.empty(1, unet.config.in_channels, size, size),
            torch.empty(1, 77, unet.config.cross_attention_dim),
        )
        sizes = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if family == "sdxl" else None
        counted = []
        with torch.no_grad(), build_method("deepcache", {"interval": 2}).around(unet):
            for _ in range(2):
                with FlopCounterMode(display=False) as counter:
                    unet(x, torch.zeros(1), text, added_cond_kwargs=sizes)
                counted.append(counter.get_total_flops())
    assert 0 < counted[1] <= SHALLOW * counted[0]


def test_network_calls_count_the_shallow_ones_too() -> None:
    cfg = Config(run_dir="x")  # 12 steps, 2 branches
    cfg.sampling = replace(cfg.sampling, method="deepcache", method_options={"interval": 5})
    assert network_calls(cfg) == pytest.approx(2 * (3 + 9 * SHALLOW))
    cfg.sampling.method_options = {"interval": 1}
    assert network_calls(cfg) == 24
