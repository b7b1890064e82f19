"""python -m benchmarks.scaling: how costs grow with rank, batch, resolution, number of bands and size of the data set.

    rank         a training step (benchmarks.steps: ours), 1..128 as far as the model's layers have such a rank
    batch        a training step
    resolution   a training step against the pixels of its latents; self-attention alone grows with their square
    bands        the enhancement of one sampling step (gain and source texture) against its number of bands; and the
                 sampling step with it (one network call)
    photos       reading a batch from the cache, against the photos in it: nothing should grow; opening the cache
                 should grow as its photos do

Every curve is measured in turns over its points; its slope in log-log is the exponent: 1 is proportional. The steepest
piece between two neighbours is told beside it, as a straight line hides a bend. build/scaling.json and .png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.models import Parts, as_trained, build, machine, prepared, training_optimizer
from benchmarks.steps import Step
from benchmarks.timing import console, timings
from lora_dae.adapter.targets import largest_rank, select
from lora_dae.config import AdapterConfig
from lora_dae.data.cache import build_cache
from lora_dae.data.pair import Pair
from lora_dae.data.sampler import StepBatchSampler
from lora_dae.enhancement.module import EnhancementModule

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

STEEP = 1.1  # above it a cost grows faster than its cause
BATCH, SIZE, RANK = 16, 32, 16
Curve = dict[int, Callable[[], object]]


def shaped(parts: Parts, batch: int, size: int) -> Parts:
    """The same weights with another batch; attention is chosen for its shape."""
    latents = torch.randn(batch, parts.latents.shape[1], size, size)
    return replace(parts, latents=latents, text=torch.randn(batch, *parts.text.shape[1:]), alone=True, _kept={})


def our_step(parts: Parts, rank: int = RANK) -> Step:
    unet = as_trained(parts.arranged(), AdapterConfig(rank=rank), in_place=False)
    x = parts.latents.contiguous(memory_format=torch.channels_last)
    t = torch.randint(0, 1000, (len(x),))
    return Step(unet, lambda: (x, t, parts.text), training_optimizer(unet))


def ranks(parts: Parts, points: list[int]) -> Curve:
    cfg = AdapterConfig()
    most = min(largest_rank(parts.unet.get_submodule(name)) for name in select(parts.unet, cfg.targets))
    left_out = [rank for rank in points if rank > most]
    if left_out:
        console.print(f"ranks {left_out} are left out: the smallest layer has full rank {most}", highlight=False)
    return {rank: our_step(parts, rank) for rank in points if rank <= most}


def bands(parts: Parts, points: list[int]) -> tuple[Curve, Curve]:
    """(The enhancement alone, the sampling step with it.)"""
    unet, x = prepared(parts.arranged()), parts.latents.contiguous(memory_format=torch.channels_last)
    conditional, source = (x + 0.1 * torch.randn_like(x) for _ in range(2))
    alone: Curve = {}
    whole: Curve = {}
    for levels in points:
        module = EnhancementModule(levels=levels, source_channels=x.shape[1]).requires_grad_(False).eval()

        def edit(module: EnhancementModule = module) -> None:
            with torch.no_grad():
                module(x, conditional, x, 0.7, 0.714, 0.3, source=source)

        def step(edit: Callable[[], None] = edit) -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                unet(x, 500, parts.text)
            edit()

        alone[levels], whole[levels] = edit, step
    return alone, whole


class Noise:
    """So many photos of noise, each another one."""

    has_source = has_mask = False

    def __init__(self, count: int) -> None:
        self.count, self.fingerprint = count, f"noise-{count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Pair(id=str(index), group_id=str(index), caption=f"photo {index % 50}", image=pixels)


def encode_images(images: np.ndarray) -> tuple[Tensor, Tensor]:
    latents = torch.zeros(len(images), 8, SIZE, SIZE)
    return latents, latents + 1


def encode_text(captions: list[str]) -> Tensor:
    return torch.zeros(len(captions), 32, 128)


def photos(work: Path, points: list[int]) -> tuple[Curve, Curve]:
    """(A batch read, the cache opened.) The latents have the studio's size; what they are made of does not matter."""
    reading: Curve = {}
    opening: Curve = {}
    for count in points:

        def opened(count: int = count) -> Any:
            folder = work / str(count)
            return build_cache(Noise(count), folder, encode_images, encode_text, "vae", "text", quiet=True)  # type: ignore[arg-type]

        cache = opened()
        batches: Iterator[list[int]] = iter(StepBatchSampler(len(cache), BATCH))

        def read(cache: Any = cache, batches: Iterator[list[int]] = batches) -> None:
            for numbers in itertools.islice(batches, 8):
                cache.__getitems__(numbers)

        reading[count], opening[count] = read, opened
    return reading, opening


def exponent(xs: list[int], ys: list[float]) -> tuple[float, float]:
    """(Slope of the straight line through the points in log-log, slope of its steepest piece.)"""
    x, y = np.log(xs), np.log(ys)
    return float(np.polyfit(x, y, 1)[0]), float((np.diff(y) / np.diff(x)).max())


def measure(name: str, curve: Curve, repeats: int) -> dict[str, Any]:
    taken = timings({str(point): f for point, f in curve.items()}, repeats)
    seconds = [statistics.median(times) for times in taken.values()]
    slope, steepest = exponent(list(curve), seconds)
    console.print(f"{name}: " + ", ".join(f"{x}: {y:.4f} s" for x, y in zip(curve, seconds, strict=True)))
    return {"of": name, "points": list(curve), "seconds": seconds, "slope": slope, "steepest": steepest}


def plot(curves: list[dict[str, Any]], path: Path) -> None:
    columns = min(4, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, curve in zip(axes.flat, curves, strict=False):
        x, y = np.array(curve["points"], float), np.array(curve["seconds"])
        axis.loglog(x, y, "o-")
        axis.loglog(x, y[-1] * x / x[-1], ":", color="gray", label="proportional")
        axis.set_title(f"{curve['of']}: slope {curve['slope']:.2f}", fontsize=9)
        axis.set_ylabel("seconds")
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curves(args: argparse.Namespace, work: Path) -> Iterator[tuple[str, Curve]]:
    """One after the other, on one set of weights, so that the steps of one are gone before the next ones are made."""
    parts, batch, size = build(args.model, 1, args.size), args.batch, args.size
    usual = shaped(parts, batch, size)
    if "rank" in args.of:
        yield "step, rank", ranks(usual, args.ranks)
    if "batch" in args.of:
        yield "step, batch", {count: our_step(shaped(parts, count, size)) for count in args.batches}
    if "resolution" in args.of:
        yield "step, pixels of the latents", {s * s: our_step(shaped(parts, batch, s)) for s in args.sizes}
    if "bands" in args.of:
        alone, whole = bands(usual, args.bands)
        yield "enhancement, bands", alone
        yield "sampling step, bands", whole
    if "photos" in args.of:
        reading, opening = photos(work, args.photos)
        yield "8 batches from the cache, photos", reading
        yield "opening the cache, photos", opening


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    kinds = ("rank", "batch", "resolution", "bands", "photos")
    parser.add_argument("--of", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--model", choices=("studio", "sd15"), default="studio")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--size", type=int, default=SIZE, help="of the latents")
    for name, points in (
        ("ranks", [1, 2, 4, 8, 16, 32, 64, 128]), ("batches", [1, 2, 4, 8, 16, 32]), ("sizes", [16, 24, 32, 48, 64]),
        ("bands", [1, 2, 3, 4]), ("photos", [256, 1024, 4096, 8192]),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, nargs="+", default=points)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/scaling.json"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    title = (
        f"{args.model}, batch {args.batch}, {args.size} x {args.size} latents, rank {RANK} where nothing else is said"
    )
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "title": title, "curves": []}
    with tempfile.TemporaryDirectory() as work:
        for name, curve in curves(args, Path(work)):
            found["curves"].append(measure(name, curve, args.repeats))
            args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = Table("cost of", "slope", "steepest piece", "", title=title)
    for one in found["curves"]:
        word = "steeper than proportional" if max(one["slope"], one["steepest"]) > STEEP else ""
        table.add_row(one["of"], f"{one['slope']:.2f}", f"{one['steepest']:.2f}", word)
    console.print(table)
    plot(found["curves"], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
