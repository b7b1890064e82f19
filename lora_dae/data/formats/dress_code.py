"""Dress Code (Morelli et al. 2022): dresses, upper and lower body, 1024 x 768; academic use only.

    {dresses,upper_body,lower_body}/train_pairs.txt, test_pairs_paired.txt    "013563_0.jpg 013563_1.jpg" a line
    {...}/images/013563_0.jpg        the model: the photo to learn
    {...}/images/013563_1.jpg        the garment: the source
    {...}/label_maps/013563_4.png    18 classes; 4 upper, 5 skirt, 6 pants, 7 dress are the mask

Captions come from ``fine_captions.json`` and ``coarse_captions.json`` at the root (Multimodal Garment Designer: id
-> phrases; coarse ones win, fine ones count from three on) and from ``dc_caption.txt`` in a category (IDM-VTON: file
name, then free text). ``data.category`` chooses one of the three.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, FileBlob
from lora_dae.data.formats.files import read_json, read_text, root_of
from lora_dae.data.formats.label_map import mask_of_classes
from lora_dae.data.formats.writing import Splits, every_pair, needs_source, save_image, save_json, save_lines

NOTICE = "Dress Code: for academic, non-commercial research under YNAP's terms"
GARMENT_CLASSES = {"dresses": (7,), "upper_body": (4,), "lower_body": (5, 6)}
PAIRS = {"train": "train_pairs.txt", "test": "test_pairs_paired.txt"}
FEWEST_FINE = 3
LOWER = ("skirt", "pants", "trousers", "jeans", "shorts", "leggings")


def read(cfg: DataConfig) -> list[Entry]:
    root = root_of(cfg)
    if cfg.category is not None and cfg.category not in GARMENT_CLASSES:
        raise ConfigError(f"data.category={cfg.category} is unknown: use one of {', '.join(GARMENT_CLASSES)}.")
    phrases = _phrases(root)
    entries = []
    for category in [cfg.category] if cfg.category else list(GARMENT_CLASSES):
        folder = root / category
        spoken = _free_text(folder / "dc_caption.txt")
        for split, name in PAIRS.items():
            if (folder / name).is_file():
                for number, line in enumerate(read_text(folder / name).splitlines(), start=1):
                    if line.strip():
                        where = f"{folder / name} line {number}"
                        entries.append(_entry(folder, split, line.split(), where, phrases, spoken))
    if not entries:
        raise ConfigError(f"data.root={root} has no <category>/{PAIRS['train']} with lines: is it Dress Code?")
    return entries


def _entry(
    folder: Path, split: str, columns: list[str], where: str, phrases: dict[str, list[str]], spoken: dict[str, str]
) -> Entry:
    if len(columns) < 2:
        raise ConfigError(f"{where} must name two photos, the model's and the garment's.")
    model, garment = columns[:2]
    id = model.partition("_")[0]
    said = phrases.get(id, [])
    captions = [said if isinstance(said, str) else ", ".join(said)] if said else []
    captions += [spoken[name] for name in (model, garment) if name in spoken]
    labels = folder / "label_maps" / f"{id}_4.png"
    return Entry(
        id=f"{folder.name}/{id}",
        group_id=f"{folder.name}/{garment.partition('_')[0]}",
        captions=tuple(captions),
        image=FileBlob(folder / "images" / model),
        where=where,
        source=FileBlob(folder / "images" / garment),
        mask=mask_of_classes(labels, GARMENT_CLASSES[folder.name]) if labels.is_file() else None,
        category=folder.name,
        split=split,
    )


def _phrases(root: Path) -> dict[str, list[str]]:
    fine = read_json(root / "fine_captions.json") if (root / "fine_captions.json").is_file() else {}
    coarse = read_json(root / "coarse_captions.json") if (root / "coarse_captions.json").is_file() else {}
    enough = {key: words for key, words in fine.items() if len(words) >= FEWEST_FINE}
    return {key.partition("_")[0]: words for key, words in {**enough, **coarse}.items()}


def _free_text(path: Path) -> dict[str, str]:
    lines = read_text(path).splitlines() if path.is_file() else []
    rows = [line.strip().split(maxsplit=1) for line in lines]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def write(splits: Splits, root: Path) -> None:
    """Validation pairs go with the training pairs: the layout has two splits."""
    needs_source("dress_code", splits)
    phrases: dict[str, list[str]] = {}
    lines: dict[Path, list[str]] = {}
    for number, (split, pair) in enumerate(every_pair(splits)):
        category = "dresses" if pair.category == "dress" else "lower_body" if pair.category in LOWER else "upper_body"
        folder, id = root / category, f"{number:06d}"
        save_image(folder / "images" / f"{id}_0.jpg", pair.image)
        save_image(folder / "images" / f"{id}_1.jpg", pair.source)
        if pair.mask is not None:
            labels = np.where(pair.mask > 0, GARMENT_CLASSES[category][0], 0).astype(np.uint8)
            (folder / "label_maps").mkdir(exist_ok=True)
            Image.fromarray(labels).convert("P").save(folder / "label_maps" / f"{id}_4.png")
        phrases[id] = [pair.caption]
        lines.setdefault(folder / PAIRS["test" if split == "test" else "train"], []).append(f"{id}_0.jpg {id}_1.jpg")
    save_json(root / "coarse_captions.json", phrases)
    for path, rows in lines.items():
        save_lines(path, rows)
