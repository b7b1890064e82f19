"""The results table: methods as rows, metrics as columns, a block per kind, an interval for every value.

What is better is said only where a paired bootstrap supports it, and the protocol (what was measured on what)
is printed with the numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics.extrapolate import SizeCurve
from lora_dae.evaluation.report.protocol import Protocol
from lora_dae.evaluation.statistics.bootstrap import bootstrap_interval
from lora_dae.evaluation.statistics.compare import holm

Better = Literal["lower", "higher"]
SCHEMA = 2  # of metrics.json; 1 had no references and no curves
REFERENCES = "What real photos get"
ARROWS = {"lower": "↓", "higher": "↑", None: "→ 1"}
BLOCKS = {
    "Distance to real photos": ("fd_", "kd_", "is_", "fid", "kid", "is", "cmmd"),
    "Follows the caption (share of images; CLIPScore)": ("attr_", "clip_"),
    "Texture power, generated / real": ("power_", "lsd"),
    "Fidelity to the real photo": ("psnr", "ssim", "ms_", "lpips", "dists"),
    "Edges, color and pattern of the garment": ("gradient", "edge_", "color", "pattern"),
}


@dataclass(frozen=True)
class MetricValue:
    """A number, its 95 % interval (None: not computed), which direction is better (None: closer to 1).

    ``replicates`` (R,) are its bootstrap replicates; they make paired comparisons possible; not stored. ``std``: over
    the splits of an Inception score.
    """

    value: float
    low: float | None
    high: float | None
    better: Better | None
    replicates: Tensor | None = field(default=None, repr=False, compare=False)
    std: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: value, low, high, better, and std where there is one; not finite becomes null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {**finite, "better": self.better, **({} if self.std is None else {"std": self.std})}


def paired_difference(method: MetricValue, baseline: MetricValue) -> MetricValue | None:
    """``method - baseline`` with a paired 95 % interval, or None without replicates of equal number.

    Only right for methods measured on the same prompts with the same bootstrap seed: their replicates then
    belong to the same resampled images.
    """
    a, b = method.replicates, baseline.replicates
    if a is None or b is None or a.shape != b.shape:
        return None
    value = method.value - baseline.value
    return MetricValue(value, *bootstrap_interval(value, a - b), method.better, a - b)


def p_value(method: MetricValue, baseline: MetricValue) -> float | None:
    """Two-sided p of the paired difference, from the standard deviation of its replicates; None where there is none.

    Student's t, because percentiles of a Frechet distance's replicates are biased (``bootstrap_interval``); 1 for
    metrics without a better direction and for methods that do not differ at all.
    """
    difference = paired_difference(method, baseline)
    if difference is None or difference.replicates is None:
        return None
    finite = difference.replicates[torch.isfinite(difference.replicates)]
    spread = finite.std().item()
    if method.better is None or difference.value == 0:
        return 1.0
    if spread == 0 or not math.isfinite(spread):
        return 0.0 if spread == 0 else 1.0
    return float(2 * stats.t.sf(abs(difference.value) / spread, len(finite) - 1))


def verdict(method: MetricValue, baseline: MetricValue, p: float | None = None) -> Literal["better", "worse"] | None:
    """On which side the method differs from the baseline; None: cannot tell.

    ``p``: as corrected for the number of comparisons; its own ``p_value`` by default. Differs: p below 0.05.
    """
    p = p_value(method, baseline) if p is None else p
    if p is None or p >= 0.05 or method.better is None:
        return None
    return "better" if (method.value < baseline.value) == (method.better == "lower") else "worse"


def format_value(metric: MetricValue) -> tuple[str, str]:
    """The value (and "± std") and its interval ("[low, high]", or ""), to the decimals that it supports (<= 4)."""
    if not math.isfinite(metric.value):
        return "n/a", ""
    spread = "" if metric.std is None else f" ± {metric.std:.2g}"
    if metric.low is None or metric.high is None:
        return f"{metric.value:.3g}{spread}", ""
    half = (metric.high - metric.low) / 2
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 4) if half > 0 else 3
    return f"{metric.value:.{decimals}f}{spread}", f"[{metric.low:.{decimals}f}, {metric.high:.{decimals}f}]"


def format_name(name: str) -> str:
    """A metric's heading: without its block's prefix, words instead of underscores."""
    for prefix in ("attr_", "power_"):
        name = name.removeprefix(prefix)
    return name if name.startswith(("fd_", "kd_", "is_")) else name.replace("_", " ")


@dataclass(frozen=True)
class ResultsTable:
    """Methods (first = the baseline that the others are compared with) x metrics, with their protocol.

    ``references``: what real photos get (other real photos, reconstructions, damaged ones): shown apart, compared with
    nothing. ``curves``: metric -> method -> how the Frechet distance falls with the number of images.
    """

    methods: dict[str, dict[str, MetricValue]]
    protocol: Protocol
    references: dict[str, dict[str, MetricValue]] = field(default_factory=dict)
    curves: dict[str, dict[str, SizeCurve]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("the results table has no method; give evaluation.baselines or a run to measure.")

    @property
    def baseline(self) -> str:
        return next(iter(self.methods))

    def blocks(self, of_references: bool = False) -> dict[str, list[str]]:
        """Block title -> names of the metrics that any method (or reference) has, in the order of computation."""
        shown = self.references if of_references else self.methods
        names = list(dict.fromkeys(name for metrics in shown.values() for name in metrics))
        placed = {title: [n for n in names if _belongs(n, keys)] for title, keys in BLOCKS.items()}
        rest = [n for n in names if not any(n in block for block in placed.values())]
        return {title: block for title, block in {**placed, "Other": rest}.items() if block}

    def direction(self, name: str) -> str:
        """Arrow that says which way is better: ↓, ↑, or → 1."""
        every = [*self.methods.values(), *self.references.values()]
        return ARROWS[next(metrics[name].better for metrics in every if name in metrics)]

    def cell(self, method: str, name: str) -> tuple[str, str, str]:
        """(value, interval, "better" | "worse" | "") of one cell; the last against the baseline."""
        if method not in self.methods:
            metric = self.references[method].get(name)
            return ("", "", "") if metric is None else (*format_value(metric), "")
        metric = self.methods[method].get(name)
        if metric is None:
            return "", "", ""
        base = self.methods[self.baseline].get(name)
        corrected = self.corrected().get((method, name))
        mark = None if base is None or corrected is None else verdict(metric, base, corrected)
        return *format_value(metric), mark or ""

    def verdict(self, method: str, name: str) -> str:
        """better, worse or cannot tell, against the baseline; "" for the baseline and where nothing is compared."""
        if (method, name) not in self.corrected():
            return ""
        return self.cell(method, name)[2] or "cannot tell"

    def corrected(self) -> dict[tuple[str, str], float]:
        """(method, metric) -> p against the baseline, Holm-corrected over all comparisons of the table."""
        return self._corrected

    @cached_property
    def _corrected(self) -> dict[tuple[str, str], float]:
        base = self.methods[self.baseline]
        found = {}
        for method, metrics in self.methods.items():
            for name in metrics:
                if method != self.baseline and name in base and metrics[name].better is not None:
                    p = p_value(metrics[name], base[name])
                    if p is not None:
                        found[method, name] = p
        return dict(zip(found, holm(list(found.values())), strict=True))

    def resampling(self) -> str:
        """By what methods are told apart."""
        jackknife = " (distances between sets: a paired jackknife)" if self.protocol.jackknifed else ""
        return f"a paired bootstrap{jackknife}"

    def legend(self) -> str:
        """What marks mean; "" where nothing is compared."""
        if not self.corrected():
            return ""
        return (
            f"Marked: told apart from '{self.baseline}' by {self.resampling()}, p < 0.05 after Holm's correction for "
            f"{len(self.corrected())} comparisons; not marked: cannot tell."
        )

    def rich(self) -> Group:
        """For the console (rich); 100 columns hold blocks of up to five metrics, wider ones wrap."""
        styles = {"better": "bold green", "worse": "red", "": ""}
        parts: list[Any] = []
        for title, rows, names in self._parts():
            table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            table.add_column("", no_wrap=True)
            for name in names:
                table.add_column(f"{format_name(name)} {self.direction(name)}", justify="right")
            for method in rows:
                cells: list[Text] = []
                for name in names:
                    value, interval, mark = self.cell(method, name)
                    cells.append(Text.assemble((value, styles[mark]), ("\n" + interval if interval else "", "dim")))
                table.add_row(method, *cells)
            parts += [table, Text()]
        parts += [Text(f"warning: {text}", style="yellow") for text in self.protocol.warnings]
        footer = Text(f"{self.protocol.line()}\n{self.legend()}".rstrip(), style="dim")
        return Group(*parts, footer)

    def markdown(self) -> str:
        """GitHub-flavored Markdown; better than the baseline in bold, worse in italics."""
        wrap = {"better": "**", "worse": "_", "": ""}
        lines: list[str] = []
        for title, rows, names in self._parts():
            heads = [f"{format_name(name)} {self.direction(name)}" for name in names]
            lines += [f"### {title}", "", "| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(names)]
            for method in rows:
                cells = []
                for name in names:
                    value, interval, mark = self.cell(method, name)
                    cells.append(f"{wrap[mark]}{value}{wrap[mark]} {interval}".strip())
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
        lines += [f"**Warning:** {text}.  " for text in self.protocol.warnings]
        return "\n".join([*lines, self.protocol.line() + "  ", *([self.legend()] if self.legend() else []), ""])

    def _parts(self) -> list[tuple[str, list[str], list[str]]]:
        """(title, rows, metrics) of every block, those of the references last."""
        parts = [(title, list(self.methods), names) for title, names in self.blocks().items()]
        for title, names in self.blocks(of_references=True).items():
            parts.append((f"{REFERENCES}: {title[0].lower()}{title[1:]}", list(self.references), names))
        return parts

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json: protocol, baseline, and methods -> metrics -> value, low, high, better (and verdict)."""

        def plain(rows: dict[str, dict[str, MetricValue]]) -> dict[str, Any]:
            return {row: {name: metric.as_dict() for name, metric in metrics.items()} for row, metrics in rows.items()}

        corrected = self.corrected()
        return {
            "schema": SCHEMA,
            "protocol": asdict(self.protocol),
            "baseline": self.baseline,
            "methods": plain(self.methods),
            "references": plain(self.references),
            "comparisons": [
                {"method": method, "metric": name, "p_holm": p, "verdict": self.verdict(method, name)}
                for (method, name), p in corrected.items()
            ],
            "curves": {
                metric: {method: asdict(curve) for method, curve in of_method.items()}
                for metric, of_method in self.curves.items()
            },
        }

    def save(self, path: Path) -> None:
        """Write ``as_dict`` as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_table(path: Path) -> ResultsTable:
    """Read a saved table: values and intervals. (Comparisons need the replicates, which are not stored.)

    Raises ConfigError for a file of a later version of this program.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not 1 <= data.get("schema", 1) <= SCHEMA:
        raise ConfigError(f"{path} has schema {data['schema']}, this program reads 1 to {SCHEMA}: use its own version.")

    def rows(named: dict[str, Any]) -> dict[str, dict[str, MetricValue]]:
        return {
            row: {
                name: MetricValue(
                    math.nan if m["value"] is None else m["value"], m["low"], m["high"], m["better"], std=m.get("std")
                )
                for name, m in metrics.items()
            }
            for row, metrics in named.items()
        }

    curves = {
        metric: {method: SizeCurve.from_dict(curve) for method, curve in of_method.items()}
        for metric, of_method in data.get("curves", {}).items()
    }
    return ResultsTable(rows(data["methods"]), Protocol(**data["protocol"]), rows(data.get("references", {})), curves)


def without_nan(value: Any) -> Any:
    """The same dictionaries and lists with NaN and Inf as None: JSON knows neither."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _belongs(name: str, keys: tuple[str, ...]) -> bool:
    return any(name.startswith(key) if key.endswith("_") else name.split("_")[0] == key for key in keys)
