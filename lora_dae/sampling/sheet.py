"""Contact sheets: pictures side by side with headings and captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lora_dae.config import ConfigError
from lora_dae.data.catalog import say_once

# By parts of their names; one of them is wherever somebody reads these languages.
_CJK_FONTS = (
    "CJK", "WenQuanYi", "Droid Sans Fallback", "PingFang", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Unifont",
)  # fmt: skip


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
    words = " ".join([*(labels or []), *(captions or [])])
    head_font, text_font = _font(size + 2, words, bold=True), _font(size, words)
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
    """Lines of words; a word that is wider than that, as in languages without spaces, goes on in the next line."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        rest = word
        while font.getlength(rest) > width and len(rest) > 1:
            count = 1
            while font.getlength(rest[: count + 1]) <= width:
                count += 1
            lines.append(rest[:count])
            rest = rest[count:]
        lines.append(rest)
    return lines


def _font(size: int, text: str, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it, the same on every machine; for a ``text`` that it cannot write, another."""
    if any("\u2e80" <= letter < "\ud7b0" for letter in text) and (found := _cjk_font()) is not None:
        return ImageFont.truetype(found.fname, size, index=getattr(found, "index", 0))
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@cache
def _cjk_font() -> Any:
    """matplotlib's entry of a font for Chinese, Japanese and Korean; None, which is said, where it finds none."""
    from matplotlib.font_manager import fontManager  # the first time it reads all fonts of the machine

    for part in _CJK_FONTS:
        found = next((entry for entry in fontManager.ttflist if part in entry.name), None)
        if found is not None:
            return found
    say_once("no font has the captions' letters, and sheets show boxes instead: install one such as Noto Sans CJK")
    return None
