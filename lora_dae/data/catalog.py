"""What is known about every file of a data set, read once: an SQLite file in the cache folder.

Each file is read and decoded one time; the answer is kept until its size or times change. So broken files are
found before training and not in the middle of it, sizes are known without opening anything, and cache keys
follow the files' bytes. Nothing is ever written into the data folder.
"""

from __future__ import annotations

import csv
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track

from lora_dae.config import ConfigError
from lora_dae.data.decode import BadImageError, decode, open_image, remarks, upright_size
from lora_dae.data.entry import Blob, Entry

VERSION = 2  # raise it when examine() would answer otherwise
_COLUMNS = "digest, width, height, remark, reason, hash, red, green, blue"
_BATCH = 500
OTHER_SHAPE = 0.02  # more than so much, and a pixel of rounding, and a mask has another aspect than its photo


@dataclass(frozen=True, slots=True)
class Facts:
    """One file: sha-256 of its bytes, upright size in pixels, remarks, and why it is unusable ("" if it is not).

    ``hash`` is a 64-bit difference hash (hex), near for images that look alike; ``red``, ``green`` and ``blue``
    are mean values, 0 to 255.
    """

    digest: str = ""
    width: int = 0
    height: int = 0
    remark: str = ""
    reason: str = ""
    hash: str = ""
    red: float = 0.0
    green: float = 0.0
    blue: float = 0.0


def examine(blob: Blob) -> Facts:
    """Reads and decodes one file."""
    try:
        data = blob.read()
    except FileNotFoundError:
        return Facts(reason="is missing")
    except BadImageError as error:  # the source itself knows that it is no picture of this
        return Facts(reason=str(error))
    except OSError as error:
        return Facts(reason=f"cannot be read ({error.strerror or error})")
    digest = hashlib.sha256(data).hexdigest()
    try:
        small = decode(data, draft=64)  # the whole file is read, the pixels at a fraction
        photo = open_image(data)
        remark, (width, height) = "; ".join(remarks(photo)), upright_size(photo)
    except BadImageError as error:
        return Facts(digest, reason=str(error))
    red, green, blue = np.asarray(small, np.float32).reshape(-1, 3).mean(0)
    return Facts(digest, width, height, remark, "", difference_hash(small), float(red), float(green), float(blue))


def difference_hash(photo: Image.Image) -> str:
    """64 bits as 16 hex digits: of 9 x 8 gray cells, which is brighter than its right neighbor."""
    cells = np.asarray(photo.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes().hex()


def check_shape(known: dict[str, Facts]) -> dict[str, Facts]:
    """What is known about one entry's files, the mask unusable where its aspect is not that of the photo.

    Such a mask would be stretched over its photo, and lie beside the garment.
    """
    image, mask = known["image"], known.get("mask")
    if mask is None or mask.reason or image.reason or _alike(image.width, image.height, mask.width, mask.height):
        return known
    reason = f"has {mask.width}x{mask.height} pixels, another shape than its photo's {image.width}x{image.height}"
    if _alike(image.width, image.height, mask.height, mask.width):
        reason += " (turned by 90 degrees it fits: was it drawn without the turn that the photo's EXIF asks for?)"
    return known | {"mask": replace(mask, reason=reason)}


def _alike(width: int, height: int, mask_width: int, mask_height: int) -> bool:
    ratio = width * mask_height / (height * mask_width)
    return max(ratio, 1 / ratio) - 1 <= OTHER_SHAPE + 1 / min(width, height, mask_width, mask_height)


class Catalog:
    """Facts of files, remembered in ``cache_dir/files.sqlite``; several processes may use it at once."""

    def __init__(self, cache_dir: str | Path, examine: Callable[[Blob], Facts] = examine) -> None:
        self.path = Path(cache_dir) / "files.sqlite"
        self.examine = examine
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, stamp TEXT, digest TEXT, width INT, "
                    "height INT, remark TEXT, reason TEXT, hash TEXT, red REAL, green REAL, blue REAL) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot write to the cache folder {cache_dir} ({error}): set data.cache_dir.") from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=120)

    def facts(self, blobs: Sequence[Blob]) -> list[Facts]:
        """Facts of each, in order; files that are new or changed are read now, by all cores."""
        stamps = [_stamp(blob) for blob in blobs]
        known = self._known(blobs, stamps)
        if len(known) == len(blobs):
            return [known[i] for i in range(len(blobs))]
        with FileLock(self.path.with_suffix(".lock")):  # other processes wait, and then find it all known
            known = self._known(blobs, stamps)
            new = [i for i in range(len(blobs)) if i not in known]
            batches: Iterable[int] = range(0, len(new), _BATCH)
            if len(new) > 4 * _BATCH:
                batches = track(batches, description="Reading photos")
            with ThreadPoolExecutor(os.cpu_count()) as pool, closing(self._open()) as database:
                for start in batches:
                    batch = new[start : start + _BATCH]
                    found = pool.map(self.examine, [blobs[i] for i in batch])
                    known |= dict(zip(batch, found, strict=True))
                    # What was not there, or could not be read, is asked for again: another Pillow may read it.
                    rows = [
                        (blobs[i].name, stamps[i], *astuple(known[i]))
                        for i in batch
                        if known[i].digest and not known[i].reason
                    ]
                    with database:  # what was read stays known if the program is killed now
                        marks = ", ".join("?" * 11)
                        database.executemany(f"INSERT OR REPLACE INTO files VALUES ({marks})", rows)
        return [known[i] for i in range(len(blobs))]

    def _known(self, blobs: Sequence[Blob], stamps: list[str]) -> dict[int, Facts]:
        query = f"SELECT {_COLUMNS} FROM files WHERE name = ? AND stamp = ?"
        with closing(self._open()) as database:
            rows = (database.execute(query, (b.name, s)).fetchone() for b, s in zip(blobs, stamps, strict=True))
            return {i: Facts(*row) for i, row in enumerate(rows) if row is not None}


def digests_of(entries: list[Entry], cache_dir: str | Path) -> dict[str, str]:
    """Id -> sha-256 of its photo's bytes, of those that can be read. It tells whether an id still means that photo."""
    if not entries:
        return {}
    facts = Catalog(cache_dir).facts([entry.image for entry in entries])
    return {entry.id: known.digest for entry, known in zip(entries, facts, strict=True) if known.digest}


@cache
def say_once(text: str) -> None:
    """One sentence that a person has to know, however often the data are opened."""
    Console(stderr=True).print(text, soft_wrap=True, highlight=False, markup=False)


def _stamp(blob: Blob) -> str:
    try:
        return f"v{VERSION}:{blob.stamp()}"
    except OSError as error:
        return f"v{VERSION}:{type(error).__name__}"


@dataclass(frozen=True)
class BadFile:
    name: str
    reason: str


def check_bad(bad: list[BadFile], total: int, max_fraction: float, what: str, cache_dir: str | Path) -> Path | None:
    """Writes the table of unusable files; raises ConfigError if their share is above ``max_fraction``.

    Returns the table's path, a CSV file in the cache folder, or None where there is nothing to tell.
    """
    if not bad:
        return None
    path = Path(cache_dir) / "bad_files.csv"
    partial = path.with_name(f"bad_files.partial{os.getpid()}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "reason"))
        writer.writerows((b.name, b.reason) for b in bad)
    os.replace(partial, path)  # runs side by side write it too
    share = len(bad) / max(total, 1)
    if share > max_fraction:
        shown = "; ".join(f"{b.name} {b.reason}" for b in bad[:5]) + (f"; and {len(bad) - 5} more" if bad[5:] else "")
        raise ConfigError(
            f"{what} has {len(bad)} unusable of {total} files, a share of {share:.1%} above data.max_bad_fraction="
            f"{max_fraction:g} ({shown}): repair them, take them out, or raise that limit; the table is {path}."
        )
    return path
