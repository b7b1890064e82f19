"""What a pair is: one fashion photo with its caption and, where there is one, its source photo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Pair:
    """One example. Pixels are uint8 RGB at the data set's square resolution.

    ``id`` is unique in its data set. Everything with the same ``group_id`` (say, several photos of one
    garment) lies in the same split. ``source`` is the photo that steers the image (the garment on a
    mannequin), ``mask`` the garment in ``image`` (0 or 255).
    """

    id: str
    group_id: str
    caption: str
    image: np.ndarray  # (H, W, 3) uint8
    source: np.ndarray | None = None  # (H, W, 3) uint8
    mask: np.ndarray | None = None  # (H, W) uint8, 0 or 255
    category: str | None = None
    attributes: dict[str, str] | None = None


class PairDataset(Protocol):
    """A split: anything with these members. Decoding or rendering happens in ``__getitem__``.

    ``fingerprint`` identifies the content (pixels, captions, resolution, order): two data sets with the
    same fingerprint give the same pairs, so caches are keyed by it. With ``has_source`` (``has_mask``)
    every pair has a source (mask), without it none has.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def has_source(self) -> bool: ...

    @property
    def has_mask(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...
