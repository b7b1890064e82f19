"""What was seen of the real images, kept by their content: a second evaluation does not look at them again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_dae.adapter.atomic import save_tensors
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features
from lora_dae.evaluation.metrics.observe import Observed
from lora_dae.evaluation.metrics.texture import BandPower

VERSION = 1  # raise it when a change moves what is kept


def cache_path(folder: Path, files: Sequence[Path], extractors: Sequence[FeatureExtractor], how: str) -> Path:
    """Where these files' numbers are: by the bytes of each in order, the networks' weights, and ``how`` they are read.

    A changed, added or removed file is another path.
    """
    digest = hashlib.blake2b(f"{VERSION}:{how}".encode(), digest_size=16)
    for extractor in extractors:
        digest.update(f"{extractor.name}:{_weights(extractor)}".encode())
    for file in files:
        digest.update(hashlib.blake2b(file.read_bytes(), digest_size=16).digest())
    return folder / "evaluation" / f"{digest.hexdigest()}.safetensors"


def load(path: Path, extractors: Sequence[FeatureExtractor]) -> Observed | None:
    """What was kept, or None: not yet, or the file is cut short."""
    if not path.is_file():
        return None
    try:
        kept = load_file(path)
    except (SafetensorError, OSError):
        return None
    features = {e.name: Features(kept[f"{e.name}.pooled"], kept[f"{e.name}.probs"]) for e in extractors}
    return Observed(features, BandPower(kept["sums"], kept["area"]), False, {})


def store(path: Path, seen: Observed) -> None:
    """Keep features and band power of whole pictures. Raises ConfigError where they cannot be written."""
    tensors: dict[str, Tensor] = {"sums": seen.power.sums, "area": seen.power.area}
    for name, features in seen.features.items():
        tensors |= {f"{name}.pooled": features.pooled, f"{name}.probs": features.probs}
    save_tensors(tensors, path, {})


def _weights(extractor: FeatureExtractor) -> str:
    """The sum of the weights: a folder may hold another model tomorrow."""
    return f"{sum(p.detach().cpu().double().sum().item() for p in extractor.parameters()):.9g}"
