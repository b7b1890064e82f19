"""Models of the published size with random weights: adapters by closed form; SD 1.5 steps, draws and exports for real.

The latter takes 8 GB and some minutes: ``pytest -m slow tests/test_full_size.py``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from adapter_loss import adapter_loss
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_dae.adapter.atomic import save_tensors
from lora_dae.adapter.files import load_adapter, merge_in_place, save_adapter
from lora_dae.adapter.fused import merged_once
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.adapter.kohya import from_kohya, known_names, kohya_metadata, to_kohya
from lora_dae.adapter.peft_layout import from_peft
from lora_dae.adapter.table import adapter_rows
from lora_dae.adapter.text import inject_text
from lora_dae.backbone.layout import CONFIGS
from lora_dae.config import UNET_GROUPS, AdapterConfig, ObjectiveConfig
from lora_dae.sampling.loop import Conditions, Guidance, sample_latents
from lora_dae.training.objective import draw, seeded

# By the names in published checkpoints, apart from how the groups are found in the model.
NAMES = {
    "cross_attention": r"attn2\.to_(q|k|v|out\.0)$",
    "self_attention": r"attn1\.to_(q|k|v|out\.0)$",
    "feed_forward": r"ff\.net\.(0\.proj|2)$",
    "conv": r"resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)$|(down|up)samplers\.0\.conv$",
    "conv_in": r"^conv_in$",
    "conv_out": r"^conv_out$",
}


def config_of(family: str) -> dict[str, object]:
    return UNet2DConditionModel.load_config(CONFIGS / family / "unet")


@pytest.mark.parametrize(("rank", "conv_rank"), [(4, 4), (16, 3)])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_adapter_parameters_per_group(family: str, rank: int, conv_rank: int) -> None:
    """r (in k^2 + out) of every layer, conv_rank for kernels above 1x1; on the meta device."""
    with init_empty_weights(include_buffers=True):
        unet = UNet2DConditionModel.from_config(config_of(family))
    shapes = {name.removesuffix(".weight"): p.shape for name, p in unet.named_parameters() if name.endswith(".weight")}
    with torch.device("meta"):
        inject(unet, AdapterConfig(list(UNET_GROUPS), rank=rank, conv_rank=conv_rank))
    rows = {row.name: row for row in adapter_rows(unet, {})}
    for group, pattern in NAMES.items():
        layers = [shape for name, shape in shapes.items() if re.search(pattern, name)]
        expected = 0
        for shape in layers:
            r = conv_rank if len(shape) == 4 and shape[-1] > 1 else rank
            expected += r * (shape[1:].numel() + shape[0])
        assert (rows[group].parameters, rows[group].modules) == (expected, len(layers)), group


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_adapter_parameters_of_the_text_encoders(family: str, rank: int) -> None:
    """r (in + out) of four projections and two of the MLP; SDXL does not read its first encoder's last layer."""
    layers = {"sd1": [(12, 768)], "sd2": [(23, 1024)], "sdxl": [(11, 768), (32, 1280)]}[family]  # inner width: 4 x
    encoders = {}
    for component in ("text_encoder", "text_encoder_2")[: len(layers)]:
        settings = CLIPTextConfig.from_dict(json.loads((CONFIGS / family / component / "config.json").read_text()))
        with torch.device("meta"):
            encoders[component] = (CLIPTextModelWithProjection if component[-1] == "2" else CLIPTextModel)(settings)
    with torch.device("meta"):
        inject_text(encoders, AdapterConfig(["cross_attention", "text_encoder"], rank=rank))
    for encoder, (count, width) in zip(encoders.values(), layers, strict=True):
        trains = sum(p.numel() for p in trainable_parameters(encoder).values())
        assert trains == count * rank * (4 * 2 * width + 2 * (width + 4 * width))


def free_memory() -> float:
    """Bytes; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return float("inf")


@pytest.fixture
def all_cores() -> Iterator[None]:
    """conftest.py leaves one, for the tiny models of all other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    """As a run with backbone.weights=bf16 predicts."""
    generator = torch.Generator().manual_seed(7)
    sample, text = torch.randn(1, 4, 32, 32, generator=generator), torch.randn(1, 77, 768, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return unet(sample, 500, text).sample.float()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm())


@pytest.mark.slow
@pytest.mark.usefixtures("all_cores")
def test_sd15_trains_draws_and_exports_on_cpu(tmp_path: Path) -> None:
    """860 million random weights in bfloat16 at 256 pixels: a step, a drawing, and every file gives the same model."""
    if free_memory() < 8e9:
        pytest.skip(f"needs 8 GB of free memory, {free_memory() / 1e9:.1f} are there")
    torch.manual_seed(0)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config_of("sd1")).to(torch.bfloat16)
    unet.to_empty(device="cpu").requires_grad_(False).eval()
    noise = torch.randn(2**20, dtype=torch.float32).to(torch.bfloat16)  # repeated: 860 million draws take half a minute
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1)
        else:
            start = torch.randint(0, 1000, ()).item()
            repeats = (parameter.numel() + 1000) // len(noise) + 1
            values = noise.repeat(repeats)[start : start + parameter.numel()]
            parameter.copy_(values.view_as(parameter) * parameter[0].numel() ** -0.5)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    base = predict(unet)
    inject(unet, AdapterConfig(rank=16, alpha=8, conv_rank=8))

    optimizer = torch.optim.AdamW(trainable_parameters(unet).values(), lr=1e-2)
    batch = {"latent_mean": torch.randn(1, 4, 32, 32), "latent_std": torch.zeros(1, 4, 32, 32),
             "text": torch.randn(1, 77, 768)}  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    draws = draw(batch, 1000, ObjectiveConfig(), [seeded(0, 0)])
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapter_loss(unet.train(), scheduler, batch, torch.zeros(77, 768), draws, 5.0).mean()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable_parameters(unet).values())
    optimizer.step()
    optimizer.zero_grad()
    del optimizer
    unet.eval().requires_grad_(False)
    expected = predict(unet)
    effect = distance(expected, base)
    assert torch.isfinite(loss) and effect > 0.1 * float(base.norm())

    conditions = Conditions(batch["text"], torch.zeros(77, 768))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), merged_once(unet):
        latents = sample_latents(unet, scheduler, torch.randn(1, 4, 32, 32), conditions, Guidance(2.0), 2)
    assert latents.shape == (1, 4, 32, 32) and bool(latents.isfinite().all())

    file = save_adapter(unet, tmp_path)
    unet.unload_lora()
    assert torch.equal(predict(unet), base)  # the frozen weights are as they were
    load_adapter(unet, file)
    assert torch.equal(predict(unet), expected)
    merge_in_place(unet)
    assert distance(predict(unet), expected) < 0.1 * effect  # rounded to bfloat16 once more
    # The kohya file holds the same numbers by other names (test_round_trips.py: and draws the same).
    with safe_open(file, framework="pt") as opened:
        layers = from_peft(load_file(file), opened.metadata(), str(file))
    header = kohya_metadata(layers, "sd1", title="full size", resolution=256)
    kohya = load_file(save_tensors(to_kohya(layers, "sd1", unet.config), tmp_path / "kohya.safetensors", header))
    back = from_kohya(kohya, known_names({"unet": unet}, "sd1"), "kohya.safetensors")
    assert back.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(back[name].down, layer.down) and torch.equal(back[name].up, layer.up), name
        assert back[name].scale == layer.scale
