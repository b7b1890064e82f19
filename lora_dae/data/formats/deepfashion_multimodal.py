"""DeepFashion-MultiModal (Jiang et al. 2022), 44,096 photos, 750 x 1101; non-commercial research.

    images/MEN-Denim-id_00000080-01_7_additional.jpg
    captions.json                     file name -> text
    segm/*_segm.png                   24 classes; tops, outer, skirt, dress, pants, leggings, rompers are the mask

Several photos show one garment (``MEN-Denim-id_00000080``): splits go by it. Masks are used where every photo that
is used has one (12,701 of the published ones do).
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, FileBlob, spelled
from lora_dae.data.formats.files import as_text, read_json, root_of, walk_photos
from lora_dae.data.formats.label_map import mask_of_classes
from lora_dae.data.formats.writing import Splits, every_pair, save_image, save_json

NOTICE = "DeepFashion-MultiModal: for non-commercial research"
GARMENT_CLASSES = (1, 2, 3, 4, 5, 6, 21)
NAME = re.compile(r"((MEN|WOMEN)-(.+)-id_\d+)-.+")


def read(cfg: DataConfig) -> list[Entry]:
    root = root_of(cfg)
    photos = walk_photos(root / "images")
    if not photos:
        raise ConfigError(f"data.root={root} has no photos in images/: is it DeepFashion-MultiModal?")
    captions = read_json(root / "captions.json") if (root / "captions.json").is_file() else {}
    segmented = [root / "segm" / f"{photo.stem}_segm.png" for photo in photos]
    masked = all(path.is_file() for path in segmented)
    entries = []
    for photo, segments in zip(photos, segmented, strict=True):
        parts = NAME.fullmatch(photo.stem)
        if parts is None:
            raise ConfigError(f"{photo} is not named like MEN-Denim-id_00000080-01_7_additional.jpg: take it out.")
        text = as_text(captions.get(photo.name)).strip()
        category = parts[3].replace("_", " ").lower()
        entries.append(
            Entry(
                id=spelled(photo.name),
                group_id=parts[1],
                captions=(text,) if text else (),
                image=FileBlob(photo),
                where=str(photo),
                mask=mask_of_classes(segments, GARMENT_CLASSES) if masked else None,
                category=category,
                attributes={"gender": {"MEN": "male", "WOMEN": "female"}[parts[2]], "category": category},
            )
        )
    return entries


def write(splits: Splits, root: Path) -> None:
    """Source photos and splits are not part of the layout."""
    captions, groups, views = {}, {}, Counter()  # type: ignore[var-annotated]
    for _, pair in every_pair(splits):
        number = groups.setdefault(pair.group_id, len(groups))
        views[number] += 1
        gender = "MEN" if re.search(r"\bman\b", pair.caption) else "WOMEN"
        kind = (pair.category or "Clothes").title().replace(" ", "_")
        name = f"{gender}-{kind}-id_{number:08d}-{views[number]:02d}_1_front"
        save_image(root / "images" / f"{name}.jpg", pair.image)
        if pair.mask is not None:
            (root / "segm").mkdir(exist_ok=True)
            labels = Image.fromarray((pair.mask > 0).astype(np.uint8)).convert("P")
            labels.save(Path(root / "segm" / f"{name}_segm.png"))
        captions[f"{name}.jpg"] = pair.caption
    save_json(root / "captions.json", captions)
