"""Fashion Mannequin pairs: the same garment on a mannequin and on a model.

    mannequin/<id>.jpg    the source photo
    model/<id>.jpg        the photo to learn
    mask/<id>.png         the garment in model/<id>.jpg, white on black; all ids or none
    captions.jsonl        {"id": "<id>", "text": "a woman wearing a red plaid shirt"} a line, and where known
                          "category", "group_id" (one garment, several photos), "mirror" (false: never) and more
                          attributes; more lines of one id are more captions
    splits.json           {"train": ["<id>", ...], "val": [...], "test": [...]}; without it a split by group_id

Any image suffix will do. Ids are file names without suffix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, FileBlob, spelled
from lora_dae.data.formats.files import SPLIT_NAMES, inside, may_mirror, read_json, read_jsonl, root_of, walk_photos
from lora_dae.data.formats.shards import mirrors
from lora_dae.data.formats.writing import Splits, free_attributes, needs_source, save_image, save_json, save_lines

OWN = ("id", "text", "group_id", "category", "mirror")


def read(cfg: DataConfig) -> list[Entry]:
    root = root_of(cfg)
    models, mannequins, masks = (_by_id(root / name) for name in ("model", "mannequin", "mask"))
    if not models or not mannequins:
        raise ConfigError(f"data.root={root} needs photos in both mannequin/ and model/: see data=fashion_mannequin.")
    alone = sorted(models.keys() ^ mannequins.keys())
    if alone:
        lacking = "mannequin" if alone[0] in models else "model"
        raise ConfigError(f"{root} has no {lacking}/ photo of {alone[0]} ({len(alone)} such ids): add or remove them.")
    known, captions = _captions(root / "captions.jsonl") if (root / "captions.jsonl").is_file() else ({}, {})
    split_of = _splits(root / "splits.json", set(models)) if (root / "splits.json").is_file() else {}
    entries = []
    for id, model in models.items():
        row = known.get(id, {})
        entries.append(
            Entry(
                id=id,
                group_id=row.get("group_id") or id,
                captions=tuple(captions.get(id, ())),
                image=FileBlob(model),
                where=f"{root} {id}",
                source=FileBlob(mannequins[id]),
                mask=FileBlob(masks[id]) if id in masks else None,
                category=row.get("category"),
                attributes={k: v for k, v in row.items() if k not in OWN},
                split=split_of.get(id),
                mirror=may_mirror(row.get("mirror")),
            )
        )
    return entries


def write(splits: Splits, root: Path) -> None:
    needs_source("fashion_mannequin", splits)
    lines: list[str] = []
    ids: dict[str, list[str]] = {split: [] for split in splits}
    for split, pairs in splits.items():
        for index in range(len(pairs)):
            pair = pairs[index]
            id = inside(pair.id)
            save_image(root / "mannequin" / f"{id}.jpg", pair.source)
            save_image(root / "model" / f"{id}.jpg", pair.image)
            if pair.mask is not None:
                save_image(root / "mask" / f"{id}.png", pair.mask)
            row: dict[str, Any] = {"id": id, "text": pair.caption, "group_id": pair.group_id}
            row |= free_attributes(pair, OWN)
            if pair.category:
                row["category"] = pair.category
            if not mirrors(pairs, index):
                row["mirror"] = False
            rows = [row, *({"id": id, "text": text} for text in pair.captions[1:])]
            lines += [json.dumps(row, ensure_ascii=False) for row in rows]
            ids[split].append(id)
    save_lines(root / "captions.jsonl", lines)
    save_json(root / "splits.json", ids)


def _by_id(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in walk_photos(folder):
        id = spelled(path.relative_to(folder).with_suffix("").as_posix())
        if id in found:
            raise ConfigError(f"{path} and {found[id].name} have one id, {id}: rename or remove one of them.")
        found[id] = path
    return found


def _captions(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """What each id's first line says, and its different texts in order."""
    known: dict[str, dict[str, str]] = {}
    texts: dict[str, list[str]] = {}
    for number, row in read_jsonl(path):
        if row.get("id") is None:
            raise ConfigError(f"{path} line {number} has no id: every line names its photo.")
        words = {k: str(v).strip() for k, v in row.items() if v is not None}
        known.setdefault(words["id"], words)
        said = texts.setdefault(words["id"], [])
        if words.get("text") and words["text"] not in said:
            said.append(words["text"])
    return known, texts


def _splits(path: Path, ids: set[str]) -> dict[str, str]:
    """id -> split; every one of ``ids`` is in exactly one."""
    table = read_json(path)
    if not isinstance(table, dict) or not all(isinstance(row, list) for row in table.values()):
        raise ConfigError(f'{path} must be an object of lists like {{"train": ["<id>"], "val": [], "test": []}}.')
    split_of: dict[str, str] = {}
    for split, members in table.items():
        if split not in SPLIT_NAMES:
            raise ConfigError(f"{path} has the split {split}: use train, val and test.")
        for id in map(str, members):
            if id in split_of:
                raise ConfigError(f"{path} names {id} twice: a photo belongs to one split.")
            split_of[id] = SPLIT_NAMES[split]
    unplaced = sorted(ids - split_of.keys())
    if unplaced:
        raise ConfigError(f"{path} does not say where {unplaced[0]} belongs: add it to a split.")
    return split_of
