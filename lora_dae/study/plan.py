"""Who sees what: trials of every rater, balanced over prompts and methods, sides and order at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, cycle, islice

import numpy as np

from lora_dae.config import ConfigError

QUESTIONS = ("realism", "truth")
CLEAR, DEGRADED = "check: clear", "check: degraded"  # stand for methods in attention checks
REFERENCE = "reference: garment"
MIN_CHECKS = 6  # who clicks at random passes five of them once in 56 times
CHECK_SHARE = 0.15  # of the pair trials
REPEAT_SHARE = 0.06


@dataclass(frozen=True)
class Trial:
    """One screen. ``kind``: pair | opinion | check (clear against degraded) | repeat (an earlier pair, sides swapped).

    ``left`` and ``right`` are methods; an opinion has ``left`` only. ``number`` counts a rater's trials from 0;
    ``repeat_of`` is the number of the earlier trial.
    """

    number: int
    kind: str
    question: str
    item: int
    left: str
    right: str | None = None
    repeat_of: int | None = None


def plan(
    num_items: int, methods: Sequence[str], raters: int, pairs: int, opinions: int, with_reference: bool, seed: int
) -> list[list[Trial]]:
    """Trials of each rater: ``pairs`` comparisons and ``opinions`` single pictures, and attention checks among them.

    Raters take consecutive pieces of one shuffled round of everything, so that every prompt, pair and question is shown
    equally often (to within one). Sides and order are random per rater. The question about the garment ("truth") is
    asked only ``with_reference``. Raises ConfigError for impossible numbers.
    """
    if len(methods) < 2 and pairs:
        raise ConfigError("a comparison needs two methods: give two runs, or pairs=0 for opinions alone.")
    if raters < 1 or pairs < 0 or opinions < 0 or pairs + opinions < 1:
        raise ConfigError(f"raters={raters}, pairs={pairs}, opinions={opinions}: at least one rater and one trial.")
    rng = np.random.default_rng(seed)
    questions = QUESTIONS if with_reference else QUESTIONS[:1]
    pool = [(i, a, b, q) for i in range(num_items) for a, b in combinations(methods, 2) for q in questions]
    singles = [(i, m) for i in range(num_items) for m in methods]
    if pairs > len(pool) or opinions > len(singles):
        raise ConfigError(
            f"pairs={pairs}, opinions={opinions}: there are {len(pool)} comparisons and {len(singles)} pictures, and "
            "nobody should judge one twice: ask for fewer, or give more prompts (num_samples)."
        )
    pair_stream = cycle([pool[k] for k in rng.permutation(len(pool))])
    single_stream = cycle([singles[k] for k in rng.permutation(len(singles))])
    result = []
    for _ in range(raters):
        trials = [Trial(0, "pair", q, i, *_sides(a, b, rng)) for i, a, b, q in islice(pair_stream, pairs)]
        trials += [Trial(0, "opinion", "realism", i, m) for i, m in islice(single_stream, opinions)]
        trials = [trials[k] for k in rng.permutation(len(trials))]
        checks = max(MIN_CHECKS, round(CHECK_SHARE * pairs)) if pairs else 0
        for _ in range(checks):
            check = Trial(0, "check", "realism", int(rng.integers(num_items)), *_sides(CLEAR, DEGRADED, rng))
            trials.insert(int(rng.integers(len(trials) + 1)), check)
        result.append(_with_repeats([replace(t, number=k) for k, t in enumerate(trials)], pairs, rng))
    return result


def _with_repeats(trials: list[Trial], pairs: int, rng: np.random.Generator) -> list[Trial]:
    """Some pairs of the first half come again at the end, sides swapped: how consistent is this rater?"""
    early = [t for t in trials[: len(trials) // 2] if t.kind == "pair"]
    count = min(round(REPEAT_SHARE * pairs), len(early))
    chosen = [early[k] for k in rng.permutation(len(early))[:count]]
    again = [
        replace(t, kind="repeat", left=t.right or "", right=t.left, repeat_of=t.number, number=len(trials) + k)
        for k, t in enumerate(chosen)
    ]
    return trials + again


def _sides(a: str, b: str, rng: np.random.Generator) -> tuple[str, str]:
    return (a, b) if rng.random() < 0.5 else (b, a)
