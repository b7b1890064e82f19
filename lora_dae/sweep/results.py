"""The results of a comparison: means over training seeds, paired tests against the baseline, files, README's table.

experiments/<name>/results.json   everything: values, intervals, tests, what was run
experiments/<name>/results.csv    a line per cell and metric
experiments/<name>/README.md      the table, between two markers
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from lora_dae.adapter.atomic import atomic
from lora_dae.config import ConfigError
from lora_dae.evaluation.report.table import ARROWS, MetricValue, format_name, format_value, load_table
from lora_dae.evaluation.run import row_name
from lora_dae.evaluation.statistics.compare import holm
from lora_dae.sweep.cells import Cell, Comparison, run_folder
from lora_dae.sweep.files import read_json, write_json
from lora_dae.sweep.table import adapter_megabytes, network_calls
from lora_dae.training.replicates import load_replicates
from lora_dae.training.resume import read_run_config

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
NOT_RUN = "*Not run yet: there are no results.*"
ALPHA = 0.05


@dataclass(frozen=True)
class Measured:
    """One metric of one cell: a value per training seed, and its bootstrap replicates (R,) per seed."""

    values: tuple[float, ...]
    replicates: tuple[Tensor, ...]
    better: str | None  # lower, higher, None: closer to 1


def standard_error(values: Sequence[float], replicates: Sequence[Tensor]) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean over training seeds.

    Two sources add up: which images were drawn (the bootstrap's variance; the seeds share their prompts, so their mean
    is over it) and which weights training found (the seeds' variance over their number). Welch and Satterthwaite's
    degrees of freedom, the first source's being taken as infinite.
    """
    images = float(np.mean([float(r.var()) for r in replicates])) if replicates else 0.0
    seeds = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
    freedom = math.inf if seeds == 0 else (images + seeds) ** 2 / (seeds**2 / (len(values) - 1))
    return math.sqrt(images + seeds), freedom


def summary(measured: Measured) -> MetricValue:
    """Mean and 95 % interval; without one where neither seeds nor replicates say how far it varies."""
    mean = float(np.mean(measured.values))
    if len(measured.values) == 1 and not measured.replicates:
        return MetricValue(mean, None, None, measured.better)  # type: ignore[arg-type]
    error, freedom = standard_error(measured.values, measured.replicates)
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    return MetricValue(mean, mean - half, mean + half, measured.better)  # type: ignore[arg-type]


def difference(cell: Measured, baseline: Measured) -> tuple[float, float]:
    """(mean difference, two-sided p), paired by seed and by image; of |log value| where 1 is best."""
    a, b = _distance(cell), _distance(baseline)
    values = [x - y for x, y in zip(a.values, b.values, strict=True)]
    both = zip(a.replicates, b.replicates, strict=True) if len(a.replicates) == len(b.replicates) else ()
    replicates = [x - y for x, y in both if x.shape == y.shape]
    mean = float(np.mean(values))
    if len(values) == 1 and not replicates:
        return mean, 1.0
    error, freedom = standard_error(values, replicates)
    if mean == 0 or error == 0:
        return mean, 1.0 if mean == 0 else 0.0
    return mean, float(2 * stats.t.sf(abs(mean) / error, freedom))


def _distance(measured: Measured) -> Measured:
    if measured.better is not None:
        return measured
    values = tuple(abs(math.log(max(value, 1e-9))) for value in measured.values)
    return Measured(values, tuple(r.clamp_min(1e-9).log().abs() for r in measured.replicates), "lower")


def collect(grid: Comparison, runs: Path) -> dict[str, dict[str, Measured]]:
    """Cell -> metric -> what was measured, of cells of which every seed is finished."""
    found = {}
    for cell in grid.cells:
        folders = [run_folder(runs, cell, seed) for seed in grid.seeds]
        if all((folder / "metrics.json").is_file() for folder in folders):
            found[cell.name] = _collect_cell(cell, folders, grid.metrics)
    return found


def _collect_cell(cell: Cell, folders: Sequence[Path], metrics: Sequence[str]) -> dict[str, Measured]:
    tables = [load_table(folder / "metrics.json") for folder in folders]
    methods = [{**table.references, **table.methods} for table in tables]
    names = [_row(cell, folder, set(rows)) for folder, rows in zip(folders, methods, strict=True)]
    drawn = [load_replicates(folder) for folder in folders]
    found = {}
    for metric in metrics:
        rows = [known[name].get(metric) for known, name in zip(methods, names, strict=True)]
        if any(row is None or not math.isfinite(row.value) for row in rows):
            continue  # PSNR of a row that saw no source
        kept = [r[f"{name}/{metric}"] for r, name in zip(drawn, names, strict=True) if f"{name}/{metric}" in r]
        values = tuple(row.value for row in rows if row is not None)
        found[metric] = Measured(values, tuple(kept) if len(kept) == len(rows) else (), rows[0].better)  # type: ignore[union-attr]
    return found


def _row(cell: Cell, folder: Path, rows: set[str]) -> str:
    name = cell.row or row_name(read_run_config(folder).enhancement.strength)
    name = name if name in rows or cell.row is not None else row_name(0.0)
    if name not in rows:
        raise ConfigError(f"{folder} has no row '{name}': its rows are {', '.join(sorted(rows))}.")
    return name


def build_results(grid: Comparison, runs: Path) -> dict[str, Any]:
    """The content of results.json. Raises ConfigError while the baseline or every other cell is missing."""
    found = collect(grid, runs)
    if grid.baseline not in found or len(found) < 2:
        raise ConfigError(
            f"{runs} has no finished baseline '{grid.baseline}' and another cell yet: run the study first."
        )
    tests: dict[tuple[str, str], tuple[float, float]] = {}
    against = {cell.name: cell.against or grid.baseline for cell in grid.cells}
    for name, metrics in found.items():
        other = found.get(against[name], {})
        for metric in metrics if name != against[name] else ():
            if metric in other:
                tests[name, metric] = difference(metrics[metric], other[metric])
    corrected = dict(zip(tests, holm([p for _, p in tests.values()]), strict=True))
    cells = {}
    for cell in grid.cells:
        if cell.name not in found:
            continue
        folder = run_folder(runs, cell, grid.seeds[0])
        entries = {}
        for metric, measured in found[cell.name].items():
            entries[metric] = {**summary(measured).as_dict(), "seeds": list(measured.values)}
            if (cell.name, metric) in tests:
                change, p = tests[cell.name, metric]
                entries[metric] |= {"difference": change, "p": p, "p_holm": corrected[cell.name, metric]}
        cfg = read_run_config(folder)
        cells[cell.name] = {
            "overrides": list(cell.overrides),
            "against": against[cell.name],
            "adapter_mb": 0.0 if cell.row is not None else adapter_megabytes(folder),
            "network_calls": network_calls(cfg),
            "metrics": entries,
        }
    baseline = next(cell for cell in grid.cells if cell.name == grid.baseline)
    protocol = load_table(run_folder(runs, baseline, grid.seeds[0]) / "metrics.json").protocol.line()
    return {
        "study": grid.name, "baseline": grid.baseline, "training_seeds": list(grid.seeds), "common": list(grid.common),
        "protocol": protocol, "missing": [cell.name for cell in grid.cells if cell.name not in found], "cells": cells,
    }  # fmt: skip


def render(results: Mapping[str, Any] | None) -> str:
    """README's block, from results.json alone."""
    if not results:
        return NOT_RUN
    cells = results["cells"]
    metrics = list(dict.fromkeys(metric for cell in cells.values() for metric in cell["metrics"]))
    kinds = {m: next(c["metrics"][m]["better"] for c in cells.values() if m in c["metrics"]) for m in metrics}
    heads = ["", "MB", "calls", *(f"{format_name(m)} {ARROWS[kinds[m]]}" for m in metrics)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, cell in cells.items():
        row = [name, f"{cell['adapter_mb']:.2f}", f"{cell['network_calls']:g}"]
        for metric in metrics:
            row.append(_cell(cell["metrics"].get(metric)))
        lines.append("| " + " | ".join(row) + " |")
    count = sum("p_holm" in entry for cell in cells.values() for entry in cell["metrics"].values())
    seeds = results["training_seeds"]
    one = len({cell["against"] for cell in cells.values()}) == 1
    than = f"'{results['baseline']}'" if one else "the cell that each is tested against (results.json)"
    words = [
        f"Mean over {len(seeds)} training seed{'s' if len(seeds) > 1 else ''} with 95 % intervals (images and seeds). "
        f"**Better** and _worse_ than {than}: paired test, p < {ALPHA} after Holm's correction for {count} "
        "comparisons; not marked: cannot tell.",
        f"Protocol: {results['protocol']}.",
    ]
    if results["missing"]:
        words.append(f"Not finished: {', '.join(results['missing'])}.")
    return "\n".join([*lines, "", *words])


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    value, interval = format_value(MetricValue(entry["value"], entry["low"], entry["high"], entry["better"]))
    if entry.get("p_holm", 1.0) < ALPHA:
        improved = entry["difference"] < 0 if entry["better"] != "higher" else entry["difference"] > 0
        value = f"**{value}**" if improved else f"_{value}_"
    return f"{value} {interval}".strip()


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json, results.csv and README's block, all from the same numbers."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, _, rest = text.partition(BEGIN)
    if END not in rest:
        raise ConfigError(f"{path} lacks the markers '{BEGIN}' and '{END}', between which the table goes.")
    write_json(folder / "results.json", results)
    with atomic(folder / "results.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell", "metric", "value", "low", "high", "difference", "p_holm"])
        for line in csv_lines(results):
            writer.writerow(line)
    with atomic(path) as partial:
        partial.write_text(f"{head}{BEGIN}\n{render(results)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def csv_lines(results: Mapping[str, Any]) -> list[list[Any]]:
    """A line per cell and metric."""
    keys = ("value", "low", "high", "difference", "p_holm")
    return [
        [name, metric, *(entry.get(key) for key in keys)]
        for name, cell in results["cells"].items()
        for metric, entry in cell["metrics"].items()
    ]


def read_results(folder: Path) -> dict[str, Any]:
    """results.json, {} before the study was run."""
    return read_json(folder / "results.json")
