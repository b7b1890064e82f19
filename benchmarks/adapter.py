"""``python -m benchmarks.adapter``: what a run costs on a pipeline of diffusers, against diffusers alone.

Medians of ratios within one process, each against plain diffusers right before and after it. Models: the shipped studio
backbone, and SD 1.5 of random weights at latents of 32 x 32 and 64 x 64 (``--models``; 5 GB of memory and minutes on a
CPU).

    attach       attach() (LoRA, source input, enhancement) / load_lora_weights() of the same file
    diffusers    a sampling step with load_lora_weights() / without LoRA; fused: after fuse_lora()
    unmerged     the same by attach(), strength 0; + enhancement at strength 1
    merged       by attach(merged=True), after the call has merged
    merging      what a call needs for that, in plain steps
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from rich.console import Console

import lora_dae
from benchmarks.timing import show
from lora_dae.adapter.files import save_adapter
from lora_dae.adapter.fused import merged_once
from lora_dae.adapter.inject import inject
from lora_dae.backbone.allocator import keep_freed_memory
from lora_dae.backbone.layout import CONFIGS, STUDIO
from lora_dae.config import AdapterConfig
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.module import EnhancementModule

console = Console()
MODELS = {"studio": 32, "sd15-32": 32, "sd15-64": 64}
Variant = tuple[Callable[[], None], dict[str, Any], Callable[[], None]]  # prepare, arguments of the call, undo


def build_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Without VAE and text encoder of its own for SD 1.5: latents and embeddings are given."""
    torch.manual_seed(0)
    if model == "studio":
        pipe = StableDiffusionPipeline.from_pretrained(STUDIO, torch_dtype=dtype)
    else:
        with torch.device(device):
            config = UNet2DConditionModel.load_config(CONFIGS / "sd1" / "unet")
            unet = UNet2DConditionModel.from_config(config).to(dtype)
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=4), text_encoder=None, tokenizer=None,
            unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe.to(device)


def write_run(unet: UNet2DConditionModel, folder: Path) -> None:
    """Adapter files of rank 16 as the default run has them, of random weights; the UNet stays as it was."""
    inject(unet, AdapterConfig())
    for name, parameter in unet.named_parameters():
        if ".lora_B." in name:
            # As small as a trained one's: activations driven far from zero make denormal numbers, slow in any kernel.
            torch.nn.init.normal_(parameter, std=0.001)
    save_adapter(unet, folder)
    unet.unload_lora()
    unet.requires_grad_(False).eval()
    module = EnhancementModule()
    torch.nn.init.normal_(module.gain.output.weight, std=0.1)
    save_enhancement(module, folder / "enhancement.safetensors")


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(model: str, steps: int, repeats: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    pipe = build_pipeline(model, device, dtype)
    side, channels = MODELS[model], pipe.unet.config.in_channels
    text = torch.randn(2, 77 if model != "studio" else 32, pipe.unet.config.cross_attention_dim, device=device)
    arguments = {
        "prompt_embeds": text[:1].to(dtype), "negative_prompt_embeds": text[1:].to(dtype),
        "latents": torch.randn(1, channels, side, side, device=device, dtype=dtype), "guidance_scale": 3.0,
        "num_inference_steps": steps, "output_type": "latent",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_run(pipe.unet, folder)

        def attached(merged: bool) -> Callable[[], None]:
            return lambda: lora_dae.attach(pipe, folder, merged=merged)

        def plain_lora() -> None:
            pipe.load_lora_weights(folder)

        def fused_lora() -> None:
            pipe.load_lora_weights(folder)
            pipe.fuse_lora()

        def unfuse() -> None:
            pipe.unfuse_lora()
            pipe.unload_lora_weights()

        def detach() -> None:
            lora_dae.detach(pipe)

        off, on = {"enhancement_strength": 0.0}, {"enhancement_strength": 1.0}
        variants: dict[str, Variant] = {
            "plain again": (lambda: None, {}, lambda: None),  # how far to trust the others
            "diffusers": (plain_lora, {}, pipe.unload_lora_weights),
            "diffusers fused": (fused_lora, {}, unfuse),
            "unmerged": (attached(False), off, detach),
            "unmerged + enhancement": (attached(False), on, detach),
            "merged": (attached(True), off, detach),
            "merged + enhancement": (attached(True), on, detach),
        }

        def step(**more: Any) -> float:
            return seconds_of(lambda: pipe(**arguments, **more), device) / steps

        found: dict[str, list[float]] = {name: [] for name in ["plain", *variants, "load", "attach", "merging"]}
        step()
        for _ in range(repeats):
            before = step()
            for name, (prepare, more, undo) in variants.items():
                loading, merges = seconds_of(prepare, device), name.startswith("merged")
                with merged_once(pipe.unet) if merges else nullcontext():
                    one = {**arguments, "num_inference_steps": 1, **more}
                    first = seconds_of(lambda one=one: pipe(**one), device)  # type: ignore[misc]  # merges, warms up
                    taken = step(**more)
                undo()
                after = step()
                plain, before = (before + after) / 2, after
                found["plain"].append(plain)
                found[name].append(taken / plain)
                if name in ("diffusers", "unmerged"):
                    found["load" if name == "diffusers" else "attach"].append(loading)
                if name == "merged":
                    found["merging"].append((first - taken) / plain)
    median = {name: statistics.median(values) for name, values in found.items()}
    return {
        f"{model}: plain step, seconds": median["plain"],
        **{f"{model}: {name} / plain": median[name] for name in variants},
        f"{model}: merging, in plain steps": median["merging"],
        f"{model}: attach / load_lora_weights": median["attach"] / median["load"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["studio"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks_adapter.json"))
    args = parser.parse_args()
    keep_freed_memory()  # as the commands do
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    logging.set_verbosity_error()  # that an adapter has nothing for the text encoder
    results: dict[str, float] = {}
    for model in args.models:
        results |= measure(model, args.steps, args.repeats, device, dtype)
    show(results, args.output)


if __name__ == "__main__":
    main()
