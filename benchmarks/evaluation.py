"""``python -m benchmarks.evaluation``: pictures in a folder to features, against the bare feature network.

Ratios within one process, interleaved repeats, medians. "Bare" has its pictures decoded and in memory; "folder" reads,
decodes and resizes them as ``evaluate.py images=...`` does; "everything" also measures texture.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import console, interleaved
from lora_dae.evaluation import folders
from lora_dae.evaluation.metrics.features import load_features, stack_images
from lora_dae.evaluation.metrics.measure import BATCH
from lora_dae.evaluation.metrics.observe import Batch, Meters, observe


def write_pictures(folder: Path, count: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((size, size))
        noise = rng.integers(0, 16, (size, size, 3))
        Image.fromarray((np.asarray(coarse) * 0.9 + noise).astype(np.uint8)).save(folder / f"{k:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--features", default="effnet")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    extractor = load_features(args.features, "cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as name:
        write_pictures(Path(name), args.images, args.size)
        folder = folders.scan("images", Path(name))

        def batches() -> Iterator[torch.Tensor]:
            pictures = folders.read(folder, range(len(folder)), None)
            for start in range(0, len(folder), BATCH):
                yield stack_images([next(pictures) for _ in range(min(BATCH, len(folder) - start))])

        held = list(batches())
        seconds = interleaved(
            {
                "bare": lambda: [extractor.extract([batch]) for batch in held] and None,
                "folder": lambda: extractor.extract(batches()) and None,
                "everything": lambda: (
                    observe((Batch(b.float() / 255) for b in batches()), Meters((extractor,))) and None
                ),
            },
            args.repeats,
        )
    for label, value in seconds.items():
        speed = args.images / value
        console.print(f"{label:12} {speed:7.1f} images/s, {seconds['bare'] / value:.2f} of the bare network")


if __name__ == "__main__":
    main()
