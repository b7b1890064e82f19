"""Pictures that a page shows: the same prompts across methods, and the best and worst by a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_dae.evaluation.metrics.measure import LOWER
from lora_dae.evaluation.report.table import format_name

MEGAPIXELS = 4.0  # of all pictures of a grid together: PNGs are kept whole, and a page has to open
EXTREMES = 3  # best and worst pictures of each metric
PREFERRED = ("pattern_garment", "lpips_alex", "color_garment", "edge_f1_garment", "clip_score")  # in this order
METRICS = 3


@dataclass(frozen=True)
class PictureRow:
    """One prompt: ``cells[i]`` is the uint8 (H, W, 3) picture of column i, or None where there is none."""

    caption: str
    cells: list[np.ndarray | None]


@dataclass(frozen=True)
class PictureGrid:
    """``columns`` name the pictures of every row."""

    title: str
    columns: list[str]
    rows: list[PictureRow]


def prompt_grid(
    title: str,
    captions: Sequence[str],
    methods: Mapping[str, Sequence[np.ndarray]],
    sources: Sequence[np.ndarray | None],
    real: Sequence[np.ndarray | None],
    chosen: Sequence[int] | None = None,
    notes: Sequence[str] | None = None,
) -> PictureGrid:
    """Source, every method, the real photo: a row for each of ``chosen`` prompts (by default the first that fit).

    The first prompts, not the prettiest. Columns that no row has are left out.
    """
    if chosen is None:
        size = next(iter(methods.values()))[0].shape
        chosen = range(min(len(captions), rows_that_fit(len(methods) + 2, size[0] * size[1])))
    columns: dict[str, Sequence[np.ndarray | None]] = {"source": sources, **methods, "real": real}
    columns = {name: images for name, images in columns.items() if any(images[k] is not None for k in chosen)}
    rows = [
        PictureRow(
            captions[k] + (f" ({notes[i]})" if notes is not None else ""), [images[k] for images in columns.values()]
        )
        for i, k in enumerate(chosen)
    ]
    return PictureGrid(title, list(columns), rows)


def rows_that_fit(columns: int, pixels: int) -> int:
    """Rows of ``columns`` pictures of so many pixels: 2 to 8."""
    return int(min(max(MEGAPIXELS * 1e6 // (columns * pixels), 2), 8))


def extremes(
    method: str,
    values: Mapping[str, Tensor],
    captions: Sequence[str],
    methods: Mapping[str, Sequence[np.ndarray]],
    sources: Sequence[np.ndarray | None],
    real: Sequence[np.ndarray | None],
) -> list[PictureGrid]:
    """The best and the worst pictures of ``method`` by up to three metrics that have a value for every image.

    ``values``: metric -> (N,) of that method.
    """
    grids = []
    shown = {method: methods[method]}
    for name in [n for n in PREFERRED if n in values][:METRICS]:
        order = values[name].argsort(descending=name.split("_")[0] not in LOWER)
        order = order[torch.isfinite(values[name][order])]
        count = min(EXTREMES, len(order) // 2)
        if count:
            chosen = [*order[:count].tolist(), *order[-count:].flip(0).tolist()]
            notes = [f"{'best' if i < count else 'worst'}: {values[name][k]:.3g}" for i, k in enumerate(chosen)]
            title = f"{method}: best and worst by {format_name(name)}"
            grids.append(prompt_grid(title, captions, shown, sources, real, chosen, notes))
    return grids
