"""How far raters or judges agree: Krippendorff's alpha, for votes, grades and missing answers alike."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from lora_dae.config import ConfigError

Level = Literal["nominal", "ordinal", "interval"]


def krippendorff_alpha(ratings: np.ndarray, level: Level = "nominal") -> float:
    """Krippendorff's alpha: 1 = all agree, 0 = as by chance, below 0 = they disagree on purpose.

    ``ratings`` (raters, units) float, NaN where a rater did not rate a unit; units with fewer than two ratings do not
    count. ``level``: what a difference means: nominal (votes), ordinal (grades), interval. NaN when nothing can be
    compared or every rating is the same. Source: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    Raises ConfigError when ``ratings`` is not a table or the level is unknown.
    """
    if ratings.ndim != 2:
        raise ConfigError(f"agreement needs a table of raters x units, got {ratings.ndim} dimensions.")
    if level not in ("nominal", "ordinal", "interval"):
        raise ConfigError(f"level={level} is unknown: use nominal, ordinal or interval.")
    values = np.unique(ratings[np.isfinite(ratings)])
    counts = np.stack([(ratings == v).sum(axis=0) for v in values], axis=1).astype(float) if len(values) else None
    if counts is None:
        return math.nan
    counts = counts[counts.sum(axis=1) >= 2]
    if not len(counts):
        return math.nan
    per_unit = counts.sum(axis=1, keepdims=True)
    pairs = (counts / (per_unit - 1)).T @ counts  # ordered pairs within a unit, a rating with itself included ...
    pairs -= np.diag((counts / (per_unit - 1)).sum(axis=0))  # ... and taken out again
    totals = pairs.sum(axis=1)
    distance = _distance(values, totals, level)
    expected = (np.outer(totals, totals) * distance).sum()
    if expected == 0:
        return math.nan
    return float(1 - (totals.sum() - 1) * (pairs * distance).sum() / expected)


def _distance(values: np.ndarray, totals: np.ndarray, level: Level) -> np.ndarray:
    """Squared differences of the values (V, V)."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        return (values[:, None] - values[None, :]) ** 2
    below = np.cumsum(totals) - totals / 2  # rank of a value: all below it and half of its own
    return (below[:, None] - below[None, :]) ** 2
