"""How a Frechet distance falls with the number of images, and where it would end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from lora_dae.evaluation.metrics.distances import frechet_from_features

POINTS = 8
LEAST = 16  # images in the smallest subset


@dataclass(frozen=True)
class SizeCurve:
    """``sizes[i]`` generated images have distance ``values[i]``; ``infinity`` is None where it is not valid."""

    sizes: list[int]
    values: list[float]
    infinity: tuple[float, float, float] | None  # value, low, high
    why_not: str | None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SizeCurve:
        """As ``dataclasses.asdict`` and JSON left it."""
        infinity = values["infinity"]
        return cls(**{**values, "infinity": None if infinity is None else tuple(infinity)})


def frechet_against_size(x: Tensor, y: Tensor, seed: int = 0, half_width: float = 0.0) -> SizeCurve:
    """Frechet distances of random subsets of features x (N, d) against all of y (M, d), from N / 4 to N images.

    The bias of the distance is about c / N, so a line in 1 / N ends at the distance of infinitely many generated
    images (FID_inf: Chong and Forsyth 2020, section 4; they start at 5000 images, here N / 4). The reference set stays
    as it is, so what M real images cost is still in it. The 95 % interval is that of the line's intercept (Student; how
    far the subsets scatter), widened by ``half_width``, that of the distance of all N images: all subsets come from the
    same ones, and the line knows nothing of others. Not valid while the smallest subset has fewer images than features:
    its covariance has no full rank, and the line is none. Empty below 64 images.
    """
    n, d = x.shape
    if n // 4 < LEAST:
        return SizeCurve([], [], None, f"needs {4 * LEAST} images")
    rng = np.random.default_rng(seed)
    sizes = [round(s) for s in 1 / np.linspace(4 / n, 1 / n, POINTS)]  # evenly spaced in 1 / N, as the line is fitted
    values = []
    for size in sizes:
        chosen = torch.from_numpy(rng.permutation(n)[:size])
        values.append(frechet_from_features(x[chosen], y))
    if n // 4 < d:
        return SizeCurve(sizes, values, None, f"needs {4 * d} images for {d} features")
    fit = stats.linregress(1 / np.array(sizes), values)
    half = math.hypot(stats.t.ppf(0.975, POINTS - 2) * fit.intercept_stderr, half_width)
    value = float(fit.intercept)
    return SizeCurve(sizes, values, (value, value - half, value + half), None)
