"""Contact sheets: pictures side by side with headings and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_dae.config import ConfigError


def image_grid(
    images: Sequence[np.ndarray],
    rows: int,
    cols: int,
    labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    zoom: int = 1,
) -> Image.Image:
    """Lay out uint8 HWC pictures of one size, row by row, on white.

    ``labels`` head the columns ("source", "strength 0", ...), wrapped to their width; ``captions`` stand beneath the
    rows, one each, wrapped to the grid's width. ``zoom`` enlarges by a whole number without smoothing, so that pixels
    stay what they are. Raises ConfigError when the numbers do not fit.
    """
    if len(images) != rows * cols or (labels and len(labels) != cols) or (captions and len(captions) != rows):
        raise ConfigError(f"a {rows} x {cols} grid needs {rows * cols} images, {cols} labels, {rows} captions.")
    height, width = images[0].shape[0] * zoom, images[0].shape[1] * zoom
    gap, margin = 6, 16
    size = max(13, width // 15)
    line_height = round(1.4 * size)
    head_font, text_font = _font(size + 2, bold=True), _font(size)
    full = cols * width + (cols - 1) * gap
    lines = [_wrap(caption, text_font, full) for caption in captions or [""] * rows]
    heads = [_wrap(label, head_font, width) for label in labels or []]
    head = 2 * size + 4 + line_height * (max(1, *map(len, heads)) - 1) if heads else 0
    beneath = [len(part) * line_height + (size if part else gap) for part in lines]
    canvas = Image.new("RGB", (full + 2 * margin, 2 * margin + head + rows * height + sum(beneath)), "white")
    draw = ImageDraw.Draw(canvas)
    for col, label in enumerate(heads):
        draw.text((margin + col * (width + gap), margin), "\n".join(label), font=head_font, fill="#24292f")
    top = margin + head
    for row in range(rows):
        for col in range(cols):
            picture = Image.fromarray(images[row * cols + col]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (margin + col * (width + gap), top))
        for number, line in enumerate(lines[row]):
            draw.text((margin, top + height + 4 + line_height * number), line, font=text_font, fill="#57606a")
        top += height + beneath[row]
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
