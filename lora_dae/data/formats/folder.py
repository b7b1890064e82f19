"""A folder of photos with captions, in the layouts that trainers share.

* ``metadata.jsonl`` or ``metadata.csv`` (Hugging Face imagefolder): ``file_name`` and ``text``, and where there is
  more to say ``captions`` (a list), ``category``, ``group_id``, ``source``, ``mask``, ``split`` and ``mirror``.
  Any other column becomes an attribute for caption templates. Files lie relative to the folder or its ``images/``.
  It, or the photos that it lists, may also lie in folders named after the splits (``train/``, ``validation/`` or
  ``val/``, ``test/``).
* no metadata: every photo ``x.jpg``, at any depth, has its caption beside it in ``x.txt`` or ``x.caption``.
* folders named like ``10_red dress`` (kohya): its photos come ten times a pass; "red dress" is their caption where
  they have none of their own.

In all of them the folders ``source/`` and ``mask/`` may hold, under the photo's own name (any image suffix), the
photo that steers it and its garment mask.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, FileBlob, spelled
from lora_dae.data.formats.files import (
    PHOTO_SUFFIXES,
    SPLIT_NAMES,
    Row,
    find,
    inside,
    may_mirror,
    read_csv,
    read_jsonl,
    read_text,
    root_of,
    walk_photos,
)
from lora_dae.data.formats.shards import mirrors
from lora_dae.data.formats.writing import Splits, free_attributes, save_image, save_lines

SIBLINGS = ("source", "mask")
COLUMNS = ("file_name", "text", "captions", "category", "group_id", "source", "mask", "split", "mirror")
REPEATS = re.compile(r"(\d+)_(.+)")


def read(cfg: DataConfig) -> list[Entry]:
    """What the folder lists, in its own order; raises ConfigError for a wrong table or a missing caption."""
    root = root_of(cfg)
    tables = _tables(root) or [table for split in SPLIT_NAMES for table in _tables(root, split)]
    if not tables:
        return _from_sidecars(root, cfg)
    entries = [entry for table, split in tables for entry in _from_metadata(root, table, split, cfg)]
    if not entries:
        raise ConfigError(f"{tables[0][0]} lists no photos: add one line for each.")
    return entries


def _tables(root: Path, split: str = "") -> list[tuple[Path, str]]:
    """The metadata of ``root/split``, jsonl before csv, with that split's name; empty where there is none."""
    found = (root / split / name for name in ("metadata.jsonl", "metadata.csv"))
    return [(path, split) for path in found if path.is_file()][:1]


def may_lack_caption(cfg: DataConfig) -> bool:
    """Whether something later fills captions in."""
    return cfg.captions.missing != "error" or cfg.captions.template is not None or cfg.captions.file is not None


def _from_metadata(root: Path, table: Path, folder: str, cfg: DataConfig) -> list[Entry]:
    """The lines of ``table``, whose files lie in ``root/folder``; ids are relative to ``root``."""
    entries: list[Entry] = []
    seen: set[str] = set()
    rows: Iterator[Row] = (read_jsonl if table.suffix == ".jsonl" else read_csv)(table)
    for number, row in rows:
        where = f"{table} line {number}"
        text = {column: _word(row.get(column)) for column in COLUMNS}
        file_name, captions = text["file_name"], _captions(row)
        lacking = "file_name" if not file_name else "text" if not captions and not may_lack_caption(cfg) else None
        if lacking:
            have = ", ".join(str(key) for key in row) or "nothing"
            raise ConfigError(f"{where} has no {lacking} (it has {have}): every line needs file_name and text.")
        at = root / folder
        source, mask = (
            FileBlob(_locate(at, text[part])) if text[part] else _sibling(at, part, file_name) for part in SIBLINGS
        )
        split = text["split"] or folder
        if split and split not in SPLIT_NAMES:
            raise ConfigError(f"{where} has the split {split}: use train, val or test.")
        name = f"{folder}/{file_name}" if folder else file_name
        # Names of source photos may begin anew in each split: the path tells them apart.
        shared = posixpath.normpath(posixpath.join(folder, text["source"])) if text["source"] else name
        entries.append(
            Entry(
                # A photo may be listed more than once, with other captions.
                id=f"{name}#{number}" if name in seen else name,
                # Photos of one garment share its source photo, and must not be split over train and test.
                group_id=text["group_id"] or shared,
                captions=captions,
                image=FileBlob(_locate(at, file_name)),
                where=where,
                source=source,
                mask=mask,
                category=text["category"] or None,
                attributes={str(k): _word(v) for k, v in row.items() if k not in COLUMNS and _word(v)},
                split=SPLIT_NAMES.get(split) or _split_in(file_name),
                mirror=may_mirror(text["mirror"]),
            )
        )
        seen.add(name)
    return entries


def _from_sidecars(root: Path, cfg: DataConfig) -> list[Entry]:
    beside = tuple(root / part for part in SIBLINGS)
    photos = [path for path in walk_photos(root) if not any(path.is_relative_to(folder) for folder in beside)]
    if not photos:
        raise ConfigError(f"data.root={root} holds no photos ({', '.join(PHOTO_SUFFIXES)}): put some there.")
    captions = [_sidecar(photo, required=not may_lack_caption(cfg)) for photo in photos]
    if not any(captions) and not may_lack_caption(cfg) and not any(REPEATS.fullmatch(p.parent.name) for p in photos):
        raise ConfigError(
            f"data.root={root} holds {len(photos)} photos but no captions: add metadata.jsonl or "
            "metadata.csv (file_name, text), a .txt beside each photo, or set data.captions.missing=file_name."
        )
    entries = []
    for photo, caption in zip(photos, captions, strict=True):
        name = photo.relative_to(root).as_posix()
        id = spelled(name)
        repeated = REPEATS.fullmatch(photo.parent.name) if photo.parent != root else None
        if caption is None and repeated:
            caption = repeated[2].replace("_", " ")
        if caption is None and not may_lack_caption(cfg):
            raise ConfigError(f"{photo} has no caption: write {photo.with_suffix('.txt').name} beside it.")
        entries.append(
            Entry(
                id=id,
                group_id=id,
                captions=(caption,) if caption else (),
                image=FileBlob(photo),
                where=id,
                source=_sibling(root, "source", name),
                mask=_sibling(root, "mask", name),
                split=_split_in(name),
                repeats=int(repeated[1]) if repeated else 1,
            )
        )
    return entries


def _split_in(name: str) -> str | None:
    """The split that the first folder of a path is named after."""
    first = next(iter(PurePosixPath(name).parts[:-1]), "")
    return SPLIT_NAMES.get(first.lower())


def _sidecar(photo: Path, required: bool) -> str | None:
    """The caption beside a photo; an empty file counts as none, or raises ConfigError where captions are required."""
    for suffix in (".txt", ".caption"):
        sidecar = photo.with_suffix(suffix)
        if sidecar.is_file():
            caption = " ".join(read_text(sidecar).split())
            if caption:
                return caption
            if required:
                raise ConfigError(f"{sidecar} is empty: write the caption of {photo.name} into it.")
    return None


def _captions(row: dict[str, Any]) -> tuple[str, ...]:
    """``text`` (a string, or a list) and then ``captions``, without empty ones and repetitions."""
    given: list[Any] = []
    for column in ("text", "captions"):
        value = row.get(column)
        given += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(word for word in map(_word, given) if word))


def _word(value: Any) -> str:
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _locate(root: Path, name: str) -> Path:
    """Where the file is, or would be: what is missing is told with the other unusable files."""
    return find(root, name) or find(root / "images", name) or root / name


def _sibling(root: Path, part: str, name: str) -> FileBlob | None:
    """``source/x.jpg`` or ``mask/x.png`` of the photo ``x.jpg`` or ``images/x.jpg``."""
    relative = Path(name)
    if relative.is_absolute():  # joined to a folder it would be the photo itself
        relative = Path(relative.name)
    if not (root / part).is_dir():
        return None
    if relative.parts[0] == "images":
        relative = relative.relative_to("images")
    for suffix in dict.fromkeys((relative.suffix, ".png", *PHOTO_SUFFIXES)):
        found = find(root / part, str(relative.with_suffix(suffix)))
        if found is not None:
            return FileBlob(found)
    return None


def write(splits: Splits, root: Path) -> None:
    """images/, source/, mask/ and metadata.jsonl with the splits."""
    lines = []
    for split, pairs in splits.items():
        for index in range(len(pairs)):
            pair = pairs[index]
            name = f"{inside(pair.id)}.png"
            save_image(root / "images" / name, pair.image)
            for part in SIBLINGS:
                if getattr(pair, part) is not None:
                    save_image(root / part / name, getattr(pair, part))
            row: dict[str, Any] = {"file_name": f"images/{name}", "text": pair.caption, "split": split}
            row |= {"group_id": pair.group_id, **free_attributes(pair, COLUMNS)}
            if len(pair.captions) > 1:
                row["captions"] = pair.captions
            if pair.category:
                row["category"] = pair.category
            if not mirrors(pairs, index):
                row["mirror"] = False
            lines.append(json.dumps(row, ensure_ascii=False))
    save_lines(root / "metadata.jsonl", lines)
