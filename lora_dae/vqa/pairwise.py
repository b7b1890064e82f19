"""Which of two pictures: asked in both orders, and a win only where both agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from lora_dae.evaluation.statistics.preference import Vote
from lora_dae.vqa.ask import Answer, Task
from lora_dae.vqa.bank import Question


@dataclass(frozen=True)
class Outcome:
    """Votes per question, and how far the judge's answers hung on the order of the pictures.

    ``position_bias``: share of pairs that named the same place in both orders; ``first_share``: how often "first" among
    the answers that named a place; ``inconsistent``: share of pairs whose two answers contradict each other (these are
    ties); ``missing``: pairs without two readable answers (no vote).
    """

    votes: dict[str, list[Vote]]
    position_bias: float
    first_share: float
    inconsistent: float
    missing: int


def pair_tasks(
    questions: Sequence[Sequence[Question]], pictures: dict[str, list[np.ndarray]], methods: Sequence[str]
) -> list[Task]:
    """Every pair of methods on every prompt, in both orders; ``questions[i]`` are those of prompt i."""
    tasks = []
    for item, asked in enumerate(questions):
        for a, b in combinations(methods, 2):
            for question in asked:
                for order in ((a, b), (b, a)):
                    tasks.append(Task(item, order, tuple(pictures[m][item] for m in order), question))
    return tasks


def outcome(answers: Sequence[Answer], judge: str) -> Outcome:
    """Votes from the answers to ``pair_tasks``."""
    both: dict[tuple[int, frozenset[str], str], list[Answer]] = defaultdict(list)
    for answer in answers:
        both[(answer.task.item, frozenset(answer.task.methods), answer.task.question.id)].append(answer)
    votes: dict[str, list[Vote]] = defaultdict(list)
    biased = contradicting = missing = 0
    places: list[str] = []
    for (item, _, question), pair in both.items():
        said = [a.parsed.answer for a in pair]
        if len(pair) != 2 or None in said:
            missing += 1
            continue
        named = [{"first": a.task.methods[0], "second": a.task.methods[1]}.get(a.parsed.answer or "") for a in pair]
        places += [s for s in said if s in ("first", "second")]
        biased += said[0] == said[1] != "tie"
        contradicting += named[0] != named[1]
        a, b = pair[0].task.methods
        votes[question].append(Vote(judge, item, a, b, named[0] if named[0] == named[1] else None))
    counted = max(len(both) - missing, 1)
    first = places.count("first") / len(places) if places else float("nan")
    return Outcome(dict(votes), biased / counted, first, contradicting / counted, missing)
