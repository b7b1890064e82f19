"""``python -m benchmarks.data --photos <folder>``: the data path against the loaders that people know.

Ratios within one process and run, interleaved repeats, medians. ``<folder>`` holds metadata.jsonl and images/, as real
garment photos do. torchvision and datasets are needed for the comparison alone; without one, its row is left out and
said.

    decode     images/s of decode + crop + batch at 256 pixels: ours, torchvision ImageFolder + DataLoader, and Hugging
               Face datasets with the transforms of diffusers' text-to-image example
    cached     time to read a cached batch, as a share of a studio training step
    building   share of the wall time of building a cache in which the encoder is busy
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.__main__ import console, interleaved, training
from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig, DataConfig
from lora_dae.data.cache import build_cache, decoded
from lora_dae.data.photos import PhotoPairs
from lora_dae.data.sources import load_photos

RESOLUTION = 256
BATCH_SIZE = 16
CORES = os.cpu_count() or 1


def ours(pairs: PhotoPairs, count: int) -> None:
    batches = [range(k, k + BATCH_SIZE) for k in range(0, count - BATCH_SIZE + 1, BATCH_SIZE)]
    for batch in decoded(lambda i: pairs[i].image, batches):
        torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def diffusers_transforms() -> Callable[[Any], Tensor]:
    """Those of examples/text_to_image/train_text_to_image_lora.py, center crop."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(RESOLUTION, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(RESOLUTION),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


def torchvision_loader(folder: Path) -> Callable[[], None]:
    """ImageFolder wants a folder a class: ``folder`` holds one."""
    from torchvision.datasets import ImageFolder

    loader = DataLoader(ImageFolder(folder, diffusers_transforms()), BATCH_SIZE, num_workers=CORES, drop_last=True)
    return lambda: [None for _ in loader] and None


def datasets_loader(folder: Path) -> Callable[[], None]:
    import datasets

    transform = diffusers_transforms()
    photos = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")

    def preprocess(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [transform(image.convert("RGB")) for image in examples["image"]]}

    def collate(examples: list[dict[str, Any]]) -> Tensor:
        return torch.stack([example["pixel_values"] for example in examples])

    loader = DataLoader(
        photos.with_transform(preprocess), BATCH_SIZE, num_workers=CORES, drop_last=True, collate_fn=collate
    )
    return lambda: [None for _ in loader] and None


def decode(photos: Path, work: Path, count: int, repeats: int) -> dict[str, float]:
    cfg = DataConfig(name="folder", root=str(photos), resolution=RESOLUTION, cache_dir=str(work), max_images=2 * count)
    pairs = load_photos(cfg)["train"]
    count = min(count, len(pairs)) // BATCH_SIZE * BATCH_SIZE
    same = work / "same" / "all"
    same.mkdir(parents=True)
    for index in range(count):  # the very same files for all three
        file = Path(pairs.entries[index].image.name)
        shutil.copy(file, same / file.name)
    functions: dict[str, Callable[[], None]] = {"ours": lambda: ours(pairs, count)}
    for name, make in (("torchvision", torchvision_loader), ("datasets", datasets_loader)):
        try:
            functions[name] = make(same.parent)
        except ImportError as error:
            console.print(f"no comparison with {name}: {error}")
    seconds = interleaved(functions, repeats)
    rates = {f"{name}_images_per_second": count / value for name, value in seconds.items()}
    others = [value for name, value in seconds.items() if name != "ours"]
    return rates | ({"ratio_to_the_better_one": min(others) / seconds["ours"]} if others else {})


def cached(photos: Path, work: Path, count: int, repeats: int) -> dict[str, float]:
    """Also measures the building, with the studio's own VAE."""
    backbone = load_backbone(BackboneConfig())
    cfg = DataConfig(name="folder", root=str(photos), resolution=128, cache_dir=str(work), max_images=2 * count)
    pairs = load_photos(cfg)["train"]
    busy = 0.0

    def encode(images: np.ndarray) -> tuple[Tensor, Tensor]:
        nonlocal busy
        start = time.perf_counter()
        result = backbone.encode_images(images)
        busy += time.perf_counter() - start
        return result

    start = time.perf_counter()
    cache = build_cache(pairs, work / "latents", encode, backbone.encode_text, "vae", "text")
    wall = time.perf_counter() - start
    rng = np.random.default_rng(0)
    steps = [rng.integers(0, len(cache), BATCH_SIZE).tolist() for _ in range(50)]
    for step in steps:
        cache.__getitems__(step)
    start = time.perf_counter()
    for step in steps:
        cache.__getitems__(step)
    batch = (time.perf_counter() - start) / len(steps)
    floor = training(repeats)
    step_seconds = floor["floor_seconds"] * floor["adapter_step_ratio"]
    return {"data_share_of_a_step": batch / step_seconds, "encoder_busy_while_building": busy / wall}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks_data.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = decode(args.photos, Path(work), args.count, args.repeats)
        results |= cached(args.photos, Path(work), args.count, args.repeats)
    table = Table("measured", "value")
    for name, value in results.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
