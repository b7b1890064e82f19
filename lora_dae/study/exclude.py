"""Whose votes do not count: rules that are written into a study when it is made, before anybody votes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lora_dae.study.plan import CLEAR
from lora_dae.study.store import VoteRow


@dataclass(frozen=True)
class Rules:
    """A rater is excluded who passes too few attention checks, is too fast, or always takes one side."""

    min_checks: int = 2  # fewer seen: nothing can be said, the rater stays
    min_passed: float = 0.75  # share of the checks
    min_seconds: float = 0.7  # median time of a vote
    max_one_side: float = 0.95  # share of left, or of right, among the pairs ...
    min_pairs: int = 20  # ... if there are at least so many


def excluded(votes: Sequence[VoteRow], rules: Rules) -> dict[int, str]:
    """Rater -> why, for those whose votes do not count."""
    of_rater: dict[int, list[VoteRow]] = defaultdict(list)
    for vote in votes:
        of_rater[vote.rater].append(vote)
    result = {}
    for rater, own in of_rater.items():
        checks = [passed(v) for v in own if v.kind == "check"]
        seconds = median(v.seconds for v in own)
        sides = [v.answer for v in own if v.kind in ("pair", "repeat")]
        most = max(sides.count(s) for s in ("left", "right"))  # many ties are an opinion
        if len(checks) >= rules.min_checks and sum(checks) < rules.min_passed * len(checks):
            result[rater] = f"passed {sum(checks)} of {len(checks)} attention checks"
        elif seconds < rules.min_seconds:
            result[rater] = f"median time of a vote {seconds:.2f} s"
        elif len(sides) >= rules.min_pairs and most > rules.max_one_side * len(sides):
            result[rater] = f"took one side in {most} of {len(sides)} pairs"
    return result


def passed(check: VoteRow) -> bool:
    """Whether the clear picture was taken for the real one; a tie is not."""
    return {"left": check.left, "right": check.right}.get(check.answer) == CLEAR
