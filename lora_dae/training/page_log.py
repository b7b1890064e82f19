"""What ``evaluate.py`` shows, in Weights & Biases as well: numbers, tables, pictures and the page itself."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from lora_dae.config import ConfigError, TrackingConfig
from lora_dae.evaluation.report.page import OnPage, Page
from lora_dae.evaluation.report.protocol import GIVEN_PHOTOS
from lora_dae.evaluation.report.table_files import COLUMNS, table_rows
from lora_dae.training import tracking


def page_logger(cfg: TrackingConfig, console: Console) -> OnPage | None:
    """Logs a written page as a W&B run of its own, None for ``logger=none``. Raises ConfigError for other loggers."""
    if cfg.logger == "none":
        return None
    if cfg.logger != "wandb":
        raise ConfigError(
            f"evaluate.py logs to wandb or none, not to {cfg.logger}: leave logger out, table.csv has the numbers."
        )
    tracking.check_tracking(cfg)

    def log(folder: Path, page: Page) -> None:
        plain = {"command": page.command, "protocol": asdict(page.table.protocol), **page.summary}
        logger = tracking.wandb_logger(cfg, folder, plain, console)
        if logger is None:
            return
        import wandb

        # Numbers of validation pairs, and of pictures to which the real photos were given, share no chart with others.
        mode = page.table.protocol.mode
        split = "val" if page.table.protocol.split == "val" else "test"
        shown = f"{split}_{mode}" if mode in GIVEN_PHOTOS else split
        numbers = {
            f"{shown}/{method}/{metric}".replace(" ", "_"): value.value
            for method, row in page.table.methods.items()
            for metric, value in row.items()
            if math.isfinite(value.value)
        }
        tracking.log_metrics([logger], numbers, 0)
        tracking.log_table([logger], f"{shown}/table", list(COLUMNS), table_rows(page.table))
        for grid in page.grids:
            rows = [
                [row.caption, *(None if cell is None else wandb.Image(cell) for cell in row.cells)] for row in grid.rows
            ]
            logger.log_table(f"pictures/{_key(grid.title)}", columns=["prompt", *grid.columns], data=rows)
        for sheet in page.sheets:
            tracking.log_table([logger], f"sheets/{_key(sheet.title)}", sheet.head, sheet.rows)
        logger.experiment.log(
            {"report": wandb.Html((folder / "report.html").read_text(encoding="utf-8"), inject=False)}
        )
        tracking.finish([logger])

    return log


def _key(title: str) -> str:
    """A title as a key, which becomes a file's name."""
    return "".join(c if c.isalnum() else "_" for c in title)
