"""What a data source hands over: a pair whose photos are still files.

Every layout under ``formats/`` is a function from ``data.*`` to a list of ``Entry``; ``photos.py`` makes
``Pair`` of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Protocol

import numpy as np


class Blob(Protocol):
    """One encoded photo, wherever it lies. ``name`` is for messages, ``stamp`` cheap and new when bytes are."""

    @property
    def name(self) -> str: ...

    def stamp(self) -> str: ...

    def read(self) -> bytes: ...


def spelled(path: PurePath | str) -> str:
    """The path as text that can be hashed, stored and printed; bytes that are no UTF-8 become ``\\xff``."""
    return os.fsencode(path).decode(errors="backslashreplace")


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A file on disk. Both methods raise OSError as the file system does."""

    path: Path

    @property
    def name(self) -> str:
        return spelled(self.path)

    def stamp(self) -> str:
        stat = self.path.stat()
        # The time of change (ctime) cannot be set back by a copy that keeps the modification time.
        return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True, slots=True)
class RowBlob:
    """Bytes inside a larger file (HDF5, parquet, tar); ``version`` names that file's content."""

    name: str
    version: str
    load: Callable[[], bytes]

    def stamp(self) -> str:
        return self.version

    def read(self) -> bytes:
        return self.load()


def pixels_as_file(pixels: np.ndarray) -> bytes:
    """An uncompressed image file (PPM) of uint8 (H, W, 3): raw pixels go the way of all other files."""
    height, width, _ = pixels.shape
    return b"P6 %d %d 255\n" % (width, height) + np.ascontiguousarray(pixels, np.uint8).tobytes()


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a data set. ``where`` says which line, for messages; see ``Pair`` for the rest.

    ``captions`` may be empty: then ``attributes`` and a template, or a captioner, have to fill them.
    ``split`` is the publisher's (train, val or test), None where we split. ``block`` names the file that
    its photos lie in with others, where reading few such files at a time pays.
    """

    id: str
    group_id: str
    captions: tuple[str, ...]
    image: Blob
    where: str = ""
    source: Blob | None = None
    mask: Blob | None = None
    category: str | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    mirror: bool = True
    repeats: int = 1
    block: str = ""

    @property
    def caption(self) -> str:
        return self.captions[0] if self.captions else ""

    @property
    def blobs(self) -> list[Blob]:
        """Its files: image, and source and mask where there are any."""
        return [blob for blob in (self.image, self.source, self.mask) if blob is not None]
