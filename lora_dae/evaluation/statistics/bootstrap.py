"""Intervals by resampling images: weights, replicates, and what an interval around a value means."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import Tensor

Z95 = 1.959964  # standard deviations on each side that hold 95 % of a normal distribution


def bootstrap_weights(n: int, replicates: int, seed: int) -> Tensor:
    """How often each of ``n`` images is in each bootstrap sample: (replicates, n) float64, rows sum to n.

    The same (n, replicates, seed) gives the same samples: two methods measured on the same prompts are
    resampled together, so that the difference of their replicates is a paired bootstrap.
    """
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
    return torch.from_numpy(counts).double()


def bootstrap_interval(value: float, replicates: Tensor) -> tuple[float, float]:
    """95 % interval: ``value`` plus and minus about 1.96 standard deviations of its replicates (R,).

    Not their percentiles: a bootstrap sample holds about 63 % distinct images, and Frechet distances and
    Inception scores depend on that number, so that the replicates of a Frechet distance lie above the value.
    The interval says how far the value varies at this number of images; it does not correct its bias. Student's
    quantile instead of 1.96: a jackknife over groups has few replicates. A replicate that caught no image with a value
    (NaN) does not count.
    """
    finite = replicates[torch.isfinite(replicates)]
    half = float(stats.t.ppf(0.975, max(len(finite) - 1, 1))) * finite.std().item()
    return value - half, value + half


def wilson_interval(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); right for 0 of n and n of n, where a bootstrap is not."""
    share = successes / n
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(center - half, 0.0), min(center + half, 1.0)


def weighted_means(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of per-image values (N,) for each re-weighting (R, N); NaN is left out. Gives (R,) float64."""
    valid = torch.isfinite(values)
    filled = torch.where(valid, values, 0.0).double()
    return (weights.double() @ filled) / (weights.double() @ valid.double())
