"""``python -m benchmarks.evaluation``: pictures in a folder to features, against the bare feature network.

Ratios within one process, interleaved repeats, medians. "bare" is the network alone on pictures that are in memory at
its own size; "folder" reads, decodes and resizes files as ``evaluate.py images=...`` does; "everything" also measures
texture. "clean-fid" and "ours" take one folder to clean-fid's features on one network (the same stand-in: its weights
are a download): clean-fid's own loader, and our reading. Memory is what the process's peak grows by over the last three
quarters of the pictures. What is to hold holds for ``--images 10000``: at least 0.9 of bare, 1 of clean-fid, one value.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.timing import console, interleaved, show
from lora_dae.evaluation import folders
from lora_dae.evaluation.folders import PictureFolder
from lora_dae.evaluation.metrics.distances import frechet_from_features
from lora_dae.evaluation.metrics.features import FeatureExtractor, load_features, stack_images
from lora_dae.evaluation.metrics.measure import BATCH
from lora_dae.evaluation.metrics.networks import CleanFid
from lora_dae.evaluation.metrics.observe import Batch, Meters, observe

NETWORK_SIDE = 224  # effnet's
AT_ONCE = 16  # pictures that the bare network gets: as many as it is the fastest with
NUM_FEATURES = 320  # of its 1280, beside clean-fid: roots of large matrices have no part in what is compared


def write_pictures(folder: Path, count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for k in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((size, size))
        noise = rng.integers(0, 16, (size, size, 3))
        Image.fromarray((np.asarray(coarse) * 0.9 + noise).astype(np.uint8)).save(folder / f"{k:05d}.png")


def batches(folder: PictureFolder, peaks: list[float] | None = None) -> Iterator[Tensor]:
    """The folder's pictures; ``peaks`` is told the peak memory (MB) before each batch."""
    pictures = folders.read(folder, range(len(folder)), None)
    for start in range(0, len(folder), BATCH):
        if peaks is not None:
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        yield stack_images([next(pictures) for _ in range(min(BATCH, len(folder) - start))])


def against_bare(folder: PictureFolder, extractor: FeatureExtractor, repeats: int) -> dict[str, float]:
    """Throughput of the folder's way as a share of the bare network's, and what memory grows by (kB a picture)."""
    peaks: list[float] = []
    extractor.extract(batches(folder, peaks))  # first: later peaks would hide its own
    quarter = len(peaks) // 4
    grown = (peaks[-1] - peaks[quarter]) / max((len(peaks) - 1 - quarter) * BATCH, 1)
    held = torch.rand(min(AT_ONCE, len(folder)), 3, NETWORK_SIDE, NETWORK_SIDE, device=extractor.device)

    def bare() -> None:
        with torch.inference_mode():
            for start in range(0, len(folder), AT_ONCE):
                extractor.features_and_probs(held[: len(folder) - start])[0].cpu()

    seconds = interleaved(
        {
            "bare": bare,
            "folder": lambda: extractor.extract(batches(folder)),
            "everything": lambda: observe((Batch(b.float() / 255) for b in batches(folder)), Meters((extractor,))),
        },
        repeats,
    )
    return {
        "bare_images_per_second": len(folder) / seconds["bare"],
        "folder_of_bare": seconds["bare"] / seconds["folder"],
        "everything_of_bare": seconds["bare"] / seconds["everything"],
        "memory_kB_per_image": grown * 1024,
    }


def against_clean_fid(
    images: PictureFolder, reference: PictureFolder, network: Callable[[Tensor], Tensor], device: str, repeats: int
) -> dict[str, float]:
    """Our throughput as a share of clean-fid's on one network, and how far the two FIDs are apart (relative)."""
    from cleanfid import fid

    with patch("cleanfid.features.build_feature_extractor", lambda *_, **__: network):
        extractor = CleanFid(device)

    def theirs(folder: PictureFolder) -> np.ndarray:
        return fid.get_folder_features(
            str(folder.path), model=network, num_workers=os.cpu_count() or 1, batch_size=BATCH, device=device,
            mode="clean", verbose=False,
        )  # fmt: skip

    def ours(folder: PictureFolder) -> Tensor:
        return extractor.extract(batches(folder)).pooled

    seconds = interleaved({"clean-fid": lambda: theirs(images), "ours": lambda: ours(images)}, repeats)
    result = {
        "clean_fid_images_per_second": len(images) / seconds["clean-fid"],
        "ours_of_clean_fid": seconds["clean-fid"] / seconds["ours"],
    }
    if len(reference) > NUM_FEATURES:  # below, clean-fid's root of a singular matrix is not accurate
        value = fid.fid_from_feats(theirs(images), theirs(reference))
        own = frechet_from_features(ours(images), ours(reference))
        result["fid_relative_difference"] = abs(own - value) / abs(value)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/evaluation.json"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_features("effnet", device)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / which for which in ("images", "reference")]
        for seed, (path, count) in enumerate(zip(paths, (args.images, min(args.images, 2048)), strict=True)):
            path.mkdir()
            write_pictures(path, count, args.size, seed)
        images, reference = (folders.scan(path.name, path) for path in paths)
        results = against_bare(images, extractor, args.repeats)
        try:
            results |= against_clean_fid(
                images, reference, lambda x: extractor(x / 255)[:, :NUM_FEATURES], device, args.repeats
            )
        except ImportError as error:
            console.print(f"clean-fid is left out ({error}): pip install 'lora-dae[fid]'.")
    show(results, args.output)


if __name__ == "__main__":
    main()
