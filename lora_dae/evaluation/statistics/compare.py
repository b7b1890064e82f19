"""Do two methods differ? Paired tests over the same prompts, corrected for how many were made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_dae.config import ConfigError

EXACT_UP_TO = 12  # pairs that differ: all 4096 sign patterns are counted instead of drawn
Verdict = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Comparison:
    """``difference``: mean of method - baseline over ``pairs`` prompts; ``p``: two-sided; ``p_holm``: corrected."""

    difference: float
    low: float
    high: float
    pairs: int
    p: float
    p_holm: float
    verdict: Verdict

    def words(self) -> str:
        return (
            f"{self.verdict} (difference {self.difference:+.3g} [{self.low:.3g}, {self.high:.3g}], p {self.p_holm:.2g})"
        )


def sign_flip_p(differences: np.ndarray, draws: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of the paired permutation test: how often random signs give a mean as far from zero.

    ``differences`` (N,) of paired values; NaN (one of the two is missing) and ties take no part. Exact up to 12 pairs
    that differ, else ``draws`` random sign patterns with the observed one among them (so p is never 0). 1 without any
    difference. Source: Fisher 1935; Phipson and Smyth 2010 for the draws.
    """
    d = differences[np.isfinite(differences) & (differences != 0)].astype(float)
    n = len(d)
    if n == 0:
        return 1.0
    observed = abs(d.sum()) * (1 - 1e-12)  # rounding must not part equal sums
    if n <= EXACT_UP_TO:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2 * patterns - 1) @ d) >= observed).mean())
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, draws, 1000):
        signs = rng.integers(0, 2, (min(1000, draws - start), n), dtype=np.int8) * 2 - 1
        hits += int((np.abs(signs @ d) >= observed).sum())
    return (hits + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down method (Holm 1979); order kept, at most 1."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected.tolist()


def compare_paired(
    methods: Sequence[np.ndarray],
    baselines: Sequence[np.ndarray],
    better: Literal["higher", "lower"] = "higher",
    alpha: float = 0.05,
    seed: int = 0,
) -> list[Comparison]:
    """Compare each method (N,) with its baseline (N,), value i of both from prompt i; Holm over the whole list.

    The interval is the paired bootstrap's (1000 samples of the prompts); the verdict is by the corrected p. Raises
    ConfigError when a method and its baseline have different numbers of values.
    """
    rows = []
    for method, baseline in zip(methods, baselines, strict=True):
        if len(method) != len(baseline):
            raise ConfigError(
                f"a paired comparison needs the same prompts on both sides, got {len(method)} and {len(baseline)}."
            )
        d = np.asarray(method, float) - np.asarray(baseline, float)
        valid = d[np.isfinite(d)]
        if len(valid) == 0:
            rows.append((math.nan, math.nan, math.nan, 0, 1.0))
            continue
        counts = np.random.default_rng(seed).multinomial(len(valid), np.full(len(valid), 1 / len(valid)), size=1000)
        half = 1.959964 * (counts @ valid / len(valid)).std(ddof=1)
        mean = float(valid.mean())
        rows.append((mean, mean - half, mean + half, len(valid), sign_flip_p(valid, seed=seed)))
    corrected = holm([row[4] for row in rows])
    return [Comparison(*row, p, _verdict(row[0], p, better, alpha)) for row, p in zip(rows, corrected, strict=True)]


def _verdict(difference: float, p: float, better: str, alpha: float) -> Verdict:
    if not p <= alpha:
        return "cannot tell"
    return "better" if (difference > 0) == (better == "higher") else "worse"
