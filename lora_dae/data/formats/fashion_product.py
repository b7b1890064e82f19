"""Fashion Product Images (Kaggle, paramaggarwal), 44,446 photos of products; the licence differs between mirrors.

    images/<id>.jpg
    styles.csv    id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage,productDisplayName

The last column may hold commas without quotes. It is the caption; the others are attributes for
``'data.captions.template="a photo of a {baseColour} {articleType} for {gender}"'``.
"""

from __future__ import annotations

from pathlib import Path

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, FileBlob
from lora_dae.data.formats.files import read_text, root_of
from lora_dae.data.formats.writing import Splits, every_pair, save_image, save_lines

NOTICE = "Fashion Product Images: the mirrors name different licences; check the one that you have"
COLUMNS = (
    "id", "gender", "masterCategory", "subCategory", "articleType", "baseColour", "season", "year", "usage",
    "productDisplayName",
)  # fmt: skip


def read(cfg: DataConfig) -> list[Entry]:
    root = root_of(cfg)
    lines = read_text(root / "styles.csv").split("\n")  # titles may hold other line separators
    if not lines or tuple(lines[0].strip().split(",")) != COLUMNS:
        raise ConfigError(f"{root / 'styles.csv'} must begin with the line {','.join(COLUMNS)}.")
    entries = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        values = line.split(",", len(COLUMNS) - 1)
        where = f"{root / 'styles.csv'} line {number}"
        if len(values) < len(COLUMNS) - 1:
            raise ConfigError(f"{where} has {len(values)} columns instead of {len(COLUMNS)}: correct it.")
        row = {name: value.strip().strip('"') for name, value in zip(COLUMNS, [*values, ""], strict=False)}
        words = {name: value for name, value in row.items() if value and value not in ("NA", "nan")}
        title = words.get("productDisplayName", "")
        entries.append(
            Entry(
                id=row["id"],
                group_id=row["id"],
                captions=(title,) if title else (),
                image=FileBlob(root / "images" / f"{row['id']}.jpg"),
                where=where,
                category=words.get("articleType"),
                attributes={k: v.lower() for k, v in words.items() if k not in ("id", "productDisplayName")},
            )
        )
    return entries


def write(splits: Splits, root: Path) -> None:
    """Source photos, masks and splits are not part of the layout."""
    lines = [",".join(COLUMNS)]
    for number, (_, pair) in enumerate(every_pair(splits)):
        id, known = str(10_000 + number), pair.attributes or {}
        save_image(Path(root / "images" / f"{id}.jpg"), pair.image)
        garment = (pair.category or "clothes").title()
        color = known.get("color", "NA").title()
        fields = [id, "Women", "Apparel", "Topwear", garment, color, "Summer", "2025", "Casual"]
        lines.append(",".join([*fields, pair.caption]))
    save_lines(root / "styles.csv", lines)
