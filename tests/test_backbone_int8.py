"""Weights in int8: as close as rounding allows, exact in every gradient around them, and no copy kept beside them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import FAMILIES, predict, randomize, tiny_unet
from compose import config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from test_adapter_files import CASES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_dae.adapter.files import load_adapter, merge_in_place, save_adapter
from lora_dae.adapter.fused import merged_once
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.backbone.int8 import is_int8, quantized, to_int8
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig, ConfigError
from lora_dae.rules import check
from lora_dae.training.memory import PeakMemory, materialize


def rounded(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain float32 UNet with the weights that an int8 one stands for."""
    plain, held = copy.deepcopy(unet), copy.deepcopy(unet)
    to_int8(held)
    with torch.no_grad():
        for name, module in held.named_modules():
            if is_int8(module):
                plain.get_submodule(name).weight.copy_(module.weight)  # type: ignore[operator, arg-type]
    return plain


@pytest.mark.parametrize("shape", [(8, 16), (8, 4, 3, 3)])
def test_error_is_at_most_half_a_step_of_each_row(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-4, 4).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    weight[0] = 0  # no scale to divide by
    values, scale = quantized(weight)
    assert values.dtype == torch.int8 and int(values.abs().max()) == 127
    assert bool(((values * scale - weight).abs() <= scale / 2 * (1 + 1e-5)).all())
    largest = weight.flatten(1).abs().argmax(dim=1)
    rows = torch.arange(1, len(weight))
    exact = (values * scale).flatten(1)[rows, largest[1:]]
    torch.testing.assert_close(exact, weight.flatten(1)[rows, largest[1:]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_of_the_blocks_are_held_and_nothing_else(family: str) -> None:
    unet = tiny_unet(family).requires_grad_(False)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert to_int8(unet) == sum(is_int8(layer) for layer in layers.values())
    assert {n.split(".")[0] for n, m in layers.items() if not is_int8(m)} <= {
        "conv_in", "conv_out", "time_embedding", "add_embedding",
    }  # fmt: skip
    assert not any(p.requires_grad for layer in layers.values() if is_int8(layer) for p in layer.parameters(False))
    assert unet.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_layer_is_the_plain_one_of_its_weight(kind: str, autocast: bool) -> None:
    """Output and the gradient of its input, also in the type that autocast asks for: exactly."""
    torch.manual_seed(0)
    layer: Any = nn.Linear(12, 7) if kind == "linear" else nn.Conv2d(6, 5, 3, stride=2, padding=1)
    shape = (3, 4, 12) if kind == "linear" else (2, 6, 9, 9)
    held = nn.ModuleDict({"mid_block": nn.Sequential(copy.deepcopy(layer.requires_grad_(False)))})
    assert to_int8(held) == 1
    held_layer: Any = held["mid_block"][0]
    layer.weight.copy_(held_layer.weight)
    results: list[tuple[Tensor, Tensor]] = []
    for module in (layer, held_layer):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = module(x)
        output.float().square().sum().backward()
        assert x.grad is not None
        results.append((output, x.grad))
    (plain, plain_grad), (ours, ours_grad) = results
    assert ours.dtype == plain.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(ours, plain)
    torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-6, atol=1e-6)


def gradients(unet: UNet2DConditionModel, family: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    text = torch.randn(2, 3, 16, generator=generator)
    added = {"text_embeds": text[:, 0], "time_ids": torch.ones(2, 6)} if family == "sdxl" else None
    output = unet(torch.randn(2, 4, 8, 8, generator=generator), 500, text, added_cond_kwargs=added).sample
    output.square().mean().backward()
    return {name: p.grad for name, p in trainable_parameters(unet).items() if p.grad is not None}


@pytest.mark.parametrize("kernel", ["fused", "peft"])
@pytest.mark.parametrize(
    ("case", "family"),
    [("attention_conv", "sd15"), ("everything", "sd21"), ("attention_conv", "sdxl"), ("dora", "sd15")],
)
def test_gradients_are_those_of_the_weights_that_int8_stands_for(case: str, family: str, kernel: str) -> None:
    """Every LoRA weight's gradient, and what is predicted; largest difference 1e-5 of the largest."""
    found = []
    for int8 in (False, True):
        unet = tiny_unet(family)
        if int8:
            to_int8(unet)
        else:
            unet = rounded(unet)
        inject(unet, replace(CASES[case], kernel=kernel))
        randomize(unet)
        found.append((gradients(unet, family), predict(unet.eval(), family=family)))
    (plain, expected), (ours, output) = found
    assert plain.keys() == ours.keys() and len(plain) == len(trainable_parameters(unet))
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_file_of_an_int8_training_fits_the_plain_backbone(tmp_path: Path) -> None:
    """The adapter is the same file: on the weights that int8 stands for it predicts the same."""
    unet = tiny_unet()
    to_int8(unet)
    inject(unet, CASES["attention_conv"])
    randomize(unet)
    fresh = rounded(tiny_unet())
    load_adapter(fresh, save_adapter(unet.eval(), tmp_path))
    expected = predict(unet)
    torch.testing.assert_close(predict(fresh.eval()), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    again = tiny_unet()
    to_int8(again)
    load_adapter(again, tmp_path)
    with merged_once(again):
        assert torch.equal(predict(again.eval()), predict(unet))


def peak(dtype: torch.dtype, int8: bool) -> tuple[int, int]:
    """(bytes at the peak of a step, frozen parameters in the blocks), on fake tensors."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **{**FAMILIES["sd15"], "block_out_channels": (64, 256), "norm_num_groups": 32, "attention_head_dim": 8}
        ).requires_grad_(False)
        count = sum(p.numel() for p in unet.parameters())
        if int8:
            to_int8(unet)
        inject(unet, AdapterConfig(["cross_attention", "conv"], rank=2))
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        materialize(unet, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(torch.zeros(8, 4, 16, 16), torch.zeros(8), torch.zeros(8, 3, 16)).sample
        output.float().square().mean().backward()
    return memory.peak, count


def test_a_step_holds_half_the_weights_of_bfloat16_and_no_merged_copy() -> None:
    """Where weights are what memory goes for: a byte saved a parameter, and more as no merged weight is kept."""
    (whole, count), (held, _) = peak(torch.bfloat16, False), peak(torch.bfloat16, True)
    assert count > 5e6 and whole - held > 1.5 * count


def test_loads_and_refuses_what_cannot_be(tiny_backbone: Path, tmp_path: Path) -> None:
    unet = load_backbone(BackboneConfig(name="folder", path=str(tiny_backbone), weights="int8")).unet
    assert any(is_int8(module) for module in unet.modules()) and unet.conv_in.weight.dtype == torch.bfloat16
    inject(unet, AdapterConfig(["cross_attention"], rank=2))
    with pytest.raises(ValueError, match="int8: load it with weights=fp32"):
        merge_in_place(unet)
    with pytest.raises(ConfigError, match="full_finetune=true trains weights that"):
        check(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "backbone.weights=int8", "adapter=full"))
