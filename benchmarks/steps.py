"""python -m benchmarks.steps --model studio|sd15: a training step against the floor, PEFT and diffusers' example.

The floor is the frozen network's forward and its backward to the inputs alone: no adapter can cost less. diffusers'
text-to-image LoRA example is rebuilt from its documentation: LoRA on the attention projections by PEFT, Gaussian init,
AdamW, gradient clipping, plain MSE; with VAE and text encoder in the loop as it runs by default, and without. All steps
run in one process on the same weights and tensors, in turns; memory is the peak of a process of its own for each.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.timing import console, interleaved, timings
from lora_dae.adapter.inject import inject
from lora_dae.backbone.attention import choose_attention
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig

RANK = 16
EXAMPLE = ["to_k", "to_q", "to_v", "to_out.0"]
ROWS = (
    "forward", "floor", "ours", "PEFT, same layers",
    "example bf16, cached", "example bf16", "example fp32, cached", "example fp32",
)  # fmt: skip


@dataclass
class Parts:
    """One model's networks, and a batch."""

    unet: UNet2DConditionModel
    vae: nn.Module
    text_encoder: nn.Module
    latents: Tensor  # (B, C, size, size)
    images: Tensor
    tokens: Tensor
    text: Tensor  # (B, L, D), as the cache holds it


def build(model: str, batch: int, size: int) -> Parts:
    """The shipped studio backbone, or SD 1.5's architecture with random weights."""
    torch.manual_seed(0)
    if model == "studio":
        backbone = load_backbone(BackboneConfig())
        unet, vae, text_encoder = backbone.unet, backbone.vae, backbone.text_encoder
        factor, length = backbone.vae_scale_factor, backbone.text_length
    else:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
        factor, length = 8, 77
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()
    channels, width = unet.config["in_channels"], unet.config["cross_attention_dim"]
    return Parts(
        unet, vae, text_encoder,
        torch.randn(batch, channels, size, size), torch.rand(batch, 3, factor * size, factor * size) * 2 - 1,
        torch.randint(0, 400, (batch, length)), torch.randn(batch, length, width),
    )  # fmt: skip


def sharing(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy on the same weights."""
    return copy.deepcopy(unet, {id(p): p for p in unet.parameters()})


def row(name: str, parts: Parts) -> Callable[[], None]:
    """What one step of this row does."""
    unet, t = sharing(parts.unet), torch.randint(0, 1000, (len(parts.latents),))
    if name.startswith("example"):
        return _example(parts, unet, t, "bf16" in name, "cached" in name)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = tuple(parts.latents.shape)
    choose_attention(unet, torch.bfloat16, shape, parts.text.shape[1], "auto")  # type: ignore[arg-type]
    x = parts.latents.contiguous(memory_format=torch.channels_last)
    if name == "forward":

        def forward() -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                unet(x, t, parts.text)

        return forward
    optimizer = None
    if name != "floor":
        inject(unet, AdapterConfig(rank=RANK, kernel="fused" if name == "ours" else "peft"))
        optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], fused=True)
    return partial(_step, unet, x, t, parts.text, optimizer)


def _step(
    unet: nn.Module, x: Tensor, t: Tensor, text: Tensor, optimizer: torch.optim.Optimizer | None, bf16: bool = True
) -> None:
    if optimizer is None:
        x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = unet(x, t, text, return_dict=False)[0]
        loss = functional.mse_loss(output.float(), torch.zeros_like(output, dtype=torch.float32))
    loss.backward()
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _example(parts: Parts, unet: UNet2DConditionModel, t: Tensor, bf16: bool, cached: bool) -> Callable[[], None]:
    unet.set_attn_processor(AttnProcessor2_0())
    lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=EXAMPLE)
    inject_adapter_in_model(lora, unet)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])

    def step() -> None:
        latents, text = parts.latents, parts.text
        if not cached:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                encoded = parts.vae.encode(parts.images)  # type: ignore[operator]
                latents = encoded.latents if isinstance(parts.vae, AutoencoderTiny) else encoded.latent_dist.sample()
                text = parts.text_encoder(parts.tokens)[0]
        noise = torch.randn_like(latents, dtype=torch.float32)
        _step(unet, latents.float() + noise, t, text.float(), optimizer, bf16)

    return step


def rates() -> dict[str, float]:
    """GFLOP/s of a large bf16 matrix product and a 3x3 convolution: what the device could do."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    x = torch.randn(16, 128, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    seconds = interleaved({"matmul": lambda: a @ a, "conv": lambda: functional.conv2d(x, w, padding=1)}, 9)
    flops = {"matmul": 2 * 2048**3, "conv": 2 * 16 * 32 * 32 * 128 * 128 * 9}
    return {f"{name}_gflops": flops[name] / seconds[name] / 1e9 for name in flops}


def half_range(times: list[float]) -> float:
    """Half the interquartile range; 0 for a single time."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


def memory(name: str, options: list[str]) -> float:
    """Peak resident size of a process that runs this row alone, in MB."""
    command = [sys.executable, "-m", "benchmarks.steps", "--alone", name, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--model", choices=("studio", "sd15"), default="studio")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="of the latents")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--memory", action="store_true", help="also measure each row's peak, in its own process")
    parser.add_argument("--output", type=Path, default=Path("build/steps.json"))
    parser.add_argument("--alone", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = build(args.model, args.batch, args.size)
    if args.alone:
        step = row(args.alone, parts)
        step()
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    rows = list(dict.fromkeys(["floor", *args.rows]))
    times = timings({name: row(name, parts) for name in rows}, args.repeats)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    spread = {name: half_range(t) / seconds[name] for name, t in times.items()}
    sizes = ["--model", args.model, "--batch", str(args.batch), "--size", str(args.size)]
    peaks = {name: memory(name, sizes) for name in rows} if args.memory else {}
    title = f"{args.model}, batch {args.batch}, {args.size} x {args.size} latents, {torch.get_num_threads()} threads"
    table = Table("step", "seconds", "spread", "images/s", "of the floor", "peak MB", title=title)
    results: dict[str, dict[str, float]] = {"device": rates()}
    for name in rows:
        ratio = seconds[name] / seconds["floor"]
        results[name] = {"seconds": seconds[name], "spread": spread[name], "of_floor": ratio}
        if name in peaks:
            results[name]["peak_mb"] = peaks[name]
        peak = f"{peaks[name]:.0f}" if name in peaks else ""
        rate = args.batch / seconds[name]
        table.add_row(name, f"{seconds[name]:.3f}", f"{spread[name]:.1%}", f"{rate:.1f}", f"{ratio:.3f}", peak)
    console.print(table)
    console.print({name: round(value) for name, value in results["device"].items()})
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found = {"title": title, "date": time.strftime("%Y-%m-%d"), "rows": results}
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
