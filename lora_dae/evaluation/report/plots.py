"""Pictures about numbers: training curves and texture spectra.

Plots have no background of their own and gray text, so that they read on the light and on the dark page of
a report alike.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics.extrapolate import SizeCurve
from lora_dae.evaluation.metrics.texture import BAND_LABELS, GROUPS

# Told apart also with a color-vision deficiency, on white as on near-black (after Okabe and Ito 2008).
PALETTE = ("#3b82c4", "#e07b39", "#2a9d76", "#b565a7", "#c9a227", "#6b7a8f")
INK = "#7d8590"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": INK,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "savefig.transparent": True,
}


def read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Columns of Lightning's metrics.csv: name -> (steps, values), without empty and non-finite cells.

    With what a resumed run had logged before (``log_files``), up to where it went on.
    """
    files = log_files(path)
    if not files:
        raise ConfigError(f"there is no training log at {path}; give the folder of a run that has trained.")
    rows: list[dict[str, str]] = []
    for one in files:
        with one.open(newline="", encoding="utf-8") as file:
            later = [row for row in csv.DictReader(file) if row.get("step")]
        if later:  # steps after the checkpoint were done again
            start = float(later[0]["step"])
            rows = [row for row in rows if float(row["step"]) < start] + later
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, cell in row.items():
            if name in ("step", "epoch") or not cell:
                continue
            value = float(cell)
            if math.isfinite(value):
                steps, values = columns.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(value)
    return columns


def log_files(path: Path) -> list[Path]:
    """The files of a log, in the order of writing: those of before a run was resumed, then ``path``; [] if none is."""
    before = path.parent.glob(f"{path.stem}_before_*{path.suffix}")
    files = sorted(before, key=lambda file: int(file.stem.rpartition("_")[2]))
    return [*files, path] if path.is_file() else files


def plot_curves(metrics_csv: Path, output: Path, columns: Mapping[str, str], title: str, ylabel: str = "loss") -> Path:
    """Draw columns (legend label -> column name) of metrics.csv over the training step; returns ``output``.

    A densely logged column is shown as a pale raw line under its running mean, a sparse one (validation) with
    its points marked. Raises ConfigError when no column is in the log. ``output`` ends in .svg or .png.
    """
    found = read_metrics(metrics_csv)
    shown = {label: found[name] for label, name in columns.items() if name in found}
    if not shown:
        raise ConfigError(f"{metrics_csv} holds none of {', '.join(columns.values())}; it has {', '.join(found)}.")
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(title)
        for color, (label, (steps, values)) in zip(cycle(PALETTE), shown.items(), strict=False):
            if len(steps) > 40:
                axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
                axes.plot(steps, running_mean(values, window=max(5, len(values) // 40)), color=color, label=label)
            else:
                axes.plot(steps, values, color=color, marker="o", markersize=3.5, label=label)
        smooth = np.concatenate([running_mean(v, 5) for _, v in shown.values()])
        low, high = np.quantile(smooth, [0.0, 0.995])
        margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)  # a single spike must not flatten the curve
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.legend(loc="upper right")
        return _save(figure, output)


def plot_band_power(
    spectra: Mapping[str, Tensor],
    real: Tensor,
    output: Path,
    title: str = "Texture power against real photos",
) -> Path:
    """Draw the band power (``BandPower.spectrum()``, (bands,)) of each method over that of real photos.

    Logarithmic; the line at 1 is a real photo's texture. The words low, mid and high mark the table's groups.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(title)
        x = np.arange(len(BAND_LABELS))
        axes.axhline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.text(len(x) - 0.6, 1, "real photos ", fontsize=8.5, ha="right", va="bottom")
        for color, (label, spectrum) in zip(cycle(PALETTE), spectra.items(), strict=False):
            axes.plot(x, (spectrum / real).numpy(), color=color, marker="o", markersize=4, label=label)
        for name, (first, last) in GROUPS.items():
            axes.text(
                (first + last - 1) / 2,
                1.01,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=8.5,
            )
            if first:
                axes.axvline(first - 0.5, color=INK, linewidth=0.8, alpha=0.35)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        high *= (high / low) ** 0.1  # room for the words
        axes.set_ylim(low, high)
        fine = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2)
        coarse = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        ticks = [t for t in (fine if low > 0.4 and high < 2.2 else coarse) if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.grid(axis="x", visible=False)
        axes.minorticks_off()
        axes.set_xticks(x, BAND_LABELS)
        axes.set_xlim(-0.4, len(x) - 0.6)
        axes.set_xlabel("spatial frequency, cycles per image at 128 pixels")
        axes.set_ylabel("generated / real")
        axes.set_title(title, pad=20)
        axes.legend(loc="best")
        return _save(figure, output)


def plot_sizes(curves: Mapping[str, Mapping[str, SizeCurve]], folder: Path) -> list[Path]:
    """A Frechet distance over 1 / N for each metric (``<metric>_against_size.svg``); none for too few images.

    What is a line here is bias: at 1 / N = 0 it would be gone. Where the line is valid its end is marked with its
    interval.
    """
    written = []
    for metric, of_method in curves.items():
        shown = {method: curve for method, curve in of_method.items() if curve.sizes}
        if not shown:
            continue
        with matplotlib.rc_context(STYLE):
            figure, axes = _figure(f"{metric} against the number of images")
            for color, (method, curve) in zip(cycle(PALETTE), shown.items(), strict=False):
                x = 1 / np.array(curve.sizes)
                axes.plot(x, curve.values, color=color, marker="o", markersize=4, label=method)
                if curve.infinity is not None:
                    value, low, high = curve.infinity
                    axes.errorbar(
                        [0], [value], [[value - low], [high - value]], color=color, marker="s", markersize=4, capsize=3
                    )
            sizes = next(iter(shown.values())).sizes
            axes.set_xticks([1 / n for n in sizes[::2]], [f"1/{n}" for n in sizes[::2]])
            axes.set_xlim(left=0)
            axes.set_xlabel("1 / number of generated images (0: infinitely many)")
            axes.set_ylabel(metric)
            axes.legend(loc="best")
            written.append(_save(figure, folder / f"{metric}_against_size.svg"))
    return written


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean over a centered window, cut off at both ends, same length."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first = np.maximum(index - window // 2, 0)
    last = np.minimum(index + window // 2, len(values) - 1)
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _figure(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.8, 3.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _save(figure: Figure, output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=180)
    return output
