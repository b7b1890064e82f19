"""Strengths of methods from pairwise votes: Bradley-Terry with ties (Davidson 1970), weighted and bootstrapped."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import minimize

from lora_dae.config import ConfigError
from lora_dae.evaluation.statistics.bootstrap import Z95, wilson_interval
from lora_dae.evaluation.statistics.compare import holm, sign_flip_p

RIDGE = 1e-3  # votes' worth of pull to equal strengths: without it a method that never lost would be infinite
SHARES = (  # said wherever they are shown
    "Shares: Wilson's 95 % interval for as many independent votes as these are worth, since those of one rater, and "
    "those on one prompt, go together."
)


@dataclass(frozen=True)
class Vote:
    """One judgement of two methods on one prompt; ``winner`` is one of the two, or None for a tie."""

    rater: Hashable
    prompt: Hashable
    a: str
    b: str
    winner: str | None


@dataclass(frozen=True)
class Strengths:
    """Log strengths (mean 0; nats: +0.69 = twice the odds) with 95 % intervals, and the tie parameter."""

    methods: list[str]
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    tie: float


@dataclass(frozen=True)
class WinRate:
    """``a`` against ``b``: counts, share of wins with a tie as half a win, and its 95 % interval."""

    a: str
    b: str
    wins: int
    losses: int
    ties: int
    share: float
    low: float
    high: float


def win_rates(votes: Sequence[Vote], methods: Sequence[str]) -> list[WinRate]:
    """Every pair of methods that was voted on, in the order of ``methods``."""
    rows = []
    for i, a in enumerate(methods):
        for b in methods[i + 1 :]:
            wins, groups = _wins(votes, a, b)
            if len(wins):
                share, worth = float(wins.mean()), _worth(wins, groups)
                low, high = wilson_interval(share * worth, worth)
                counts = (int((wins == 1).sum()), int((wins == 0).sum()), int((wins == 0.5).sum()))
                rows.append(WinRate(a, b, *counts, share, low, high))
    return rows


def judged_win_rates(
    votes: Mapping[str, Sequence[Vote]], methods: Sequence[str], alpha: float = 0.05
) -> dict[str, list[dict[str, Any]]]:
    """Win rates of each question as dictionaries, with ``p_holm`` and ``verdict`` (of a against b).

    The verdict is that of the largest p of up to three tests: a sign-flip test on the mean vote of each prompt, one on
    that of each rater, and, where there are several of both, that of the share's own interval, in which both kinds of
    variance stand together (where they point to different sides it cannot tell); corrected by Holm's method for all
    questions and pairs together.
    """
    rows = [(question, row) for question, some in votes.items() for row in win_rates(some, methods)]
    tests = [_vote_test(votes[question], row) for question, row in rows]
    corrected = holm([p for p, _ in tests])
    result: dict[str, list[dict[str, Any]]] = {question: [] for question in votes}
    for (question, row), (_, side), p in zip(rows, tests, corrected, strict=True):
        said = "cannot tell" if p > alpha or side == 0 else ("better" if side > 0 else "worse")
        result[question].append({**asdict(row), "p_holm": p, "verdict": said})
    return result


def _vote_test(votes: Sequence[Vote], row: WinRate) -> tuple[float, float]:
    """(p, side of the mean that was tested: 1 for a, -1 for b, 0 where they do not agree)."""
    wins, groups = _wins(votes, row.a, row.b)
    found, sides = [], []
    for group in groups:
        means = np.bincount(group, 2 * wins - 1) / np.bincount(group)
        found.append(sign_flip_p(means))
        sides.append(float(np.sign(means.mean())))
    if len(groups) > 1 and np.ptp(wins) > 0:  # votes that are all alike have no variance to be judged by
        found.append(math.erfc(math.sqrt(2 * _worth(wins, groups)) * abs(row.share - 0.5)))
        sides.append(float(np.sign(row.share - 0.5)))
    if len(set(sides)) > 1:
        return 1.0, 0.0
    return max(found, default=1.0), sides[0] if sides else 0.0


def _wins(votes: Sequence[Vote], a: str, b: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Votes on ``a`` against ``b`` (N,): 1, 0, a tie 0.5; and the numbers of their prompts, and of their raters, (N,).

    Prompts or raters of which there is one alone are left out: nothing can be said of others by it.
    """
    own = [v for v in votes if {v.a, v.b} == {a, b}]
    groups = []
    for keys in ([v.prompt for v in own], [v.rater for v in own]):
        distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        if len(distinct) > 1:
            groups.append(np.array([distinct[key] for key in keys]))
    return np.array([0.5 if v.winner is None else float(v.winner == a) for v in own]), groups


def _worth(wins: np.ndarray, groups: Sequence[np.ndarray]) -> int:
    """How many independent votes ``wins`` are worth: those on one prompt, and those of one rater, go together.

    By the variance of their share, clustered in both ways (Cameron, Gelbach and Miller 2011), with Student's quantile
    for the fewer of prompts and raters (Korn and Graubard 1998). Votes that are all alike are worth that fewer number.
    """
    sizes = [int(group.max()) + 1 for group in groups]
    fewest = min(sizes, default=1)
    rest = wins - wins.mean()
    own = float((rest**2).sum())
    if own == 0 or fewest in (1, len(wins)):
        return fewest
    parts = [float((np.bincount(g, rest) ** 2).sum()) * k / (k - 1) for g, k in zip(groups, sizes, strict=True)]
    variance = max(own, *parts, sum(parts) - own) / len(wins) ** 2
    few = Z95 / float(stats.t.ppf(0.975, fewest - 1))
    return int(np.clip(wins.mean() * (1 - wins.mean()) / variance * few**2, 1, len(wins)))


def davidson(wins: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, float]:
    """Maximum likelihood of Davidson's model: log strengths (K,) of mean 0, and nu >= 0 (0: no ties, Bradley-Terry).

    ``wins`` (K, K): how often i won against j; ``ties`` (K, K) symmetric. P(i beats j) = p_i / (p_i + p_j + nu *
    sqrt(p_i p_j)), P(tie) = nu * sqrt(p_i p_j) / same. A ridge of 0.001 votes keeps a method that never lost finite.
    Source: Davidson 1970, "On extending the Bradley-Terry model to accommodate ties", equations 2.5 and 2.6.
    """
    k = len(wins)
    upper = np.triu(ties, 1)
    has_ties = upper.sum() > 0
    meetings = np.triu(wins + wins.T, 1) + upper

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        s, log_nu = x[:k], x[k] if has_ties else -np.inf
        mean = (s[:, None] + s[None, :]) / 2
        parts = np.stack([np.broadcast_to(s[:, None], (k, k)), np.broadcast_to(s[None, :], (k, k)), log_nu + mean])
        top = parts.max(axis=0)
        log_sum = top + np.log(np.exp(parts - top).sum(axis=0))
        p_i, p_j, p_tie = np.exp(parts - log_sum)
        value = -(wins * s[:, None]).sum() + (meetings * log_sum).sum()
        grad = -wins.sum(axis=1)
        grad = grad + (meetings * (p_i + p_tie / 2)).sum(axis=1) + (meetings * (p_j + p_tie / 2)).sum(axis=0)
        grad = grad - (upper.sum(axis=1) + upper.sum(axis=0)) / 2
        value += RIDGE * (s**2).sum() / 2
        grad = grad + RIDGE * s
        if not has_ties:
            return float(value), np.append(grad, 0.0)
        value -= (upper * (log_nu + mean)).sum()
        return float(value), np.append(grad, (meetings * p_tie).sum() - upper.sum())

    found = minimize(loss, np.zeros(k + 1), jac=True, method="L-BFGS-B", bounds=[(-15, 15)] * (k + 1))
    strengths = found.x[:k] - found.x[:k].mean()
    return strengths, float(np.exp(found.x[k])) if has_ties else 0.0


def strengths(votes: Sequence[Vote], methods: Sequence[str], replicates: int = 300, seed: int = 0) -> Strengths:
    """Davidson strengths of ``methods``, 95 % intervals by a bootstrap over raters and over prompts at once.

    Resampling raters as well as prompts: votes of one rater, and votes on one prompt, are no independent draws.
    Raises ConfigError without votes or with a method that nobody voted on.
    """
    if not votes:
        raise ConfigError("there is no vote to compute strengths from; collect some first.")
    seen = {m for v in votes for m in (v.a, v.b)}
    for method in methods:
        if method not in seen:
            raise ConfigError(f"nobody voted on {method!r}: leave it out, or collect votes on it.")
    value, tie = davidson(*_counts(votes, methods, np.ones(len(votes))))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(replicates):
        weights = _resample([v.rater for v in votes], rng) * _resample([v.prompt for v in votes], rng)
        if weights.sum() > 0:
            drawn.append(davidson(*_counts(votes, methods, weights))[0])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0) if drawn else (value * np.nan, value * np.nan)
    return Strengths(list(methods), value, low, high, tie)


def _resample(keys: Sequence[Hashable], rng: np.random.Generator) -> np.ndarray:
    """How often each entry is drawn when the distinct keys are resampled; all stay when there is only one key."""
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    if len(distinct) == 1:
        return np.ones(len(keys))
    counts = rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)))
    return counts[[distinct[key] for key in keys]].astype(float)


def _counts(votes: Sequence[Vote], methods: Sequence[str], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """wins (K, K): row beat column; ties (K, K): symmetric."""
    index = {name: i for i, name in enumerate(methods)}
    wins, ties = np.zeros((len(methods),) * 2), np.zeros((len(methods),) * 2)
    for vote, weight in zip(votes, weights, strict=True):
        i, j = index[vote.a], index[vote.b]
        if vote.winner is None:
            ties[i, j] += weight
            ties[j, i] += weight
        elif vote.winner == vote.a:
            wins[i, j] += weight
        else:
            wins[j, i] += weight
    return wins, ties
