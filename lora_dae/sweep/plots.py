"""Pictures over a sweep: heat map, curves with intervals, quality against cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_dae.evaluation.report.plots import INK, PALETTE, STYLE
from lora_dae.evaluation.report.table import ARROWS, MetricValue, format_name
from lora_dae.sweep.table import COSTS, Row, SweepTable, badness

PREFERRED = ("enhancement.strength", "adapter.rank")  # x and y of the heat map, where they vary
DPI = 160


def axes_of(table: SweepTable) -> list[str]:
    """Keys with numbers for values, the preferred ones first, then those with the most values."""
    numeric = [key for key in table.varied if all(_is_number(row.values.get(key)) for row in table.rows)]
    count = {key: len({row.values[key] for row in table.rows}) for key in numeric}
    return sorted(numeric, key=lambda key: (PREFERRED.index(key) if key in PREFERRED else len(PREFERRED), -count[key]))


def slice_at_best(table: SweepTable, free: list[str], name: str) -> list[Row]:
    """Rows that equal the best one in every varied key but the free ones."""
    best = table.best(name)
    fixed = [key for key in table.varied if key not in free]
    return [row for row in table.rows if all(row.values[key] == best.values[key] for key in fixed)]


def plot_heat_map(table: SweepTable, name: str, output: Path) -> Path | None:
    """A metric over the two leading numeric keys, a number in each cell; None where fewer than two vary at the best."""
    axes = axes_of(table)[:2]
    if len(axes) < 2:
        return None
    x_key, y_key = axes
    rows = slice_at_best(table, axes, name)
    xs, ys = (sorted({row.values[key] for row in rows}) for key in axes)
    if min(len(xs), len(ys)) < 2:
        return None
    grid = np.full((len(ys), len(xs)), np.nan)
    for row in rows:
        grid[ys.index(row.values[y_key]), xs.index(row.values[x_key])] = row.metrics[name].value
    better = rows[0].metrics[name].better
    with matplotlib.rc_context(STYLE):
        figure = _figure(1.6 + 0.9 * len(xs), 1.3 + 0.55 * len(ys))
        panel = figure.add_subplot()
        colors = {"lower": "viridis_r", "higher": "viridis", None: "coolwarm"}[better]
        limit = np.nanmax(np.abs(np.log(np.maximum(grid, 1e-9)))) if better is None else None
        shown = np.log(np.maximum(grid, 1e-9)) if better is None else grid
        image = panel.imshow(shown, cmap=colors, origin="lower", aspect="auto",
                             vmin=None if limit is None else -limit, vmax=limit)  # fmt: skip
        for (i, j), value in np.ndenumerate(grid):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(shown[i, j]))
                ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
                panel.text(j, i, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=9)
        panel.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        panel.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        panel.set_xlabel(x_key)
        panel.set_ylabel(y_key)
        panel.grid(visible=False)
        panel.set_title(format_name(name))
        return _save(figure, output)


def plot_sweep_curves(table: SweepTable, names: list[str], output: Path, least: int = 2) -> Path | None:
    """Metrics over a numeric key with 95 % intervals, a line per value of another; None without ``least`` values.

    Over the one with the most values; the leading one of the others says the line. Beside them each metric stays at
    its best row, which the panel names where there is room.
    """
    leading = axes_of(table)
    if not leading:
        return None
    x_key = max(leading, key=lambda key: len({row.values[key] for row in table.rows}))
    axes = [x_key, *(key for key in leading if key != x_key)][:2]
    slices = {name: slice_at_best(table, axes, name) for name in names}
    slices = {name: rows for name, rows in slices.items() if len({row.values[x_key] for row in rows}) >= least}
    if not slices:
        return None
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.2 * len(slices), 3.2)
        for panel, (name, rows) in zip(np.ravel(figure.subplots(1, len(slices))), slices.items(), strict=True):
            lines = sorted({row.values[axes[1]] for row in rows}) if len(axes) > 1 else [None]
            for number, line in enumerate(lines):
                points = sorted(
                    (row for row in rows if line is None or row.values[axes[1]] == line), key=lambda r: r.values[x_key]
                )
                x = [row.values[x_key] for row in points]
                metrics = [row.metrics[name] for row in points]
                color = PALETTE[number % len(PALETTE)]
                label = None if line is None else f"{axes[1].rsplit('.', 1)[-1]} {line:g}"
                panel.plot(x, [m.value for m in metrics], color=color, marker="o", markersize=4, label=label)
                if all(m.low is not None for m in metrics):
                    panel.fill_between(x, [m.low for m in metrics], [m.high for m in metrics], color=color, alpha=0.15,
                                       linewidth=0)  # fmt: skip
            panel.set_title(format_name(name))
            others = [(key, rows[0].values[key]) for key in table.varied if key not in axes]
            fixed = ", ".join(_short(key, value) for key, value in others if value not in (None, "none"))
            panel.set_xlabel(x_key if not fixed or len(fixed) > 60 else f"{x_key}\n({fixed})")
            if len(axes) > 1:
                panel.legend()
        return _save(figure, output)


def plot_pareto(table: SweepTable, name: str, output: Path) -> Path:
    """Quality against adapter size and against sampling cost; the front that nothing beats is a line."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(8.4, 3.3)
        for panel, cost in zip(figure.subplots(1, len(COSTS)), COSTS, strict=True):
            for row in table.rows:
                metric = row.metrics[name]
                error = None if metric.low is None or metric.high is None else [
                    [max(metric.value - metric.low, 0)], [max(metric.high - metric.value, 0)]
                ]  # fmt: skip
                panel.errorbar(row.costs[cost], metric.value, error, fmt="o", color=INK, markersize=4, elinewidth=0.8)
            front = table.pareto(name, cost)
            panel.plot([row.costs[cost] for row in front], [row.metrics[name].value for row in front], "o-",
                       color=PALETTE[1], drawstyle="steps-post")  # fmt: skip
            for row in front:
                panel.annotate(row.label, (row.costs[cost], row.metrics[name].value), fontsize=7.5, xytext=(5, 4),
                               textcoords="offset points", zorder=5,
                               bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0})  # fmt: skip
            panel.set_xlabel(COSTS[cost])
            panel.set_ylabel(format_name(name))
            panel.set_title(f"{format_name(name)} against {COSTS[cost].split(',')[0]}")
        return _save(figure, output)


def plot_dots(
    methods: Mapping[str, Mapping[str, MetricValue]],
    better: Mapping[tuple[str, str], bool | None],
    baseline: str | None,
    output: Path,
) -> Path | None:
    """Every method a line, every metric a panel: value and 95 % interval, dashed where the baseline's is.

    ``better``: by method and metric, what a test says: gray where it cannot tell, hollow where there was none. None
    without a metric.
    """
    names = list(dict.fromkeys(name for metrics in methods.values() for name in metrics))
    if not names:
        return None
    colors = {True: PALETTE[2], False: PALETTE[1], None: INK}
    across = min(len(names), 5)
    down = -(-len(names) // across)
    heights = {label: -number for number, label in enumerate(methods)}
    with matplotlib.rc_context(STYLE):
        figure = _figure(2.6 + 1.9 * across, (0.9 + 0.2 * len(methods)) * down)
        panels = np.ravel(figure.subplots(down, across, sharey=True))
        for panel, name in zip(panels, names, strict=False):
            for label, metrics in methods.items():
                if name not in metrics:
                    continue
                found, color = metrics[name], colors[better.get((label, name))]
                if found.low is not None and found.high is not None:
                    panel.plot([found.low, found.high], [heights[label]] * 2, color=color, linewidth=1.4)
                inside = color if (label, name) in better else "white"
                panel.plot(found.value, heights[label], "o", color=color, markerfacecolor=inside, markersize=4)
            if baseline is not None and name in methods.get(baseline, {}):
                panel.axvline(methods[baseline][name].value, color=INK, linewidth=0.8, linestyle="--")
            panel.set_title(
                f"{format_name(name)} {ARROWS[next(m[name].better for m in methods.values() if name in m)]}"
            )
            panel.set_yticks(list(heights.values()), list(heights), fontsize=8)
            panel.tick_params(axis="x", labelsize=8)
            panel.grid(axis="y", visible=False)
            panel.locator_params(axis="x", nbins=4)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        marks = [
            Line2D([], [], color=colors[key], marker="o", linestyle="", label=label)
            for key, label in ((True, "better than what it is tested against"), (False, "worse"), (None, "cannot tell"))
        ]
        marks.append(Line2D([], [], color=INK, markerfacecolor="white", marker="o", linestyle="", label="not tested"))
        figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
        return _save(figure, output)


def leading_metrics(table: SweepTable) -> list[str]:
    """The few that the pictures show: distance, texture, caption, fidelity, where they were measured."""
    texture = "lsd" if "lsd" in table.metrics else "lsd_garment"  # inside the garment where photos have masks
    wanted = [table.headline(), texture, "attr_pattern", "ssim_garment"]
    return [
        name
        for name in dict.fromkeys(wanted)
        if name in table.metrics and np.isfinite(badness(table.rows[0].metrics[name]))
    ]


def _short(key: str, value: Any) -> str:
    return f"{key.rsplit('.', 1)[-1]} {value:g}" if _is_number(value) else f"{key.rsplit('.', 1)[-1]} {value}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(max(width, 4.2), max(height, 2.6)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=DPI)
    return output
