"""The results table: methods as rows, metrics as columns, a block per kind, an interval for every value.

What is better is said only where a paired bootstrap supports it, and the protocol (what was measured on what)
is printed with the numbers.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.evaluation.bootstrap import bootstrap_interval
from lora_dae.evaluation.distances import inception_splits

Better = Literal["lower", "higher"]
ARROWS = {"lower": "↓", "higher": "↑", None: "→ 1"}
BLOCKS = {
    "Distance to real photos": ("fd_", "kd_", "is_", "fid", "kid", "is"),
    "Follows the caption (share of images)": ("attr_",),
    "Texture power, generated / real": ("power_", "lsd"),
    "Fidelity to the real photo": ("psnr", "ssim"),
}


@dataclass(frozen=True)
class MetricValue:
    """A number, its 95 % interval (None: not computed), which direction is better (None: closer to 1).

    ``replicates`` (R,) are its bootstrap replicates; they make paired comparisons possible; not stored.
    """

    value: float
    low: float | None
    high: float | None
    better: Better | None
    replicates: Tensor | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: value, low, high, better; not finite becomes null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {**finite, "better": self.better}


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


def verdict(method: MetricValue, baseline: MetricValue) -> Literal["better", "worse"] | None:
    """Whether the paired interval of the difference excludes zero, and on which side."""
    difference = paired_difference(method, baseline)
    if difference is None or method.better is None or difference.low is None or difference.high is None:
        return None
    if difference.low <= 0 <= difference.high:
        return None
    return "better" if (difference.value < 0) == (method.better == "lower") else "worse"


@dataclass(frozen=True)
class Protocol:
    """What was measured on what: printed with every number, because no number means anything without it."""

    num_generated: int
    num_reference: int
    split: str
    resolution: int
    sampler: str
    steps: int
    guidance_scale: float
    source_guidance_scale: float | None  # None: not in source mode
    seeds: list[int]
    features: str
    bootstrap: int

    def line(self) -> str:
        guidance = f"guidance {self.guidance_scale:g}"
        if self.source_guidance_scale is not None:
            guidance += f" (source {self.source_guidance_scale:g})"
        return " · ".join(
            [
                f"{self.num_generated} generated, {self.num_reference} real images ({self.split} split)",
                f"{self.resolution} x {self.resolution} pixels",
                f"{self.sampler}, {self.steps} steps, {guidance}",
                f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}",
                f"{self.features} features",
                f"95 % intervals, {self.bootstrap} bootstrap samples of the images",
                f"is: {inception_splits(self.num_generated)} splits, kd: all images at once",
                "psnr and ssim: RGB, data range 1, gaussian window of sigma 1.5, mean over images",
            ]
        )


def format_value(metric: MetricValue) -> tuple[str, str]:
    """The value and its interval ("[low, high]", or ""), to the decimals that it supports (<= 4)."""
    if not math.isfinite(metric.value):
        return "n/a", ""
    if metric.low is None or metric.high is None:
        return f"{metric.value:.3g}", ""
    half = (metric.high - metric.low) / 2
    decimals = min(max(1 - math.floor(math.log10(half)), 0), 4) if half > 0 else 3
    return f"{metric.value:.{decimals}f}", f"[{metric.low:.{decimals}f}, {metric.high:.{decimals}f}]"


def format_name(name: str) -> str:
    """A metric's heading: without its block's prefix, words instead of underscores."""
    for prefix in ("attr_", "power_"):
        name = name.removeprefix(prefix)
    return name if name.startswith(("fd_", "kd_", "is_")) else name.replace("_", " ")


@dataclass(frozen=True)
class ResultsTable:
    """Methods (first = the baseline that the others are compared with) x metrics, with their protocol."""

    methods: dict[str, dict[str, MetricValue]]
    protocol: Protocol

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("the results table has no method; give evaluation.baselines or a run to measure.")

    @property
    def baseline(self) -> str:
        return next(iter(self.methods))

    def blocks(self) -> dict[str, list[str]]:
        """Block title -> names of the metrics that any method has, in the order of computation."""
        names = list(dict.fromkeys(name for metrics in self.methods.values() for name in metrics))
        placed = {title: [n for n in names if _belongs(n, keys)] for title, keys in BLOCKS.items()}
        rest = [n for n in names if not any(n in block for block in placed.values())]
        return {title: block for title, block in {**placed, "Other": rest}.items() if block}

    def direction(self, name: str) -> str:
        """Arrow that says which way is better: ↓, ↑, or → 1."""
        return ARROWS[next(metrics[name].better for metrics in self.methods.values() if name in metrics)]

    def cell(self, method: str, name: str) -> tuple[str, str, str]:
        """(value, interval, "better" | "worse" | "") of one cell; the last against the baseline."""
        metric = self.methods[method].get(name)
        if metric is None:
            return "", "", ""
        base = self.methods[self.baseline].get(name)
        mark = verdict(metric, base) if base is not None and method != self.baseline else None
        return *format_value(metric), mark or ""

    def legend(self) -> str:
        return (
            f"Marked: told apart from '{self.baseline}' by a paired 95 % interval of the difference "
            "(not corrected for the number of cells)."
        )

    def rich(self) -> Group:
        """For the console (rich); 100 columns hold blocks of up to five metrics, wider ones wrap."""
        styles = {"better": "bold green", "worse": "red", "": ""}
        parts: list[Any] = []
        for title, names in self.blocks().items():
            table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
            table.add_column("", no_wrap=True)
            for name in names:
                table.add_column(f"{format_name(name)} {self.direction(name)}", justify="right")
            for method in self.methods:
                cells: list[Text] = []
                for name in names:
                    value, interval, mark = self.cell(method, name)
                    cells.append(Text.assemble((value, styles[mark]), ("\n" + interval if interval else "", "dim")))
                table.add_row(method, *cells)
            parts += [table, Text()]
        footer = Text(self.protocol.line() + "\n" + self.legend(), style="dim")
        return Group(*parts, footer)

    def markdown(self) -> str:
        """GitHub-flavored Markdown; better than the baseline in bold, worse in italics."""
        wrap = {"better": "**", "worse": "_", "": ""}
        lines: list[str] = []
        for title, names in self.blocks().items():
            heads = [f"{format_name(name)} {self.direction(name)}" for name in names]
            lines += [f"### {title}", "", "| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(names)]
            for method in self.methods:
                cells = []
                for name in names:
                    value, interval, mark = self.cell(method, name)
                    cells.append(f"{wrap[mark]}{value}{wrap[mark]} {interval}".strip())
                lines.append(f"| {method} | " + " | ".join(cells) + " |")
            lines.append("")
        return "\n".join([*lines, self.protocol.line() + "  ", self.legend(), ""])

    def as_dict(self) -> dict[str, Any]:
        """For metrics.json: protocol, baseline, and methods -> metrics -> value, low, high, better."""
        return {
            "protocol": asdict(self.protocol),
            "baseline": self.baseline,
            "methods": {
                method: {name: metric.as_dict() for name, metric in metrics.items()}
                for method, metrics in self.methods.items()
            },
        }

    def save(self, path: Path) -> None:
        """Write ``as_dict`` as JSON."""
        path.write_text(json.dumps(self.as_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_table(path: Path) -> ResultsTable:
    """Read a saved table: values and intervals. (Comparisons need the replicates, which are not stored.)"""
    data = json.loads(path.read_text(encoding="utf-8"))
    methods = {
        method: {
            name: MetricValue(math.nan if m["value"] is None else m["value"], m["low"], m["high"], m["better"])
            for name, m in metrics.items()
        }
        for method, metrics in data["methods"].items()
    }
    return ResultsTable(methods, Protocol(**data["protocol"]))


def without_nan(value: Any) -> Any:
    """The same dictionaries and lists with NaN and Inf as None: JSON knows neither."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _belongs(name: str, keys: tuple[str, ...]) -> bool:
    return any(name.startswith(key) if key.endswith("_") else name.split("_")[0] == key for key in keys)
