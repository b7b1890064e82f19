"""A sweep's table and heat maps as one W&B run in the sweep's group (job type ``sweep``)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dae.config import TrackingConfig
from lora_dae.sweep.plots import axes_of, slice_at_best
from lora_dae.sweep.table import COSTS, SweepTable
from lora_dae.training.tracking import wandb_mode

# W&B's own preset that colors a cell by a number, with names of its own for x, y and color.
HEAT_MAP = "wandb/confusion_matrix/v1"
HEAT_MAP_FIELDS = ("Predicted", "Actual", "nPredictions")


def log_sweep(folder: Path, table: SweepTable, metrics: Sequence[str], tracking: TrackingConfig) -> None:
    """Log what report.html shows; nothing where the runs themselves are not logged to W&B.

    ``folder`` holds the pictures (``plots/*.png``); its name is the group, unless the runs name another.
    Making the report again replaces the run.
    """
    mode = wandb_mode(tracking.wandb)
    if tracking.logger != "wandb" or mode == "disabled":
        return
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    run = wandb.init(
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        resume="allow" if mode == "online" else None,
        dir=folder,
        mode="offline" if mode == "offline" else "online",
        project=tracking.project,
        group=tracking.group or folder.name,
        job_type="sweep",
        name=f"sweep {folder.name}",
        tags=tracking.tags,
    )
    columns: list[str | int] = ["configuration", *table.varied, *COSTS, *table.metrics]
    rows = [
        [row.label, *(_plain(row.values.get(k)) for k in table.varied), *(row.costs[c] for c in COSTS),
         *(row.metrics[m].value for m in table.metrics)]
        for row in table.rows
    ]  # fmt: skip
    logged: dict[str, Any] = {"sweep/table": wandb.Table(columns=columns, data=rows)}
    axes = axes_of(table)[:2]
    for metric in metrics if len(axes) == 2 else ():
        cells = [[*(str(row.values[key]) for key in axes), row.metrics[metric].value]
                 for row in slice_at_best(table, axes, metric)]  # fmt: skip
        logged[f"sweep/heat_{metric}"] = wandb.plot_table(
            HEAT_MAP,
            wandb.Table(columns=[*axes, metric], data=cells),
            dict(zip(HEAT_MAP_FIELDS, [*axes, metric], strict=True)),
            {"title": metric},
        )
    for path in sorted((folder / "plots").glob("*.png")):
        logged[f"sweep/plots/{path.stem}"] = wandb.Image(str(path))
    run.log(logged)
    run.finish()


def _plain(value: object) -> object:
    """A table's column has one type: lists become text."""
    return "+".join(map(str, value)) if isinstance(value, list) else value
