"""What answers add up to: scores per method and subject, agreement between judges, and whether a judge sees texture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lora_dae.evaluation.report.table import MetricValue
from lora_dae.evaluation.statistics.agreement import Level, krippendorff_alpha
from lora_dae.evaluation.statistics.bootstrap import (
    bootstrap_interval,
    bootstrap_weights,
    weighted_means,
    wilson_interval,
)
from lora_dae.evaluation.statistics.compare import Comparison, compare_paired
from lora_dae.vqa.ask import Answer
from lora_dae.vqa.bank import Question

ALL = "all"  # the mean over every question of a prompt that has a right answer or a grade
LEVELS: dict[str, Level] = {"graded": "ordinal", "score": "interval"}


@dataclass(frozen=True)
class Reading:
    """How a judge's texts could be read: shares of all its questions."""

    questions: int
    strict: float
    tolerant: float
    parse_failures: float
    unanswered: float


def reading(answers: Sequence[Answer]) -> Reading:
    n = max(len(answers), 1)
    answered = [a for a in answers if a.raw is not None]
    counts = {how: sum(a.parsed.how == how for a in answered) / n for how in ("strict", "tolerant", "missing")}
    unanswered = (len(answers) - len(answered)) / n
    return Reading(len(answers), counts["strict"], counts["tolerant"], counts["missing"], unanswered)


def own_score(question: Question, answer: str | None) -> float:
    """1 right, 0 wrong; a grade g of 5 as (g - 1) / 4; a score's probability; NaN for a missing answer."""
    if answer is None:
        return math.nan
    if question.kind == "graded":
        return (int(answer) - 1) / 4
    if question.kind == "score":
        return float(answer)
    return float(answer == question.right)


def with_parents(questions: Sequence[Question], answers: Mapping[str, str | None]) -> dict[str, float]:
    """Scores of one picture's questions by id: 0 where a parent failed, NaN where a parent is missing.

    ``questions`` in the bank's order (parents first). A graded parent fails at its worst grade only. Source: DSG, Cho
    et al. 2024, section 3.1: a child is valid only if its parents are answered positively.
    """
    scores: dict[str, float] = {}
    for q in questions:
        parents = [scores[p] for p in q.parents if p in scores]
        if any(p == 0 for p in parents):
            scores[q.id] = 0.0
        elif any(math.isnan(p) for p in parents):
            scores[q.id] = math.nan
        else:
            scores[q.id] = own_score(q, answers.get(q.id))
    return scores


def per_item(answers: Sequence[Answer], method: str, num_items: int) -> dict[str, np.ndarray]:
    """Subject (and "all") -> mean score per prompt (num_items,), NaN where nothing can be said."""
    of_item: dict[int, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.task.methods == (method,):
            of_item[answer.task.item].append(answer)
    subjects = dict.fromkeys(a.task.question.about for rows in of_item.values() for a in rows)
    values = {name: np.full(num_items, math.nan) for name in [*subjects, ALL]}
    for item, rows in of_item.items():
        questions = [a.task.question for a in rows]
        scores = with_parents(questions, {a.task.question.id: a.parsed.answer for a in rows})
        for name in values:
            asked = [q for q in questions if q.about == name or (name == ALL and q.kind != "score")]
            some = [scores[q.id] for q in asked if not math.isnan(scores[q.id])]
            if some:
                values[name][item] = float(np.mean(some))
    return values


def interval(values: np.ndarray, replicates: int, seed: int) -> MetricValue:
    """Mean over prompts with a bootstrap interval over prompts; NaN prompts do not count."""
    if not np.isfinite(values).any():
        return MetricValue(math.nan, None, None, "higher")
    tensor = torch.from_numpy(values)
    mean = tensor.nanmean().item()
    drawn = weighted_means(tensor, bootstrap_weights(len(values), replicates, seed))
    drawn = drawn[torch.isfinite(drawn)]
    finite = values[np.isfinite(values)]
    if np.isin(finite, (0, 1)).all():  # a bootstrap of 32 right of 32 would claim certainty
        low, high = wilson_interval(finite.sum(), len(finite))
    else:
        low, high = bootstrap_interval(mean, drawn)
    return MetricValue(mean, max(low, 0.0), min(high, 1.0), "higher", drawn)


def compare_methods(
    scores: Mapping[str, Mapping[str, np.ndarray]], methods: Sequence[str]
) -> dict[tuple[str, str], Comparison]:
    """(method, subject) -> the method against the first one, Holm-corrected over all of them together."""
    baseline = methods[0]
    pairs = [(m, s) for m in methods[1:] for s in scores[m] if s in scores[baseline]]
    rows = compare_paired([scores[m][s] for m, s in pairs], [scores[baseline][s] for _, s in pairs])
    return dict(zip(pairs, rows, strict=True))


def judges_agree(answers: Mapping[str, Sequence[Answer]]) -> dict[str, float]:
    """Krippendorff's alpha between judges per subject: nominal, ordinal for grades, interval for scores.

    A unit is one picture; each question has its alpha, as chance agreement differs between questions, and a
    subject the mean over its questions, weighted by units. A missing answer is a missing rating; NaN where one judge
    alone answered.
    """
    asked: dict[tuple[str, str], dict[str, dict[tuple[object, ...], dict[str, float]]]]
    asked = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for judge, rows in answers.items():
        for a in rows:
            q, said = a.task.question, a.parsed.answer
            if said is not None:
                kind = q.kind if q.kind in LEVELS else ""
                number = float(said) if q.kind == "score" else float(q.options.index(said))
                asked[q.about, kind][q.id][a.task.item, a.task.methods][judge] = number
    result = {}
    for (about, kind), questions in asked.items():
        alphas, counts = [], []
        for units in questions.values():
            table = np.array([[votes.get(judge, math.nan) for votes in units.values()] for judge in answers])
            alphas.append(krippendorff_alpha(table, LEVELS.get(kind, "nominal")))
            counts.append(len(units))
        told = np.isfinite(alphas)
        name = f"{about} ({kind})" if kind else about
        result[name] = (
            float(np.average(np.array(alphas)[told], weights=np.array(counts)[told])) if told.any() else math.nan
        )
    return result
