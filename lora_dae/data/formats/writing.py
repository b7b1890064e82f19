"""What the writers of layouts share."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_dae.config import ConfigError
from lora_dae.data.catalog import say_once
from lora_dae.data.pair import Pair, PairDataset

Splits = dict[str, PairDataset]


def every_pair(splits: Splits) -> Iterator[tuple[str, Pair]]:
    """(split, pair) of all splits, in order."""
    for split, pairs in splits.items():
        for index in range(len(pairs)):
            yield split, pairs[index]


def free_attributes(pair: Pair, own: Collection[str]) -> dict[str, str]:
    """A pair's attributes but for those with a name that the layout uses itself (``own``), which is said once."""
    attributes = pair.attributes or {}
    lost = sorted(attributes.keys() & set(own) - {"category"})  # the category has its column
    if lost:
        say_once(f"attributes that are not written, because the layout has columns of these names: {', '.join(lost)}")
    return {name: word for name, word in attributes.items() if name not in own}


def save_image(path: Path, pixels: np.ndarray) -> None:
    """uint8 (H, W, 3) or (H, W); JPEGs at a quality at which a texture stays what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"quality": 97, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(pixels).save(path, **options)


def save_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def save_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def needs_source(layout: str, splits: Splits) -> None:
    """Raises ConfigError unless every pair has a source photo, of which the layout consists."""
    if not all(pairs.has_source for pairs in splits.values()):
        raise ConfigError(f"the layout {layout} consists of pairs, but these data have no source photos: use folder.")
