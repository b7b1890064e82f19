"""A comparison's statistics: means over training seeds, their intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lora_dae.evaluation.report.table import MetricValue

ALPHA = 0.05


@dataclass(frozen=True)
class Measured:
    """One metric of one cell: a value per training seed, and its bootstrap replicates (R,) per seed."""

    values: tuple[float, ...]
    replicates: tuple[Tensor, ...]
    better: str | None  # lower, higher, None: closer to 1
    own_pairs: bool = False  # each seed was measured on other pairs
    halves: tuple[tuple[float, float], ...] = ()  # per seed, how far its own interval reaches down and up


def standard_error(
    values: Sequence[float], replicates: Sequence[Tensor], own_pairs: bool = False
) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean over training seeds.

    Two sources add up: which images were drawn (the bootstrap's variance; the seeds share their prompts, so their mean
    is over it, or have ``own_pairs``, and it falls with their number) and which weights training found (the seeds'
    variance over their number; with ``own_pairs`` it has the images in it once more: intervals are rather too wide).
    Welch and Satterthwaite's degrees of freedom. Replicates that caught no image with a value (NaN) do not count.
    """
    finite = [r[torch.isfinite(r)] for r in replicates]
    images = float(np.mean([float(r.var()) for r in finite])) if finite else 0.0
    return _combined(values, images, _freedom(finite), own_pairs)


def _freedom(replicates: Sequence[Tensor]) -> float:
    """Of the images' variance: few replicates, as of a jackknife over groups, say it less surely."""
    return max(min((len(r) for r in replicates), default=2) - 1, 1)


def _combined(values: Sequence[float], images: float, freedom: float, own_pairs: bool) -> tuple[float, float]:
    images /= len(values) if own_pairs else 1
    seeds = float(np.var(values, ddof=1)) / len(values) if len(values) > 1 else 0.0
    parts = images**2 / freedom + (seeds**2 / (len(values) - 1) if seeds else 0.0)
    return math.sqrt(images + seeds), (images + seeds) ** 2 / parts if parts else math.inf


def summary(measured: Measured, name: str = "") -> MetricValue:
    """Mean and 95 % interval, within what ``name`` can be; without one where neither seeds nor replicates say it.

    What each seed's own interval says of the images counts, by side: that of a share is Wilson's, which is not 0 for
    all of n.
    """
    mean = float(np.mean(measured.values))
    if len(measured.values) == 1 and not measured.replicates:
        return MetricValue(mean, None, None, measured.better)  # type: ignore[arg-type]
    ends = []
    for side, sign in ((0, -1), (1, 1)):
        error, freedom = standard_error(measured.values, measured.replicates, measured.own_pairs)
        if measured.halves:
            of_images = _freedom([r[torch.isfinite(r)] for r in measured.replicates])
            wide = float(stats.t.ppf(1 - ALPHA / 2, of_images))
            images = float(np.mean([(half[side] / wide) ** 2 for half in measured.halves]))
            error, freedom = _combined(measured.values, images, of_images, measured.own_pairs)
        ends.append(mean + sign * float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error)
    least, most = possible_range(name)
    return MetricValue(mean, max(ends[0], least), min(ends[1], most), measured.better)  # type: ignore[arg-type]


def possible_range(name: str) -> tuple[float, float]:
    """The least and the most that a metric can be."""
    kind = name.split("_")[0]
    least = {"": -math.inf, "kd": -math.inf, "kid": -math.inf, "clip": -math.inf, "is": 1.0}.get(kind, 0.0)
    return least, 1.0 if kind in ("attr", "ssim", "ms", "edge") else math.inf


class Difference(NamedTuple):
    """Mean, 95 % interval (None where nothing says how far it varies) and two-sided p."""

    value: float
    low: float | None
    high: float | None
    p: float


def difference(cell: Measured, baseline: Measured) -> Difference:
    """Paired by seed and by image; of |log value| where 1 is best."""
    a, b = _distance(cell), _distance(baseline)
    values = [x - y for x, y in zip(a.values, b.values, strict=True)]
    both = zip(a.replicates, b.replicates, strict=True) if len(a.replicates) == len(b.replicates) else ()
    replicates = [x - y for x, y in both if x.shape == y.shape]
    mean = float(np.mean(values))
    if len(values) == 1 and not replicates:
        return Difference(mean, None, None, 1.0)
    error, freedom = standard_error(values, replicates, cell.own_pairs)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    return Difference(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def _distance(measured: Measured) -> Measured:
    if measured.better is not None:
        return measured
    values = tuple(abs(math.log(max(value, 1e-9))) for value in measured.values)
    logs = tuple(r.clamp_min(1e-9).log().abs() for r in measured.replicates)
    return Measured(values, logs, "lower", measured.own_pairs)
