"""What all layouts share: reading tables, finding files whose names are spelled another way, walking folders."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from lora_dae.config import ConfigError, DataConfig

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
# How publishers call their splits, and how we do.
SPLIT_NAMES = {
    "train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val",
    "eval": "val", "evaluation": "val", "test": "test", "testing": "test",
}  # fmt: skip
Row = tuple[int, dict[str, Any]]  # line number, columns


def root_of(cfg: DataConfig) -> Path:
    """The folder ``data.root``; raises ConfigError if there is none."""
    if cfg.root is None:
        raise ConfigError(f"data={cfg.name} needs a folder of photos: give data.root=<folder>.")
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise ConfigError(f"data.root={cfg.root} is not a folder: give a folder of photos with captions.")
    return root


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark; ConfigError if it is something else or not there."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): is this the layout of data=...?") from error


def read_json(path: Path) -> Any:
    text = read_text(path)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON ({error.msg}, line {error.lineno}): correct it.") from error
    refuse_halves(text, value, str(path))
    return value


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, but None for NaN and infinities: JSON has none, and pandas writes them for empty cells."""
    return json.loads(text, parse_constant=lambda _: None)


def as_text(value: Any) -> str:
    """A cell as text; "" for None and for NaN, the empty cell of libraries without a None of their own."""
    return "" if value is None or value != value else str(value)


def may_mirror(value: Any) -> bool:
    """What a ``mirror`` column says: yes, unless it says no."""
    return str(value).strip().lower() not in ("false", "no", "0", "0.0")


def refuse_halves(text: str, value: Any, where: str) -> None:
    """ConfigError for what JSON can escape and no file or tokenizer can take: one half of a surrogate pair."""
    if "\\ud" not in text.lower():
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ConfigError(f"{where} holds {half}, which is half of a character: write that text anew.") from error


def read_jsonl(path: Path) -> Iterator[Row]:
    """Objects, one a line, with their line numbers."""
    # Not splitlines(): JSON strings may hold other line separators than the newline.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} line {number} is not JSON ({error.msg}): correct that line.") from error
        if not isinstance(row, dict):
            raise ConfigError(f'{path} line {number} must be an object like {{"file_name": ..., "text": ...}}.')
        refuse_halves(line, row, f"{path} line {number}")
        yield number, row


def read_csv(path: Path) -> Iterator[Row]:
    """Rows with the number of their last line. Quoted fields may hold line breaks; ConfigError for unquoted commas."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if any(row.pop(None, ())):  # the columns beyond the last name: a text was cut at a comma, others shifted
                raise ConfigError(
                    f"{path} line {reader.line_num} has more columns than the first line names: put texts that have "
                    "commas in double quotes."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num} is no CSV ({error}): correct it.") from error


def inside(id: str) -> str:
    """A pair's id as a relative path that cannot leave the folder that it is written into."""
    return "/".join("_" if part in ("/", "..") else part for part in PurePosixPath(id).parts) or "_"


def split_of(*names: str) -> str | None:
    """The split that a name begins with (``train-00000``, ``validation``): that of the first name that has one."""
    for name in names:
        word = re.split(r"[-_.]", name.lower())[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def walk_photos(root: Path) -> list[Path]:
    """Every photo at any depth, sorted; links are followed, but no folder is entered twice.

    None where there is no such folder; ConfigError for one that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror}): allow it, or take it out.") from error

    photos: list[Path] = []
    entered = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse) if root.is_dir() else ():
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in entered:
            subfolders.clear()  # a link that leads back
            continue
        entered.add((stat.st_dev, stat.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        photos += [Path(folder, name) for name in names if is_photo_name(name)]
    return sorted(photos)


def is_photo_name(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(PHOTO_SUFFIXES)


def find(folder: Path, name: str) -> Path | None:
    """The file ``name`` in ``folder``, also where Unicode form or case differ (archives of other systems).

    None if there is none, or if the name could mean two files.
    """
    exact = folder / name
    try:
        if exact.is_file() or exact.is_symlink():
            return exact
    except OSError:  # a name too long for this file system
        return None
    if not exact.parent.is_dir():
        return None
    # The folder's time in the key: a file added later is seen.
    matches = _spellings(exact.parent, exact.parent.stat().st_mtime_ns).get(_folded(exact.name), [])
    return exact.parent / matches[0] if len(matches) == 1 else None


@lru_cache(maxsize=64)
def _spellings(folder: Path, changed: int) -> dict[str, list[str]]:
    spellings: dict[str, list[str]] = {}
    for name in os.listdir(folder):
        spellings.setdefault(_folded(name), []).append(name)
    return spellings


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
