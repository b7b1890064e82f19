"""Models of the published size with random weights: adapters by closed form; SD 1.5 steps, draws and exports for real.

The latter takes 10 GB and a minute or two: ``pytest -m slow tests/test_full_size.py``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from lora_dae.adapter.atomic import save_tensors
from lora_dae.adapter.files import load_adapter, merge_in_place, save_adapter
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.adapter.kohya import kohya_metadata, to_kohya
from lora_dae.adapter.peft_layout import from_peft
from lora_dae.adapter.table import adapter_rows
from lora_dae.backbone.layout import CONFIGS
from lora_dae.config import UNET_GROUPS, AdapterConfig, ObjectiveConfig
from lora_dae.sampling.loop import Conditions, Guidance, sample_latents
from lora_dae.training.objective import adapter_loss, draw, seeded

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


def free_memory() -> float:
    """Bytes; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return float("inf")


def predict(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        return unet(
            torch.randn(1, 4, 32, 32, generator=generator), 500, torch.randn(1, 77, 768, generator=generator)
        ).sample


@pytest.mark.slow
def test_sd15_trains_draws_and_exports_on_cpu(tmp_path: Path) -> None:
    """860 million random weights at 256 pixels, in one copy: a step, a drawing, and every file gives the same model."""
    if free_memory() < 10e9:
        pytest.skip(f"needs 10 GB of free memory, {free_memory() / 1e9:.1f} are there")
    torch.manual_seed(0)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config_of("sd1"))
    unet.to_empty(device="cpu").requires_grad_(False).eval()
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
        elif "norm" in name:
            parameter.data.fill_(1)
        else:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    base = predict(unet)
    inject(unet, AdapterConfig(rank=16, alpha=8, conv_rank=8))
    torch.testing.assert_close(predict(unet.eval()), base, rtol=0, atol=1e-3)

    optimizer = torch.optim.AdamW(trainable_parameters(unet).values(), lr=1e-2)
    batch = {"latent_mean": torch.randn(1, 4, 32, 32), "latent_std": torch.zeros(1, 4, 32, 32),
             "text": torch.randn(1, 77, 768)}  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    draws = draw(batch, 1000, ObjectiveConfig(), [seeded(0, k) for k in range(len(batch["latent_mean"]))])
    loss = adapter_loss(unet.train(), scheduler, batch, torch.zeros(77, 768), draws, 5.0).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    unet.eval().requires_grad_(False)
    expected = predict(unet)
    assert torch.isfinite(loss) and float((expected - base).abs().max()) > 1e-2

    conditions = Conditions(batch["text"], torch.zeros(77, 768))
    latents = sample_latents(unet, scheduler, torch.randn(1, 4, 32, 32), conditions, Guidance(2.0), 2)
    assert latents.shape == (1, 4, 32, 32) and bool(latents.isfinite().all())

    file = save_adapter(unet, tmp_path)
    unet.unload_lora()
    torch.testing.assert_close(predict(unet), base, rtol=0, atol=0)
    load_adapter(unet, file)
    assert torch.equal(predict(unet), expected)
    unet.unload_lora()
    with safe_open(file, framework="pt") as opened:
        layers = from_peft(load_file(file), opened.metadata(), str(file))
    header = kohya_metadata(layers, "sd1", title="full size", resolution=256)
    kohya = save_tensors(to_kohya(layers, "sd1", unet.config), tmp_path / "kohya.safetensors", header)
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(kohya), unet_config=unet.config)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet)
    scale = float(expected.abs().max())
    torch.testing.assert_close(predict(unet), expected, rtol=0, atol=1e-4 * scale)
    unet.unload_lora()
    load_adapter(unet, file)
    merge_in_place(unet)
    torch.testing.assert_close(predict(unet), expected, rtol=0, atol=1e-4 * scale)
