"""All finished runs of a folder as one table: what was varied, what it cost, what was measured."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from scipy import stats

from lora_dae.adapter.files import trained_megabytes
from lora_dae.config import Config, ConfigError, from_dict, to_dict
from lora_dae.evaluation.report.protocol import Protocol
from lora_dae.evaluation.report.table import MetricValue, format_value, load_table
from lora_dae.evaluation.run import row_name
from lora_dae.sampling.loop import Guidance
from lora_dae.sampling.methods import build_method
from lora_dae.sweep.numbers import possible_range

NOT_VARIED = ("name", "run_dir", "ckpt_path", "store")
SEED = "seed"
ENOUGH_SEEDS = 3  # from here on a run's own warning that it is of one seed is no longer true of its row
COSTS = {"adapter_mb": "adapter, MB", "network_calls": "network calls per image"}


@dataclass(frozen=True)
class Row:
    """One run, or several that differ in their seed alone."""

    label: str
    values: dict[str, Any]  # dotted config key -> value, of the varied ones
    costs: dict[str, float]
    metrics: dict[str, MetricValue]
    runs: tuple[Path, ...]


@dataclass(frozen=True)
class SweepTable:
    """Rows, the keys that vary among them (the seed not among these), the protocol and warnings of all measurements."""

    rows: list[Row]
    varied: list[str]
    protocol: str
    warnings: tuple[str, ...] = ()

    @property
    def metrics(self) -> list[str]:
        """Names that every row has, in the order of computation."""
        return [name for name in self.rows[0].metrics if all(name in row.metrics for row in self.rows)]

    def headline(self) -> str:
        """What configurations are ranked by: the Frechet distance, else the first metric."""
        return next((name for name in self.metrics if name.startswith("fd_")), self.metrics[0])

    def best(self, name: str) -> Row:
        """The row with the best value of a metric."""
        return min(self.rows, key=lambda row: badness(row.metrics[name]))

    def tied(self, name: str) -> list[Row]:
        """Rows whose interval overlaps that of the best one: nothing here says that they are worse."""
        best = self.best(name).metrics[name]
        if best.low is None or best.high is None:
            return []
        others = [row for row in self.rows if row is not self.best(name)]
        return [
            row for row in others
            if row.metrics[name].low is not None and row.metrics[name].low <= best.high  # type: ignore[operator]
            and row.metrics[name].high >= best.low  # type: ignore[operator]
        ]  # fmt: skip

    def has_intervals(self, name: str) -> bool:
        """Whether every row has one: else nothing says how far the best one is ahead."""
        return all(row.metrics[name].low is not None and row.metrics[name].high is not None for row in self.rows)

    def pareto(self, name: str, cost: str) -> list[Row]:
        """Rows that no other beats in ``name`` at no more ``cost``, cheapest first."""
        front: list[Row] = []
        for row in sorted(self.rows, key=lambda r: (r.costs[cost], badness(r.metrics[name]))):
            if not front or badness(row.metrics[name]) < badness(front[-1].metrics[name]):
                front.append(row)
        return front

    def save_csv(self, path: Path) -> None:
        """One line per row: label, varied values, costs, and value, low and high of every metric."""
        heads = ["configuration", *self.varied, *COSTS]
        heads += [f"{name}{end}" for name in self.metrics for end in ("", "_low", "_high")]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*heads, "runs"])
            for row in self.rows:
                numbers = [
                    part
                    for m in self.metrics
                    for part in (row.metrics[m].value, row.metrics[m].low, row.metrics[m].high)
                ]
                values = [row.values.get(key) for key in self.varied]
                runs = " ".join(run.as_posix() for run in row.runs)
                writer.writerow([row.label, *values, *(row.costs[c] for c in COSTS), *numbers, runs])

    def latex(self, names: Sequence[str] | None = None) -> str:
        """A booktabs table: 95 % intervals in small print, the best of each column in bold."""
        shown = list(names or self.metrics)
        arrows = {"lower": r"$\downarrow$", "higher": r"$\uparrow$", None: r"$\to 1$"}
        heads = [f"{_tex(n)} {arrows[self.rows[0].metrics[n].better]}" for n in shown]
        lines = [r"\begin{tabular}{l" + "r" * (len(shown) + 1) + "}", r"\toprule",
                 " & ".join(["configuration", "MB", *heads]) + r" \\", r"\midrule"]  # fmt: skip
        for row in self.rows:
            cells = []
            for name in shown:
                value, interval = format_value(row.metrics[name])
                bold = rf"\textbf{{{value}}}" if row is self.best(name) else value
                cells.append(bold + (rf" {{\scriptsize {_tex(interval)}}}" if interval else ""))
            lines.append(" & ".join([_tex(row.label), f"{row.costs['adapter_mb']:.1f}", *cells]) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def badness(metric: MetricValue) -> float:
    """Smaller is better, whichever way the metric points; NaN is worst."""
    if math.isnan(metric.value):
        return math.inf
    if metric.better is None:  # closer to 1
        return abs(math.log(metric.value)) if metric.value > 0 else math.inf
    return metric.value if metric.better == "lower" else -metric.value


def find_runs(folder: Path) -> list[Path]:
    """Finished, measured runs at any depth below a folder, in natural order."""
    found = [path.parent for path in folder.rglob("metrics.json") if (path.parent / "config.yaml").is_file()]
    return sorted(found, key=lambda p: _natural(p.as_posix()))


def read_sweep(folder: Path) -> SweepTable:
    """The table of all finished runs below ``folder``; of equal ones the last. ConfigError where there is none."""
    runs = find_runs(folder)
    if not runs:
        raise ConfigError(f"{folder} holds no measured run: give the folder of a sweep that has finished a job.")
    configs = [from_dict(OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))) for run in runs]  # type: ignore[arg-type]
    flat = [flatten({k: v for k, v in to_dict(cfg).items() if k not in (*NOT_VARIED, "tracking")}) for cfg in configs]
    once = {json.dumps(values, sort_keys=True): k for k, values in enumerate(flat)}.values()  # repeats are no seeds
    runs, configs, flat = [runs[k] for k in once], [configs[k] for k in once], [flat[k] for k in once]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    varied = [key for key in keys if len({json.dumps(values.get(key)) for values in flat}) > 1]
    named = [key for key in varied if key != SEED]
    groups: dict[str, list[int]] = {}
    for index, values in enumerate(flat):
        groups.setdefault(json.dumps([values.get(key) for key in named]), []).append(index)
    rows: list[Row] = []
    protocols: list[Protocol] = []
    for members in groups.values():
        values = {key: flat[members[0]].get(key) for key in named}
        tables = [load_table(runs[i] / "metrics.json") for i in members]
        protocols += [table.protocol for table in tables]
        found = [table.methods.get(row_name(configs[i].enhancement.strength), table.methods[row_name(0.0)])
                 for i, table in zip(members, tables, strict=True)]  # fmt: skip
        label = (
            ", ".join(f"{_short(key, named)} {_say(value)}" for key, value in values.items())
            or configs[members[0]].name
        )
        first = members[0]
        costs = {
            "adapter_mb": trained_megabytes(runs[first] / "adapter"),
            "network_calls": network_calls(configs[first]),
        }
        rows.append(Row(label, values, costs, over_seeds(found), tuple(runs[i] for i in members)))
    warnings = [words for protocol in protocols for words in protocol.warnings]
    if all(len(row.runs) >= ENOUGH_SEEDS for row in rows):
        warnings = [words for words in warnings if "seeds:" not in words]
    return SweepTable(rows, named, joined(protocols), tuple(dict.fromkeys(warnings)))


def joined(protocols: Sequence[Protocol]) -> str:
    """The rows of several protocols as one paragraph; one that is not the same in all says just that."""
    told: dict[str, set[str]] = {}
    every = [protocol.rows() for protocol in protocols]
    for key in dict.fromkeys(key for rows in every for key in rows):
        told[key] = {rows.get(key, "") for rows in every}
    return " · ".join(f"{key}: differs by row" if len(texts) > 1 else texts.pop() for key, texts in told.items())


def over_seeds(found: Sequence[dict[str, MetricValue]]) -> dict[str, MetricValue]:
    """One run: as it is. Several: mean over runs, with Student's 95 % interval of that mean, within what can be."""
    if len(found) == 1:
        return found[0]
    merged = {}
    for name, first in found[0].items():
        values = np.array([metrics[name].value for metrics in found if name in metrics])
        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
        mean = float(values.mean())
        least, most = possible_range(name)
        merged[name] = MetricValue(mean, max(mean - half, least), min(mean + half, most), first.better)
    return merged


def network_calls(cfg: Config) -> float:
    """How often the UNet sees one image's latents while it is drawn; calls of a part of it count as their share."""
    sampling = cfg.sampling
    steps = {"heun": 2 * sampling.num_inference_steps - 1, "pndm": sampling.num_inference_steps + 1}.get(
        sampling.scheduler, sampling.num_inference_steps
    )
    guidance = Guidance(sampling.guidance_scale, sampling.source_guidance_scale)
    method = build_method(sampling.method, sampling.method_options)
    branches = len(guidance.branches(cfg.conditioning == "source"))
    return float(method.whole_calls(steps) * branches + method.extra_calls * steps)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a key where that is enough to tell it from the others."""
    last = key.rsplit(".", 1)[-1]
    return last if sum(other.rsplit(".", 1)[-1] == last for other in keys) == 1 else key


def _say(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _natural(text: str) -> list[Any]:
    """Words and numbers in turns, a word first, so that any two are comparable."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", text))]


def _tex(text: str) -> str:
    for letter in "\\&%$#_{}":
        text = text.replace(letter, "\\" + letter) if letter != "\\" else text
    return text
