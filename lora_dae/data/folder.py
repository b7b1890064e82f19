"""Pairs from a folder of photos with captions.

Two layouts are read:

* ``metadata.jsonl`` or ``metadata.csv`` with the columns ``file_name`` and ``text``, and where there is
  more to say ``category``, ``group_id``, ``source`` and ``mask``. Files lie relative to the folder or to
  its ``images/``.
* no metadata: every photo ``x.jpg`` (at any depth) has its caption beside it in ``x.txt``.

Photos become squares as ``data.square`` describes.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.pair import Pair
from lora_dae.data.square import fit_mask, fit_square, has_plain_backdrop, upright_rgb

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
OPTIONAL_COLUMNS = ("category", "group_id", "source", "mask")


@dataclass(frozen=True)
class Entry:
    """One line of the metadata with its files found; ``where`` says which line, for error messages."""

    id: str
    group_id: str
    caption: str
    image: Path
    where: str
    source: Path | None = None
    mask: Path | None = None
    category: str | None = None


class FolderPairs:
    """One split of a folder: a data set of ``Pair`` whose photos are decoded when asked for."""

    def __init__(self, entries: list[Entry], resolution: int) -> None:
        self.entries = entries
        self.resolution = resolution
        self.has_source = bool(entries) and entries[0].source is not None
        self.has_mask = bool(entries) and entries[0].mask is not None
        self.fingerprint = _fingerprint(entries, resolution)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """The pair at ``index``. Raises ConfigError that names the file if a photo cannot be decoded."""
        entry, resolution = self.entries[index], self.resolution
        photo = _decode(entry.image, resolution)
        # One decision for the whole pair, so that photos which are aligned stay aligned.
        whole = has_plain_backdrop(photo)
        source = None if entry.source is None else _decode(entry.source, resolution)
        mask = None if entry.mask is None else _decode(entry.mask, resolution)
        return Pair(
            id=entry.id,
            group_id=entry.group_id,
            caption=entry.caption,
            image=fit_square(photo, resolution, whole),
            source=None if source is None else fit_square(source, resolution, whole),
            mask=None if mask is None else fit_mask(mask, photo, resolution, whole),
            category=entry.category,
        )


def load_folder(cfg: DataConfig) -> dict[str, FolderPairs]:
    """The splits ``train``, ``val`` and ``test`` of the folder ``cfg.root``.

    Every caption and every file's existence and image header is checked here, before anything is
    decoded. Raises ConfigError, in one sentence, at the first thing that is wrong.
    """
    if cfg.root is None:
        raise ConfigError("data=folder needs a folder of photos: give data.root=<folder>.")
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise ConfigError(f"data.root={cfg.root} is not a folder: give a folder of photos with captions.")
    entries = read_folder(root)[: cfg.max_images]
    for column in ("source", "mask"):
        _check_all_or_none(entries, column)
    for entry in entries:
        for path in (entry.image, entry.source, entry.mask):
            if path is not None:
                _check_header(path)
    parts = split_entries(entries, cfg.val_fraction, cfg.test_fraction, cfg.seed)
    if not all(parts.values()):
        groups = len({entry.group_id for entry in entries})
        raise ConfigError(
            f"data.root={cfg.root} has too few different photos ({groups}) to train, validate and test on: "
            "at least 3 are needed."
        )
    return {name: FolderPairs(part, cfg.resolution) for name, part in parts.items()}


def read_folder(root: Path) -> list[Entry]:
    """What the folder lists, in its own order; raises ConfigError for missing files and captions."""
    for name, rows in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
        if (root / name).is_file():
            entries = _from_metadata(root, name, rows(root / name))
            if not entries:
                raise ConfigError(f"{root / name} lists no photos: add one line for each.")
            return entries
    return _from_sidecars(root)


def split_entries(entries: list[Entry], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[Entry]]:
    """Splits by a hash of (seed, group id), so that a group keeps its split when photos are added.

    A split that the hash would leave empty gets the group next in line, so three groups are enough; with
    fewer, a split stays empty.
    """
    place = {entry.group_id: _unit_hash(f"{seed}:{entry.group_id}") for entry in entries}
    groups = sorted(place, key=lambda group: place[group])
    tests = max(1, sum(place[group] < test_fraction for group in groups))
    tests = min(tests, len(groups) - 2)
    held_out = max(tests + 1, sum(place[group] < test_fraction + val_fraction for group in groups))
    held_out = min(held_out, len(groups) - 1)
    test, val = set(groups[:tests]), set(groups[tests:held_out])
    return {
        "train": [entry for entry in entries if entry.group_id not in test | val],
        "val": [entry for entry in entries if entry.group_id in val],
        "test": [entry for entry in entries if entry.group_id in test],
    }


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} line {number} is not JSON ({error.msg}): correct that line.") from error
        if not isinstance(row, dict):
            raise ConfigError(f'{path} line {number} must be an object like {{"file_name": ..., "text": ...}}.')
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(_read_text(path).splitlines())
    for row in reader:
        yield reader.line_num, row


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error


def _from_metadata(root: Path, name: str, rows: Iterator[tuple[int, dict[str, Any]]]) -> list[Entry]:
    entries: list[Entry] = []
    seen: set[str] = set()
    for number, row in rows:
        where = f"{root / name} line {number}"
        fields = {}
        for column in ("file_name", "text", *OPTIONAL_COLUMNS):
            value = row.get(column)
            value = str(value).strip() if isinstance(value, str | int) else ""
            if not value and column in ("file_name", "text"):
                have = ", ".join(str(key) for key in row) or "nothing"
                raise ConfigError(f"{where} has no {column} (it has {have}): every line needs file_name and text.")
            fields[column] = value or None
        file_name = str(fields["file_name"])
        source, mask = (
            None if fields[column] is None else _find(root, str(fields[column]), f"{where} ({column})")
            for column in ("source", "mask")
        )
        entries.append(
            Entry(
                # A photo may be listed more than once, with other captions.
                id=f"{file_name}#{number}" if file_name in seen else file_name,
                # Photos of one garment share its source photo, and must not be split over train and test.
                group_id=fields["group_id"] or fields["source"] or file_name,
                caption=str(fields["text"]),
                image=_find(root, file_name, where),
                where=where,
                source=source,
                mask=mask,
                category=fields["category"],
            )
        )
        seen.add(file_name)
    return entries


def _from_sidecars(root: Path) -> list[Entry]:
    photos = sorted(
        path for path in root.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".")
    )
    if not photos:
        raise ConfigError(f"data.root={root} holds no photos ({', '.join(PHOTO_SUFFIXES)}): put some there.")
    if not any(photo.with_suffix(".txt").is_file() for photo in photos):
        raise ConfigError(
            f"data.root={root} holds {len(photos)} photos but no captions: add metadata.jsonl or "
            "metadata.csv (file_name, text), or a .txt beside each photo."
        )
    entries = []
    for photo in photos:
        sidecar, name = photo.with_suffix(".txt"), photo.relative_to(root).as_posix()
        if not sidecar.is_file():
            raise ConfigError(f"{photo} has no caption: write {sidecar.name} beside it.")
        caption = " ".join(_read_text(sidecar).split())
        if not caption:
            raise ConfigError(f"{sidecar} is empty: write the caption of {photo.name} into it.")
        entries.append(Entry(id=name, group_id=name, caption=caption, image=photo, where=str(sidecar)))
    return entries


def _find(root: Path, name: str, where: str) -> Path:
    for path in (root / name, root / "images" / name):
        if path.is_file():
            return path
    raise ConfigError(
        f"{where} names {name}, which is neither in {root} nor in its images/: add it or remove the line."
    )


def _check_all_or_none(entries: list[Entry], column: str) -> None:
    without = [entry for entry in entries if getattr(entry, column) is None]
    if without and len(without) < len(entries):
        raise ConfigError(f"{without[0].where} has no {column} but other lines do: give one to all lines or none.")


def _check_header(path: Path) -> None:
    """Reads the first bytes only; what is broken further in shows when the photo is decoded."""
    try:
        with Image.open(path):
            pass
    except (OSError, Image.DecompressionBombError) as error:
        raise _unreadable(path) from error


def _decode(path: Path, resolution: int) -> Image.Image:
    try:
        with Image.open(path) as photo:
            photo.draft("RGB", (2 * resolution, 2 * resolution))  # large JPEGs decode at a fraction of their size
            return upright_rgb(photo)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path) from error


def _unreadable(path: Path) -> ConfigError:
    what = "is empty" if path.stat().st_size == 0 else "cannot be read as an image"
    return ConfigError(f"{path} {what}: replace it or take it out of the data.")


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _fingerprint(entries: list[Entry], resolution: int) -> str:
    """Changes with a file's name, size or modification time, a caption, the resolution or the order."""
    digest = hashlib.sha256(f"folder:{resolution}".encode())
    for entry in entries:
        files = [path for path in (entry.image, entry.source, entry.mask) if path is not None]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        digest.update(repr((entry.id, entry.caption, stats)).encode())
    return digest.hexdigest()
