"""VITON-HD (Choi et al. 2021), upper garments, 1024 x 768; CC BY-NC 4.0, research only.

    train_pairs.txt, test_pairs.txt       "00006_00.jpg 08348_00.jpg" a line
    {train,test}/image/00006_00.jpg       the photo to learn
    {train,test}/cloth/00006_00.jpg       its garment, flat: the source
    {train,test}/image-parse-v3/*.png     LIP classes; 5, 6 and 7 (upper clothes, dress, coat) are the mask

Paired protocol: a person goes with the garment of the same name; the second column, another garment for try-on
without ground truth, is ignored. Captions come from ``captions.json`` (Multimodal Garment Designer: garment id ->
phrases) or ``vitonhd_{train,test}_tagged.json`` (IDM-VTON), at the root or in the split's folder.
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

NOTICE = "VITON-HD: CC BY-NC 4.0, for research only"
GARMENT_CLASSES = (5, 6, 7)
TAGS = ("sleeveLength", "neckLine", "item")


def read(cfg: DataConfig) -> list[Entry]:
    root = root_of(cfg)
    phrases = read_json(root / "captions.json") if (root / "captions.json").is_file() else {}
    entries = []
    for split in ("train", "test"):
        if not (root / f"{split}_pairs.txt").is_file():
            continue
        tags = _tags(root, split)
        parses = (root / split / "image-parse-v3").is_dir()
        for number, line in enumerate(read_text(root / f"{split}_pairs.txt").splitlines(), start=1):
            if not line.strip():
                continue
            name = line.split()[0]
            garment = name.partition("_")[0]
            spoken = phrases.get(garment, [])
            if isinstance(spoken, str):
                spoken = [spoken]
            captions = [", ".join(spoken)] if spoken else []
            if name in tags:
                words = [tags[name][tag] for tag in TAGS if tag in tags[name]]
                captions.append(f"model is wearing a {' '.join(words)}")
            parse = root / split / "image-parse-v3" / f"{Path(name).stem}.png"
            entries.append(
                Entry(
                    id=f"{split}/{name}",
                    group_id=garment,
                    captions=tuple(captions),
                    image=FileBlob(root / split / "image" / name),
                    where=f"{root / f'{split}_pairs.txt'} line {number}",
                    source=FileBlob(root / split / "cloth" / name),
                    mask=mask_of_classes(parse, GARMENT_CLASSES) if parses and parse.is_file() else None,
                    category=tags.get(name, {}).get("item", "upper body garment"),
                    attributes=tags.get(name, {}),
                    split=split,
                )
            )
    if not entries:
        raise ConfigError(f"data.root={root} has no train_pairs.txt or test_pairs.txt with lines: is it VITON-HD?")
    return entries


def _tags(root: Path, split: str) -> dict[str, dict[str, str]]:
    """Photo -> tag -> word, of IDM-VTON's file."""
    name = f"vitonhd_{split}_tagged.json"
    path = next((p for p in (root / name, root / split / name) if p.is_file()), None)
    found: dict[str, dict[str, str]] = {}
    if path is not None:
        for shots in read_json(path).values():
            for shot in shots:
                named = {t["tag_name"]: t["tag_category"] for t in shot["tag_info"] if t.get("tag_category")}
                found[shot["file_name"]] = named
    return found


def write(splits: Splits, root: Path) -> None:
    """Validation pairs go with the training pairs: the layout has two splits."""
    needs_source("viton_hd", splits)
    phrases: dict[str, list[str]] = {}
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for number, (split, pair) in enumerate(every_pair(splits)):
        split = "test" if split == "test" else "train"
        name = f"{number:05d}_00"
        save_image(root / split / "image" / f"{name}.jpg", pair.image)
        save_image(root / split / "cloth" / f"{name}.jpg", pair.source)
        if pair.mask is not None:
            labels = Image.fromarray(np.where(pair.mask > 0, 5, 0).astype(np.uint8)).convert("P")
            path = root / split / "image-parse-v3" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            labels.save(path)
        phrases[f"{number:05d}"] = [pair.caption]
        lines[split].append(f"{name}.jpg {name}.jpg")
    save_json(root / "captions.json", phrases)
    for split, rows in lines.items():
        save_lines(root / f"{split}_pairs.txt", rows)
