"""The report over a sweep: ``report.html``, ``table.csv``, ``table.tex`` and ``plots/*.png`` in its folder."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from omegaconf import DictConfig

from lora_dae.sweep.files import read_json
from lora_dae.sweep.jobs import FAILED, STOPPED


class SweepReport(Callback):
    """For conf/train.yaml's hydra.callbacks: every engine's multirun ends with the same report.

    Hydra calls ``on_multirun_end`` only where no job failed: elsewhere the command calls ``write_if_due``.
    """

    due: Path | None = None  # the folder of the sweep that runs

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepReport.due = Path(str(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        self.write_if_due()

    @classmethod
    def write_if_due(cls) -> None:
        """The report of the sweep that began in this process, once."""
        folder, cls.due = cls.due, None
        if folder is not None:
            report_if_any(folder)


def report_if_any(folder: Path) -> None:
    """The report, here and as a W&B run, where any job was measured; nothing otherwise."""
    from lora_dae.sampling.finished import read_config
    from lora_dae.sweep.plots import leading_metrics
    from lora_dae.sweep.table import find_runs, read_sweep
    from lora_dae.sweep.wandb_report import log_sweep

    runs = find_runs(folder)
    if runs:
        print(f"report   {write_sweep_report(folder)}")
        table = read_sweep(folder)
        log_sweep(folder, table, leading_metrics(table), read_config(runs[0]).tracking)


def write_sweep_report(folder: Path) -> Path:
    """Write the report over all finished runs below ``folder``; returns report.html's path.

    Raises ConfigError where no run is finished.
    """
    from lora_dae.evaluation.report.page import data_uri
    from lora_dae.evaluation.report.table import format_name, format_value
    from lora_dae.sweep import plots
    from lora_dae.sweep.table import COSTS, read_sweep

    table = read_sweep(folder)
    name = table.headline()
    leading = plots.leading_metrics(table)
    maps = [plots.plot_heat_map(table, metric, folder / "plots" / f"heat_{metric}.png") for metric in leading]
    curves = plots.plot_sweep_curves(table, leading[:3], folder / "plots" / "curves.png")
    front = plots.plot_pareto(table, name, folder / "plots" / "pareto.png") if len(table.rows) > 1 else None
    table.save_csv(folder / "table.csv")
    (folder / "table.tex").write_text(table.latex(leading), encoding="utf-8")
    lost = [
        told
        for path in sorted(folder.glob("*/job.json"))
        if (told := read_json(path)).get("state") in (FAILED, STOPPED)
    ]
    environment = Environment(
        loader=PackageLoader("lora_dae.sweep", "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("sweep.html.j2").render(
        title=folder.resolve().name,
        date=datetime.date.today().isoformat(),
        table=table,
        headline=format_name(name),
        best=table.best(name),
        best_value=" ".join(format_value(table.best(name).metrics[name])).strip(),
        tied=table.tied(name),
        apart=table.has_intervals(name),
        front=table.pareto(name, "adapter_mb"),
        costs=COSTS,
        cell=lambda row, metric: format_value(row.metrics[metric]),
        format_name=format_name,
        link=lambda row: Path(os.path.relpath(row.runs[0] / "report.html", folder)).as_posix(),
        lost=lost,
        pictures=[
            {"alt": p.stem.replace("_", " "), "uri": data_uri(p)} for p in [*maps, curves, front] if p is not None
        ],
    )
    output = folder / "report.html"
    output.write_text(html, encoding="utf-8")
    return output
