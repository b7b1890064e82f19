"""What a diagnosis found: in sentences, as a table, as plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lora_dae.evaluation.report.plots import INK, PALETTE, STYLE

BANDS = ("fine", "middle", "coarse")
SHOWN = 6


@dataclass(frozen=True)
class Diagnosis:
    """Lists over timesteps or steps of one number per band, finest first."""

    timesteps: list[int]
    slope: list[list[float]]
    missing: list[list[float]]
    steps: list[int]  # timestep that each step left
    energy: dict[str, list[list[float]]]  # by row, the state's energy over that of really noised photos
    confidence: dict[str, float] | None  # of the matches: "garment", "beside"; needs masks
    # Mean of the finest band's gate, with the pair's own source and with the next pair's, and the 95 % interval of what
    # the own one has more: "own", "other", "low", "high".
    gates: dict[str, float] | None

    def verdict(self) -> list[str]:
        """What a user should know, in sentences."""
        sentences = []
        for name, ratios in self.energy.items():
            said = [f"{band} {ratio:.2f}" for band, ratio in zip(BANDS, ratios[-1], strict=True)]
            few = [band for band, ratio in zip(BANDS, ratios[-1], strict=True) if ratio < 0.9]
            many = [band for band, ratio in zip(BANDS, ratios[-1], strict=True) if ratio > 1.1]
            found = [f"lacks texture ({', '.join(few)})"] * bool(few) + [f"has too much ({', '.join(many)})"] * bool(
                many
            )
            what = " and ".join(found) or "is right"
            sentences.append(f"{name}: final energy over that of real photos {', '.join(said)}: {what}.")
        if self.confidence is not None:
            on, beside = self.confidence["garment"], self.confidence["beside"]
            sentences.append(f"matches: confidence {on:.2f} on the garment, {beside:.2f} beside it.")
        if self.gates is not None:
            own, other, low = (self.gates[key] for key in ("own", "other", "low"))
            told = (
                "the module tells them apart" if low > 0 else "the module cannot tell them apart: do the pairs match?"
            )
            sentences.append(f"gates: {own:.2f} open with a pair's own source, {other:.2f} with another one's: {told}.")
        return sentences


def as_table(found: Diagnosis) -> Table:
    """Late timesteps' means, a band a row."""
    table = Table("band", "slope, t <= 300", "missing energy, t <= 300", *(f"final energy, {n}" for n in found.energy))
    late = [k for k, t in enumerate(found.timesteps) if t <= 300]
    for b, band in enumerate(BANDS):
        slope = np.mean([found.slope[k][b] for k in late])
        missing = np.mean([found.missing[k][b] for k in late])
        table.add_row(band, f"{slope:.3f}", f"{missing:.3f}", *(f"{r[-1][b]:.2f}" for r in found.energy.values()))
    return table


def plot_energies(found: Diagnosis, output: Path) -> None:
    """Calibration and missing energy over timesteps, and energy along the chain."""
    with matplotlib.rc_context({**STYLE, "savefig.transparent": False}):
        figure = Figure(figsize=(15, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        for b, band in enumerate(BANDS):
            middle.plot(found.timesteps, [row[b] for row in found.missing], color=PALETTE[b], marker="o", label=band)
            left.plot(found.timesteps, [row[b] for row in found.slope], color=PALETTE[b], marker="o", label=band)
            for (name, ratios), style in zip(found.energy.items(), ("-", "--"), strict=False):
                label = f"{band}, {name}"
                right.plot(found.steps, [row[b] for row in ratios], style, color=PALETTE[b], label=label)
        for axes, title, unit, right_value in (
            (left, "Calibration of the network, teacher-forced", "slope <x0, x0^> / <x0^, x0^>", 1),
            (middle, "Missing energy of its x0, teacher-forced", "1 - |x0^|^2 / explained", 0),
            (right, "Energy along the chain, on-policy", "state / really noised photos", 1),
        ):
            axes.axhline(right_value, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(title)
            axes.set_xlabel("timestep")
            axes.set_ylabel(unit)
            axes.invert_xaxis()
            axes.legend(fontsize=8)
        figure.savefig(output, dpi=130)


def plot_matches(sources: np.ndarray, images: Tensor, maps: dict[str, Tensor], output: Path) -> None:
    """The first sources (N, H, W, 3), what was drawn (N, 3, H, W) in [0, 1], and maps (N, h, w) in columns."""
    count = min(SHOWN, len(sources))
    columns = ["source", "image", *maps]
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "savefig.transparent": False}):
        figure = Figure(figsize=(2 * len(columns), 2 * count), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(count, len(columns), squeeze=False)
        for r in range(count):
            shown = [sources[r], images[r].permute(1, 2, 0).cpu().numpy(), *(m[r].cpu().numpy() for m in maps.values())]
            for axes, name, picture in zip(grid[r], columns, shown, strict=True):
                axes.imshow(picture, vmin=0, vmax=None if name == "displacement" else 1)
                axes.set_axis_off()
                if r == 0:
                    axes.set_title(name)
        figure.savefig(output, dpi=110)
