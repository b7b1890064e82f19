"""Pictures of a comparison: the sweep's plots over its trained cells, and crops of what they drew."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_dae.config import to_dict
from lora_dae.evaluation.report.table import MetricValue
from lora_dae.sampling.sheet import image_grid
from lora_dae.sweep import plots
from lora_dae.sweep.cells import OFF, Wanted
from lora_dae.sweep.results import told_apart
from lora_dae.sweep.table import COSTS, NOT_VARIED, SEED, Row, SweepTable, flatten

CROPS, SIDE, ZOOM = 3, 48, 4  # prompts, pixels of a crop, times enlarged
ABREAST = 8  # columns of crops side by side; more go below


def sweep_table(cells: Sequence[Wanted], results: Mapping[str, Any]) -> SweepTable | None:
    """The trained cells of a comparison's results as a sweep's table; None where there are fewer than two."""
    found = results["cells"]
    shown = {one.cell.name: one for one in cells if one.cell.row is None and one.cell.name in found}
    if len(shown) < 2:
        return None
    # A module at strength 0 is none: both are strength 0 of whatever the others have.
    module = next((one.cfg.enhancement for one in shown.values() if one.cfg.enhancement.enabled), OFF)
    configs = {
        name: one.cfg if one.cfg.enhancement.enabled else replace(one.cfg, enhancement=replace(module, strength=0.0))
        for name, one in shown.items()
    }
    flat = {
        name: flatten({k: v for k, v in to_dict(cfg).items() if k not in (*NOT_VARIED, SEED, "tracking")})
        for name, cfg in configs.items()
    }
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    varied = [key for key in keys if len({json.dumps(values.get(key)) for values in flat.values()}) > 1]
    rows = [
        Row(
            name,
            {key: values.get(key) for key in varied},
            {cost: found[name][cost] for cost in COSTS},
            _metrics(found[name]),
            (),
        )
        for name, values in flat.items()
    ]
    return SweepTable(rows, varied, results["protocol"])


def draw_plots(cells: Sequence[Wanted], results: Mapping[str, Any], folder: Path) -> None:
    """Every cell's metrics; heat maps, curves and quality against cost, as far as what varies allows them."""
    shown = {name: _metrics(cell) for name, cell in results["cells"].items()}
    every = [(n, m, e) for n, cell in results["cells"].items() for m, e in cell["metrics"].items()]
    better = {(n, m): told_apart(e) for n, m, e in every if "p_holm" in e}
    one = len({cell["against"] for cell in results["cells"].values()}) == 1
    for old in (
        *folder.glob("heat_*.png"),
        folder / "curves.png",
        folder / "pareto.png",
    ):  # of another time, with other rows
        old.unlink(missing_ok=True)
    plots.plot_dots(shown, better, results["baseline"] if one else None, folder / "metrics.png")
    table = sweep_table(cells, results)
    if table is None or not table.metrics:
        return
    leading = plots.leading_metrics(table)
    for metric in leading:
        plots.plot_heat_map(table, metric, folder / f"heat_{metric}.png")
    plots.plot_sweep_curves(table, leading[:3], folder / "curves.png", least=3)
    plots.plot_pareto(table, table.headline(), folder / "pareto.png")


def draw_crops(cells: Sequence[Wanted], measured: Collection[str], work: Path, output: Path) -> bool:
    """The middle of the first pictures at 400 %, a column for each cell whose pictures are on this machine.

    Returns False, and leaves what is there, where pictures of ``measured`` cells (names) are missing.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for seed in dict.fromkeys(one.seed for one in cells):  # all cells of one: other seeds may be of other pairs
        files = {one.cell.name: _pictures(work, one.digest) for one in cells if one.seed == seed}
        here = {name: some for name, some in files.items() if len(some) == CROPS}
        if len(here) > len(columns):
            columns = {name: [_middle(np.asarray(Image.open(f).convert("RGB"))) for f in s] for name, s in here.items()}
    if output.exists() and not columns.keys() >= set(measured):
        return False
    names = list(columns)
    strips = []
    for k in range(0, len(names), ABREAST):
        shown = names[k : k + ABREAST]
        flat = [columns[name][row] for row in range(CROPS) for name in shown]
        strips.append(image_grid(flat, CROPS, len(shown), shown, zoom=ZOOM))
    if strips:
        whole = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
        for k, strip in enumerate(strips):
            whole.paste(strip, (0, sum(s.height for s in strips[:k])))
        output.parent.mkdir(parents=True, exist_ok=True)
        whole.save(output)
    return True


def _pictures(work: Path, digest: str) -> list[Path]:
    return sorted(work.glob(f"*/pictures/{digest}/*.png"))[:CROPS]


def _metrics(cell: Mapping[str, Any]) -> dict[str, MetricValue]:
    found = cell["metrics"].items()
    return {name: MetricValue(e["value"], e["low"], e["high"], e["better"]) for name, e in found}


def _middle(image: np.ndarray) -> np.ndarray:
    top, left = ((side - min(SIDE, side)) // 2 for side in image.shape[:2])
    return image[top : top + SIDE, left : left + SIDE]
