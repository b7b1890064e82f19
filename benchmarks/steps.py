"""python -m benchmarks.steps --model studio|sd15: a training step against the floor, PEFT and diffusers' example.

    forward             the frozen network alone
    floor               its forward and its backward to the inputs alone, on torch's and diffusers' own kernels as they
                        are fastest (bf16, channels_last, SDPA or plain attention by shape): no adapter on them costs
                        less
    floor, our kernels  the same on the network as our training prepares it
    ours                train.py's step: its layers, gradient clipping and optimizer (not Lightning, data and logs)
    ours, ... recomputed    with backbone.gradient_checkpointing=attention, or true
    PEFT, same layers   PEFT's own layers in place of ours, on the floor's network
    PEFT as it comes    the same layers in float32, weights and attention as diffusers loads them
    example ...         diffusers' text-to-image LoRA example: attention projections alone, Gaussian init, frozen
                        weights in the precision it is told; VAE and text encoder in the loop, as it runs, or cached

All steps run in one process on the same weights and tensors, in turns; ratios are of the two times of one turn, medians
over turns, beside half their interquartile range. Memory is the peak of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from peft import LoraConfig
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.kinds import KINDS, shares
from benchmarks.memory import peak, reset
from benchmarks.models import Parts, as_trained, build, machine, training_optimizer
from benchmarks.timing import console, interleaved, timings
from lora_dae.adapter.inject import inject
from lora_dae.backbone.allocator import keep_freed_memory
from lora_dae.backbone.recompute import recompute
from lora_dae.config import AdapterConfig
from lora_dae.training.shortcuts import at_half_size, see_keys

RANK = 16
EXAMPLE = ["to_k", "to_q", "to_v", "to_out.0"]
ROWS = (
    "forward", "floor", "floor, our kernels", "ours", "ours, half size", "ours, half of the tokens",
    "ours, attention recomputed", "ours, all recomputed", "PEFT, same layers", "PEFT as it comes",
    "example bf16, cached", "example bf16", "example fp32, cached", "example fp32",
)  # fmt: skip
PROFILED = ("floor", "floor, our kernels", "ours", "PEFT, same layers")
STAGES = ("inputs", "forward", "backward", "clip + optimizer", "zero_grad")


class Step:
    """One step of a network in its STAGES; without an optimizer: to the gradient of the inputs."""

    def __init__(
        self,
        unet: nn.Module,
        inputs: Callable[[], tuple[Tensor, Tensor, Tensor]],  # latents, timesteps, text
        optimizer: torch.optim.Optimizer | None,
        bf16: bool = True,
    ) -> None:
        self.unet, self.inputs, self.optimizer, self.bf16 = unet, inputs, optimizer, bf16

    def __call__(self) -> None:
        self.timed()

    def timed(self) -> dict[str, float]:
        """Seconds of each stage."""
        marks = [time.perf_counter()]
        x, t, text = self.inputs()
        marks.append(time.perf_counter())
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            output = self.unet(x, t, text, return_dict=False)[0]
            loss = functional.mse_loss(output.float(), torch.zeros_like(output, dtype=torch.float32))
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        if self.optimizer is not None:
            torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
            self.optimizer.step()
        marks.append(time.perf_counter())
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        marks.append(time.perf_counter())
        return {name: marks[k + 1] - marks[k] for k, name in enumerate(STAGES)}


def row(name: str, parts: Parts) -> Callable[[], Any]:
    """What one step of this row does."""
    t = torch.randint(0, 1000, (len(parts.latents),))
    if name.startswith("example"):
        return _example(parts, t, "bf16" in name, "cached" in name)
    if name == "PEFT as it comes":
        unet, x = parts.as_it_comes(), parts.latents
    else:
        unet, x = parts.arranged(), parts.latents.contiguous(memory_format=torch.channels_last)
    ours = name.startswith("ours")
    lora = AdapterConfig(rank=RANK, kernel="fused" if ours else "peft")
    if ours or name == "floor, our kernels":
        as_trained(unet, lora if ours else None, parts.alone)
    if name == "ours, half size":  # of training.shortcuts, as the next one
        x = at_half_size({"latent_mean": x, "latent_std": x})["latent_mean"]
    if name == "ours, half of the tokens":
        see_keys(unet, 0.5)
    if "recomputed" in name:
        recompute(unet, True if "all" in name else "attention")
    if name == "forward":

        def forward() -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                unet(x, t, parts.text)

        return forward
    if "floor" in name:
        return Step(unet, lambda: (x.clone().requires_grad_(), t, parts.text), None)
    if ours:
        return Step(unet, lambda: (x, t, parts.text), training_optimizer(unet))
    inject(unet, lora)
    comes = name == "PEFT as it comes"
    if comes:
        unet.train()  # all of it, as everybody does
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad])
    return Step(unet, lambda: (x, t, parts.text), optimizer, not comes)


def _example(parts: Parts, t: Tensor, bf16: bool, cached: bool) -> Step:
    dtype = torch.bfloat16 if bf16 else torch.float32
    unet = parts.cast("unet", dtype)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=EXAMPLE))
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4, weight_decay=1e-2)
    unet.train()
    latents, text = parts.latents.to(dtype), parts.text.to(dtype)
    vae, text_encoder = (None, None) if cached else (parts.cast("vae", dtype), parts.cast("text_encoder", dtype))

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        found, embedded = latents, text
        if vae is not None:
            with torch.no_grad():
                encoded = vae.encode(parts.images.to(dtype))
                found = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.sample()
                embedded = text_encoder(parts.tokens)[0]
        return found + torch.randn_like(found), t, embedded

    return Step(unet, inputs, optimizer, bf16)


def rates() -> dict[str, float]:
    """GFLOP/s of a large bf16 matrix product and a 3x3 convolution: what the device could do."""
    a = torch.randn(2048, 2048, dtype=torch.bfloat16)
    x = torch.randn(16, 128, 32, 32, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    seconds = interleaved({"matmul": lambda: a @ a, "conv": lambda: functional.conv2d(x, w, padding=1)}, 9)
    flops = {"matmul": 2 * 2048**3, "conv": 2 * 16 * 32 * 32 * 128 * 128 * 9}
    return {f"{name}_gflops": flops[name] / seconds[name] / 1e9 for name in flops}


def half_range(values: list[float]) -> float:
    """Half the interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def memory(name: str, options: list[str]) -> float:
    """Peak resident size of a process that runs this row alone, in MB."""
    command = [sys.executable, "-m", "benchmarks.steps", "--alone", name, *options]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def alone(name: str, parts: Parts) -> float:
    """Peak resident MB of this process in two steps of a row; networks that it does not need are let go of (Linux)."""
    keep_freed_memory()  # as where steps are timed
    parts.alone = True
    if "example" not in name or "cached" in name:
        parts.vae = parts.text_encoder = None
    step = row(name, parts)
    reset()
    step()
    step()
    return peak() / 1e6


def measure(model: str, batch: int, size: int, rows: list[str], repeats: int, peaks: bool) -> dict[str, Any]:
    """One case: every row, the stages of our step, the kinds of work, and the ratios that the project promises."""
    options = ["--model", model, "--batch", str(batch), "--size", str(size)]
    peak_mb = {name: memory(name, options) for name in rows if peaks}  # first: later this process holds all rows
    parts = build(model, batch, size)
    steps = {name: row(name, parts) for name in rows}
    times = timings(steps, repeats)
    found: dict[str, dict[str, float]] = {}
    for name, taken in times.items():
        of_floor = [a / b for a, b in zip(taken, times["floor"], strict=True)]
        seconds = statistics.median(taken)
        found[name] = {
            "seconds": seconds, "spread": half_range(taken) / seconds, "images_per_second": batch / seconds,
            "of_floor": statistics.median(of_floor), "of_floor_spread": half_range(of_floor),
        }  # fmt: skip
        if peaks:
            found[name]["peak_mb"] = peak_mb[name]
    stages: dict[str, float] = {}
    if "ours" in steps:
        ours = steps["ours"]
        assert isinstance(ours, Step)
        split = [ours.timed() for _ in range(repeats)]
        whole = statistics.median(sum(one.values()) for one in split)
        stages = {stage: statistics.median(one[stage] for one in split) / whole for stage in STAGES}
    ratios, peer = {}, "PEFT, same layers"
    if "ours" in rows:
        for name in (n for n in rows if n != "ours"):
            ratios[f"ours / {name}"] = statistics.median(a / b for a, b in zip(times["ours"], times[name], strict=True))
    if peaks and "ours" in found and peer in found:
        ratios["peak memory: ours / PEFT, same layers"] = found["ours"]["peak_mb"] / found[peer]["peak_mb"]
    return {
        "title": f"{model}, batch {batch}, {size} x {size} latents, {torch.get_num_threads()} threads",
        "rows": found, "ratios": ratios, "stages": stages,
        "kinds": {name: shares(steps[name]) for name in rows if name in PROFILED},
    }  # fmt: skip


def show(case: dict[str, Any]) -> None:
    table = Table("step", "seconds", "spread", "images/s", "of the floor", "+-", "peak MB", title=case["title"])
    for name, values in case["rows"].items():
        most = f"{values['peak_mb']:.0f}" if "peak_mb" in values else ""
        table.add_row(
            name, f"{values['seconds']:.3f}", f"{values['spread']:.1%}", f"{values['images_per_second']:.1f}",
            f"{values['of_floor']:.3f}", f"{values['of_floor_spread']:.3f}", most,
        )  # fmt: skip
    console.print(table)
    for name, ratio in case["ratios"].items():
        console.print(f"{name}: {ratio:.3f}", highlight=False)
    if case["stages"]:
        stages = Table("stage of our step", "share")
        for stage, share in case["stages"].items():
            stages.add_row(stage, f"{share:.1%}")
        console.print(stages)
    kinds = Table("kind of work, whole step", *case["kinds"])
    for kind in KINDS:
        kinds.add_row(kind, *(f"{of_row[kind]:.1%}" for of_row in case["kinds"].values()))
    console.print(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--model", choices=("studio", "sd15"), default="studio")
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--size", type=int, nargs="+", default=[32], help="of the latents")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--memory", action="store_true", help="also measure each row's peak, in its own process")
    parser.add_argument("--output", type=Path, default=Path("build/steps.json"))
    parser.add_argument("--alone", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(alone(args.alone, build(args.model, args.batch[0], args.size[0])))
        return
    rows = list(dict.fromkeys(["floor", *args.rows]))
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "device": rates(), "cases": []}
    console.print(f"{found['machine']}: {', '.join(f'{k} {v:.0f}' for k, v in found['device'].items())}")
    for size in args.size:
        for batch in args.batch:
            case = measure(args.model, batch, size, rows, args.repeats, args.memory)
            show(case)
            found["cases"].append(case)
            args.output.parent.mkdir(parents=True, exist_ok=True)  # after each: the later ones may not fit into memory
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
