"""``python -m benchmarks.data --photos <folder>``: the data path against the loaders that people know.

Ratios within one process and run, interleaved repeats, medians; ``--count 64 --repeats 3`` is the short form.
``<folder>`` holds photos as ``data=folder`` takes them. torchvision and datasets are needed for the comparison alone;
without one, its row is left out and said.

    decode     images/s of decode + crop + batch at 256 pixels: ours, torchvision ImageFolder + DataLoader, and Hugging
               Face datasets with the transforms of diffusers' text-to-image example; the main process has one
               thread, as each of their workers has (with more, its arithmetic waits for cores that decode)
    cached     time that a training step of the studio waits for its cached batch, as a share of the step
    building   share of the wall time of building a cache in which an encoder (VAE or text) is busy: the studio's
               small backbone, and SD 1.x's VAE
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.models import build as build_model
from benchmarks.steps import row
from benchmarks.timing import console, interleaved, show
from lora_dae.backbone.layout import CONFIGS
from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig, DataConfig
from lora_dae.data.cache import EncodeText, LatentCache, build_cache
from lora_dae.data.encode import EncodeImages, decoded
from lora_dae.data.photos import PhotoPairs
from lora_dae.data.sampler import StepBatchSampler
from lora_dae.data.sources import load_photos

RESOLUTION = 256
BATCH_SIZE = 16
WORKERS: dict[str, Any] = {"num_workers": os.cpu_count() or 1, "persistent_workers": True}  # started once, unmeasured


def ours(pairs: PhotoPairs, count: int) -> None:
    batches = [range(k, k + BATCH_SIZE) for k in range(0, count - BATCH_SIZE + 1, BATCH_SIZE)]
    for _, batch in decoded(lambda i: pairs[i].image, batches):
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

    return exhaust(DataLoader(ImageFolder(folder, diffusers_transforms()), BATCH_SIZE, drop_last=True, **WORKERS))


def datasets_loader(folder: Path) -> Callable[[], None]:
    import datasets

    transform = diffusers_transforms()
    photos = datasets.load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=str(folder.with_name("datasets"))
    )

    def preprocess(examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [transform(image.convert("RGB")) for image in examples["image"]]}

    def collate(examples: list[dict[str, Any]]) -> Tensor:
        return torch.stack([example["pixel_values"] for example in examples])

    photos = photos.with_transform(preprocess)
    return exhaust(DataLoader(photos, BATCH_SIZE, drop_last=True, collate_fn=collate, **WORKERS))


def exhaust(loader: DataLoader[Any]) -> Callable[[], None]:
    """One pass over it."""

    def run() -> None:
        for _ in loader:
            pass

    return run


def config(photos: Path, work: Path, resolution: int, count: int) -> DataConfig:
    """Enough of the photos for ``count`` to train on."""
    images = count + count // 4 + 8
    return DataConfig(name="folder", root=str(photos), resolution=resolution, cache_dir=str(work), max_images=images)


def decode(photos: Path, work: Path, count: int, repeats: int) -> dict[str, float]:
    pairs = load_photos(config(photos, work, RESOLUTION, count))["train"]
    count = min(count, len(pairs)) // BATCH_SIZE * BATCH_SIZE
    same = work / "same" / "all"
    same.mkdir(parents=True)
    for index in range(count):  # the very same files for all three
        file = Path(pairs.entries[index].image.name)
        shutil.copy(file, same / file.name)
    functions: dict[str, Callable[[], object]] = {"ours": lambda: ours(pairs, count)}
    for name, make in (("torchvision", torchvision_loader), ("datasets", datasets_loader)):
        try:
            functions[name] = make(same.parent)
        except ImportError as error:
            console.print(f"no comparison with {name}: {error}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = interleaved(functions, repeats)
    torch.set_num_threads(threads)
    rates = {f"{name}_images_per_second": count / value for name, value in seconds.items()}
    others = [value for name, value in seconds.items() if name != "ours"]
    return rates | ({"ratio_to_the_better_one": min(others) / seconds["ours"]} if others else {})


def build(
    pairs: PhotoPairs, directory: Path, encode_images: EncodeImages, encode_text: EncodeText
) -> tuple[LatentCache, float]:
    """A cache, and the share of its building in which an encoder works."""
    busy = 0.0

    def timed(encode: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(batch: Any) -> Any:
            nonlocal busy
            start = time.perf_counter()
            result = encode(batch)
            busy += time.perf_counter() - start
            return result

        return run

    start = time.perf_counter()
    cache = build_cache(pairs, directory, timed(encode_images), timed(encode_text), "vae", "text", quiet=True)
    return cache, busy / (time.perf_counter() - start)


def building(photos: Path, work: Path, count: int) -> dict[str, float]:
    """With SD 1.x's VAE (random weights: as slow as trained ones)."""
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "sd1" / "vae")).requires_grad_(False)

    def encode(images: np.ndarray) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
        return posterior.mean, posterior.std

    pairs = load_photos(config(photos, work, 128, count))["train"]
    text = load_backbone(BackboneConfig()).encode_text
    return {"encoder_busy_while_building_sd1": build(pairs, work / "built", encode, text)[1]}


def cached(photos: Path, work: Path, count: int, repeats: int) -> dict[str, float]:
    """The studio's backbone: its cache built, then read in batches as the training loop does.

    The first pass, which also checks every row's sum and maps the files, is left out of the mean.
    """
    backbone = load_backbone(BackboneConfig())
    pairs = load_photos(config(photos, work, 128, count))["train"]
    cache, busy = build(pairs, work / "read", backbone.encode_images, backbone.encode_text)
    batches = iter(DataLoader(cache, batch_sampler=StepBatchSampler(len(cache), BATCH_SIZE), collate_fn=lambda x: x))
    waits = []
    for _ in range(3 * len(cache) // BATCH_SIZE):
        start = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - start)
    step = interleaved({"ours": row("ours", build_model("studio", BATCH_SIZE, 32))}, repeats)["ours"]
    share = statistics.mean(waits[len(cache) // BATCH_SIZE :]) / step
    return {"data_share_of_a_step": share, "encoder_busy_while_building_studio": busy}


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
        results |= building(args.photos, Path(work), min(args.count, 64))
    show(results, args.output)


if __name__ == "__main__":
    main()
