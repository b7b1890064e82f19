"""The contact sheet: one self-contained HTML file with pairs side by side, duplicates and outliers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader
from PIL import Image

from lora_dae.config import DataConfig
from lora_dae.data.inspect import Item, Survey
from lora_dae.data.pair import PairDataset

THUMBNAIL = 160  # pixels, longest side


def write_sheet(
    path: Path, cfg: DataConfig, found: Survey, splits: dict[str, PairDataset], per_split: int, notice: str | None
) -> None:
    """Writes ``path``; of each split ``per_split`` pairs, evenly spread, of the rest at most 40 each."""

    def card(item: Item, remark: str = "") -> dict[str, object]:
        pair = splits[item.split][item.index]
        pictures = [("source", pair.source)] if pair.source is not None else []
        pictures.append(("image", pair.image))
        if pair.mask is not None:
            pictures.append(("mask", tinted(pair.image, pair.mask)))
        f = item.facts
        size = f"{f.width}x{f.height} → {item.size[1]}x{item.size[0]}"
        shown = [(name, data_uri(pixels)) for name, pixels in pictures]
        told = "; ".join(text for text in (remark, f.remark) if text)
        captions = pair.captions or (pair.caption,)
        return {"id": item.id, "split": item.split, "captions": captions, "pictures": shown, "size": size, "note": told}

    sections = []
    for split in found.splits:
        items = found.of(split)
        chosen = np.unique(np.linspace(0, len(items) - 1, min(per_split, len(items))).round().astype(int))
        sections.append((f"{split}: {len(items)} pairs", [card(items[i]) for i in chosen]))
    twice = [card(x, f"also in {y.split}") for a, b in found.duplicates[:20] for x, y in ((a, b), (b, a))]
    sections.append((f"In two splits: {len(found.duplicates)}", twice))
    odd = [card(item, why) for item, why in found.outliers[:40]]
    sections.append((f"Unusual in brightness or color: {len(found.outliers)}", odd))
    environment = Environment(loader=PackageLoader("lora_dae.data"), autoescape=True)
    template = environment.get_template("sheet.html.j2")
    title = f"{cfg.name} {cfg.root or ''}".strip()
    html = template.render(title=title, sections=sections, words=found.words, notice=notice)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def tinted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What is masked in color, the rest gray and pale: uint8 (H, W, 3)."""
    gray = np.repeat(image.mean(-1, keepdims=True) * 0.35 + 165, 3, axis=-1)
    return np.where(mask[..., None] > 0, image, gray).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    photo = Image.fromarray(np.ascontiguousarray(pixels))
    photo.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
