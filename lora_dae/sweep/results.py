"""The results of a comparison: every cell's numbers, paired tests against the baseline and against ours, files, tables.

experiments/<name>/results.json   everything: values, intervals, tests, what was run
experiments/<name>/results.csv    a line per cell and metric
experiments/<name>/README.md      the table, between two markers
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dae.adapter.atomic import atomic
from lora_dae.config import ConfigError
from lora_dae.evaluation.report.table import ARROWS, MetricValue, format_name, format_value
from lora_dae.evaluation.statistics.compare import holm
from lora_dae.sweep.cell_files import KEPT, MeasuredCell, read_cell
from lora_dae.sweep.cells import Comparison, Wanted
from lora_dae.sweep.files import read_json, write_json
from lora_dae.sweep.numbers import ALPHA, Difference, Measured, difference, summary

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
NOT_RUN = "*Not run yet: there are no results.*"


def build_results(
    grid: Comparison, wanted: Sequence[Wanted], results: Path, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of results.json, of the cells and training seeds that are measured.

    ``wanted`` are all cells of ``grid`` with every seed, composed with the overrides ``extra``, ``results`` the folder
    of measured cells. Raises ConfigError where nothing is measured.
    """
    found: dict[str, dict[int, MeasuredCell]] = {cell.name: {} for cell in grid.cells}
    for one in wanted:
        measured = read_cell(results, one.digest)
        if measured is not None:
            found[one.cell.name][one.seed] = measured
    found = {name: seeds for name, seeds in found.items() if seeds}
    digests = {(one.cell.name, one.seed): one.digest for one in wanted}
    if not found:
        raise ConfigError(f"{results} has no measured cell of {grid.name}: run the study first.")
    against = {cell.name: cell.against or grid.baseline for cell in grid.cells}
    tests = _tested(_tests(found, against, grid))
    cells = {}
    for cell in grid.cells:
        if cell.name not in found:
            continue
        entries = {}
        for metric in grid.metrics:
            measured_metric = _measured(found[cell.name], metric, grid.own_pairs)
            if measured_metric is None:
                continue
            entries[metric] = {**summary(measured_metric, metric).as_dict(), "seeds": list(measured_metric.values)}
            entries[metric] |= tests.get((cell.name, metric), {})
        first = next(iter(found[cell.name].values()))
        cells[cell.name] = {
            "overrides": list(cell.overrides),
            "against": against[cell.name],
            "adapter_mb": first.adapter_mb,
            "network_calls": first.network_calls,
            "training_seeds": sorted(found[cell.name]),
            "files": {str(seed): digests[cell.name, seed] for seed in sorted(found[cell.name])},
            "metrics": entries,
        }
    shown = found.get(grid.baseline) or next(iter(found.values()))
    return {
        "study": grid.name, "baseline": grid.baseline, "training_seeds": list(grid.seeds), "common": list(grid.common),
        "protocol": next(iter(shown.values())).protocol.line(), "planned": [cell.name for cell in grid.cells],
        "warnings": _warnings(found), "cells": cells, **_against_ours(found, against, grid),
        **({"own_pairs": True} if grid.own_pairs else {}), **({"overrides": list(extra)} if extra else {}),
    }  # fmt: skip


def _warnings(found: Mapping[str, Mapping[int, MeasuredCell]]) -> list[str]:
    """What makes the numbers say less than they seem to; how many seeds there are is told elsewhere."""
    every = [cell for seeds in found.values() for cell in seeds.values()]
    told = dict.fromkeys(words for cell in every for words in cell.protocol.warnings if "seeds:" not in words)
    kinds = sorted({cell.precision or "a precision that was not recorded" for cell in every if cell.network_calls})
    if len(kinds) > 1:
        told[f"cells were measured in {' and '.join(kinds)}: give trainer.precision to compare like with like"] = None
    return list(told)


def _against_ours(
    found: Mapping[str, Mapping[int, MeasuredCell]], against: Mapping[str, str], grid: Comparison
) -> dict[str, Any]:
    """``ours``: that cell minus every other one that is tested against the same baseline, by cell and metric."""
    mine = {against[name]: name for name in grid.ours}
    others = {name: mine[base] for name, base in against.items() if base in mine and mine[base] != name}
    tests = _tested(_tests(found, others, grid, ours=True))
    rows: dict[str, Any] = {}
    for (name, metric), entry in tests.items():
        rows.setdefault(name, {"ours": others[name], "metrics": {}})["metrics"][metric] = entry
    return {"ours": rows} if grid.ours else {}


def _tested(tests: Mapping[tuple[str, str], tuple[Difference, str | None]]) -> dict[tuple[str, str], dict[str, Any]]:
    """As entries of results.json, corrected by Holm over all of them."""
    corrected = holm([found.p for found, _ in tests.values()])
    return {
        key: {
            "difference": found.value, "difference_low": found.low, "difference_high": found.high, "p": found.p,
            "p_holm": p, "better": better,
        }
        for (key, (found, better)), p in zip(tests.items(), corrected, strict=True)
    }  # fmt: skip


def _tests(
    found: Mapping[str, Mapping[int, MeasuredCell]], against: Mapping[str, str], grid: Comparison, ours: bool = False
) -> dict[tuple[str, str], tuple[Difference, str | None]]:
    """(cell, metric) -> (difference, what is better) of the training seeds that both have; ``ours``: the other way."""
    tests = {}
    for name, cells in found.items():
        if name not in against:
            continue
        others = found.get(against[name], {})
        both = sorted(cells.keys() & others.keys())
        for metric in grid.metrics if name != against[name] and both else ():
            one = _measured({seed: cells[seed] for seed in both}, metric, grid.own_pairs)
            other = _measured({seed: others[seed] for seed in both}, metric, grid.own_pairs)
            if one is not None and other is not None:
                tests[name, metric] = difference(other, one) if ours else difference(one, other), one.better
    return tests


def _measured(cells: Mapping[int, MeasuredCell], metric: str, own_pairs: bool) -> Measured | None:
    """None where a seed lacks the metric (PSNR of a row that saw no source) or it is not finite."""
    rows = [cells[seed].metrics.get(metric) for seed in sorted(cells)]
    known = [row for row in rows if row is not None and math.isfinite(row.value)]
    if len(known) < len(rows):
        return None
    kept = [row.replicates for row in known if row.replicates is not None]
    values = tuple(row.value for row in known)
    halves = tuple(
        (row.value - row.low, row.high - row.value) for row in known if row.low is not None and row.high is not None
    )
    return Measured(
        values, tuple(kept) if len(kept) == len(known) else (), known[0].better, own_pairs,
        halves if len(halves) == len(known) else (),
    )  # fmt: skip


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
    one = len({cell["against"] for cell in cells.values()}) == 1
    than = f"'{results['baseline']}'" if one else "the cell that each is tested against (results.json)"
    # Rows in which nothing trained are the same for all seeds.
    seeds = {len(cell["training_seeds"]) for cell in cells.values() if cell["adapter_mb"] > 0} or {1}
    over = "Mean over training seeds with 95 % intervals (images and seeds)."
    if seeds == {1}:
        over = "One training seed, with 95 % intervals over images."
    elif 1 in seeds:
        over = "Mean over the training seeds that a row has; 95 % intervals (images, and seeds where it has more)."
    words = [
        f"{over} **Better** and _worse_ than {than}: paired test, p < {ALPHA} after Holm's correction for {count} "
        f"comparisons (the first {KEPT} bootstrap samples); not marked: cannot tell.",
        f"Protocol: {results['protocol']}."
        + (" Each training seed is measured on pairs of its own." if results.get("own_pairs") else ""),
        *([f"Warning: {'; '.join(results['warnings'])}."] if results.get("warnings") else []),
        *(
            [f"**Not the study as it stands:** every cell with `{' '.join(results['overrides'])}`."]
            if results.get("overrides")
            else []
        ),
        _how_much(results),
    ]
    return "\n".join([*lines, "", *words, *_ours_table(results, metrics, kinds)])


def _ours_table(results: Mapping[str, Any], metrics: Sequence[str], kinds: Mapping[str, str | None]) -> list[str]:
    """Ours minus each of the others."""
    rows = results.get("ours")
    if not rows:
        return []
    signs = {"lower": "< 0", "higher": "> 0", None: "< 0, of abs(log)"}
    lines = ["", "| ours minus | " + " | ".join(f"{format_name(m)} {signs[kinds[m]]}" for m in metrics) + " |"]
    lines.append("|---|" + "---:|" * len(metrics))
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_change(row["metrics"].get(metric)) for metric in metrics) + " |")
    count = sum(len(row["metrics"]) for row in rows.values())
    mine = ", ".join(dict.fromkeys(row["ours"] for row in rows.values()))
    return [*lines, "", f"{mine} minus each of the others, **better** or _worse_; Holm over these {count} comparisons."]


def _change(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    low, high = entry["difference_low"], entry["difference_high"]
    interval = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    better = told_apart(entry)
    value = f"{entry['difference']:.3g}"
    return (value if better is None else f"**{value}**" if better else f"_{value}_") + interval


def _how_much(results: Mapping[str, Any]) -> str:
    """How much of the study is there."""
    seeds, planned = len(results["training_seeds"]), results["planned"]
    have = {name: len(results["cells"].get(name, {}).get("training_seeds", ())) for name in planned}
    if all(count == seeds for count in have.values()):
        return f"Complete: {len(planned)} cells with {seeds} training seed{'s' if seeds > 1 else ''} each."
    lacking = ", ".join(f"{name} ({count})" for name, count in have.items() if count < seeds)
    return (
        f"**Not complete:** {sum(have.values())} of {len(planned) * seeds} measurements are there. Fewer than {seeds} "
        f"training seeds have: {lacking}."
    )


def told_apart(entry: Mapping[str, Any]) -> bool | None:
    """Whether a cell's metric is better than the one that it is tested against, or worse; None: cannot tell."""
    if entry.get("p_holm", 1.0) >= ALPHA:
        return None
    return bool(entry["difference"] < 0 if entry["better"] != "higher" else entry["difference"] > 0)


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    value, interval = format_value(MetricValue(entry["value"], entry["low"], entry["high"], entry["better"]))
    better = told_apart(entry)
    if better is not None:
        value = f"**{value}**" if better else f"_{value}_"
    return f"{value} {interval}".strip()


def check_readme(folder: Path) -> tuple[str, str]:
    """README's text before and after the table. Raises ConfigError where it has no place for one."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    head, _, rest = text.partition(BEGIN)
    if END not in rest:
        raise ConfigError(f"{path} lacks the markers '{BEGIN}' and '{END}', between which the table goes.")
    return head, rest.partition(END)[2]


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """results.json, results.csv and README's block, all from the same numbers."""
    path, (head, rest) = folder / "README.md", check_readme(folder)
    write_json(folder / "results.json", results)
    with atomic(folder / "results.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["cell", "metric", "value", "low", "high", "difference", "difference_low", "difference_high", "p_holm"]
        )
        for line in csv_lines(results):
            writer.writerow(line)
    with atomic(path) as partial:
        partial.write_text(f"{head}{BEGIN}\n{render(results)}\n{END}{rest}", encoding="utf-8")


def csv_lines(results: Mapping[str, Any]) -> list[list[Any]]:
    """A line per cell and metric."""
    keys = ("value", "low", "high", "difference", "difference_low", "difference_high", "p_holm")
    return [
        [name, metric, *(entry.get(key) for key in keys)]
        for name, cell in results["cells"].items()
        for metric, entry in cell["metrics"].items()
    ]


def read_results(folder: Path) -> dict[str, Any]:
    """results.json, {} before the study was run."""
    return read_json(folder / "results.json")
