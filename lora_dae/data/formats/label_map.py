"""Garment masks from published segmentations: PNGs whose pixel values are classes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from lora_dae.data.decode import open_image
from lora_dae.data.entry import RowBlob, pixels_as_file


def mask_of_classes(path: Path, classes: Iterable[int]) -> RowBlob:
    """White where the label map at ``path`` has one of ``classes``. Raises OSError if there is no such file."""
    stat, wanted = path.stat(), tuple(sorted(classes))
    version = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{wanted}"
    return RowBlob(f"{path}:{','.join(map(str, wanted))}", version, partial(_load, path, wanted))


def _load(path: Path, classes: tuple[int, ...]) -> bytes:
    data = path.read_bytes()
    try:
        values = np.asarray(open_image(data))  # of a palette image: the indices
    except Exception:  # whatever a broken file leads to: decoding it says what is wrong
        return data
    if values.ndim == 3:
        values = values[..., 0]
    return pixels_as_file(np.repeat(np.isin(values, classes)[..., None].astype(np.uint8) * 255, 3, axis=2))
