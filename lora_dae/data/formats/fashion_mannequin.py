"""Fashion Mannequin pairs: the same garment on a mannequin and on a model.

    mannequin/<id>.jpg    the source photo
    model/<id>.jpg        the photo to learn
    mask/<id>.png         the garment in model/<id>.jpg, white on black; all ids or none
    captions.jsonl        {"id": "<id>", "text": "a woman wearing a red plaid shirt"} a line, and where known
                          "category", "group_id" (one garment, several photos) and more attributes
    splits.json           {"train": ["<id>", ...], "val": [...], "test": [...]}; without it a split by group_id

Any image suffix will do. Ids are file names without suffix.
"""

from __future__ import annotations

import json
from pathlib import Path

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, FileBlob
from lora_dae.data.formats.files import read_json, read_jsonl, root_of, walk_photos
from lora_dae.data.formats.writing import Splits, every_pair, needs_source, save_image, save_json, save_lines


def read(cfg: DataConfig) -> list[Entry]:
    root = root_of(cfg)
    models, mannequins, masks = (_by_id(root / name) for name in ("model", "mannequin", "mask"))
    if not models or not mannequins:
        raise ConfigError(f"data.root={root} needs photos in both mannequin/ and model/: see data=fashion_mannequin.")
    alone = sorted(models.keys() ^ mannequins.keys())
    if alone:
        lacking = "mannequin" if alone[0] in models else "model"
        raise ConfigError(f"{root} has no {lacking}/ photo of {alone[0]} ({len(alone)} such ids): add or remove them.")
    known = dict(_captions(root / "captions.jsonl")) if (root / "captions.jsonl").is_file() else {}
    split_of: dict[str, str] = {}
    if (root / "splits.json").is_file():
        split_of = {str(i): split for split, ids in read_json(root / "splits.json").items() for i in ids}
        unplaced = next((i for i in models if i not in split_of), None)
        if unplaced is not None:
            raise ConfigError(f"{root / 'splits.json'} does not say where {unplaced} belongs: add it to a split.")
    entries = []
    for id, model in models.items():
        row = known.get(id, {})
        text = row.get("text", "").strip()
        entries.append(
            Entry(
                id=id,
                group_id=row.get("group_id") or id,
                captions=(text,) if text else (),
                image=FileBlob(model),
                where=f"{root} {id}",
                source=FileBlob(mannequins[id]),
                mask=FileBlob(masks[id]) if id in masks else None,
                category=row.get("category"),
                attributes={k: v for k, v in row.items() if k not in ("id", "text", "group_id", "category")},
                split=split_of.get(id),
            )
        )
    return entries


def write(splits: Splits, root: Path) -> None:
    needs_source("fashion_mannequin", splits)
    lines, ids = [], {split: [] for split in splits}  # type: ignore[var-annotated]
    for split, pair in every_pair(splits):
        save_image(root / "mannequin" / f"{pair.id}.jpg", pair.source)
        save_image(root / "model" / f"{pair.id}.jpg", pair.image)
        if pair.mask is not None:
            save_image(root / "mask" / f"{pair.id}.png", pair.mask)
        row = {"id": pair.id, "text": pair.caption, "group_id": pair.group_id, **(pair.attributes or {})}
        lines.append(json.dumps(row | ({"category": pair.category} if pair.category else {}), ensure_ascii=False))
        ids[split].append(pair.id)
    save_lines(root / "captions.jsonl", lines)
    save_json(root / "splits.json", ids)


def _by_id(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in walk_photos(folder)}


def _captions(path: Path) -> list[tuple[str, dict[str, str]]]:
    rows = []
    for number, row in read_jsonl(path):
        if "id" not in row:
            raise ConfigError(f"{path} line {number} has no id: every line names its photo.")
        rows.append((str(row["id"]), {k: str(v) for k, v in row.items() if v is not None}))
    return rows
