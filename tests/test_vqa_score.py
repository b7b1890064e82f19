"""What answers add up to: parents, missing answers, intervals, and how far judges agree."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lora_dae.vqa.ask import Answer, Task
from lora_dae.vqa.bank import GRADES, Question
from lora_dae.vqa.parse import Parsed
from lora_dae.vqa.score import ALL, interval, judges_agree, per_item, reading, with_parents


def _q(id: str, right: str | None = "yes", parents: tuple[str, ...] = (), kind: str = "yes_no") -> Question:
    return Question(id, id, kind, f"{id}?", GRADES if kind == "graded" else ("yes", "no"), right, None, parents)


def _answer(item: int, question: Question, said: str | None, methods: tuple[str, ...] = ("m",)) -> Answer:
    return Answer(Task(item, methods, (), question), said or "", Parsed(said, "strict" if said else "missing"))


def test_a_child_of_a_failed_parent_counts_zero_and_of_a_missing_one_not_at_all() -> None:
    """DSG's example: no motorcycle, so whatever color it has is wrong."""
    questions = [
        _q("there"),
        _q("blue", parents=("there",)),
        _q("dark", parents=("blue",)),
        _q("sharp", None, kind="graded"),
    ]
    said = {"there": "no", "blue": "yes", "dark": "yes", "sharp": "5"}
    assert with_parents(questions, said) == {"there": 0, "blue": 0, "dark": 0, "sharp": 1}
    assert with_parents(questions, {**said, "there": "yes", "sharp": "2"}) == {
        "there": 1,
        "blue": 1,
        "dark": 1,
        "sharp": 0.25,
    }
    missing = with_parents(questions, {**said, "there": None})
    assert math.isnan(missing["there"]) and math.isnan(missing["dark"]) and missing["sharp"] == 1


def test_missing_answers_are_left_out_of_means() -> None:
    a, b = _q("a"), _q("b")
    answers = [
        _answer(0, a, "yes"),
        _answer(0, b, None),
        _answer(1, a, "no"),
        _answer(1, b, "yes"),
        _answer(2, a, None),
    ]
    values = per_item(answers, "m", 4)
    np.testing.assert_equal(values["a"], [1, 0, math.nan, math.nan])
    np.testing.assert_equal(values["b"], [math.nan, 1, math.nan, math.nan])
    np.testing.assert_equal(values[ALL], [1, 0.5, math.nan, math.nan])
    found = reading([*answers, Answer(answers[0].task, None, Parsed(None, "missing"))])
    assert (found.parse_failures, found.unanswered, found.strict) == (2 / 6, 1 / 6, 3 / 6)


def test_judges_that_answer_alike_agree_and_others_do_not() -> None:
    questions = [_q("a"), _q("b"), _q("g", None, kind="graded")]
    same = [
        _answer(i, q, ("yes", "no")[(i * 7 + 3) % 5 % 2] if q.id != "g" else str(i % 5 + 1))
        for i in range(30)
        for q in questions
    ]
    flipped = [
        _answer(a.task.item, a.task.question, {"yes": "no", "no": "yes"}.get(a.parsed.answer or "", "1")) for a in same
    ]
    assert judges_agree({"one": same, "two": same}) == pytest.approx({"a": 1, "b": 1, "g (graded)": 1})
    assert all(alpha < 0 for alpha in judges_agree({"one": same, "two": flipped}).values())


def test_scores_agree_by_their_distance() -> None:
    question = _q("s", None, kind="score")
    one = [_answer(i, question, f"{i / 10:.1f}") for i in range(10)]
    near = [_answer(i, question, f"{i / 10 + 0.01:.2f}") for i in range(10)]
    assert 0.98 < judges_agree({"one": one, "near": near})["s (score)"] < 1


def test_a_subjects_agreement_is_the_mean_of_its_questions_own() -> None:
    """Twenty pictures of one mind, alpha 1; ten of opposite minds, half yes: 1 - 19 * 20 / 200 = -0.9."""
    alike, opposite = (replace(_q(id), about="look") for id in ("alike", "opposite"))
    words = ("yes", "no")
    shared = [_answer(i, alike, words[i % 2]) for i in range(20)]
    one = [*shared, *(_answer(i, opposite, words[i % 2]) for i in range(10))]
    two = [*shared, *(_answer(i, opposite, words[1 - i % 2]) for i in range(10))]
    assert judges_agree({"one": one, "two": two}) == pytest.approx({"look": (20 * 1 - 10 * 0.9) / 30})


def test_all_right_is_no_certainty() -> None:
    """Thirty-two of 32: the interval of scipy's Wilson, where a bootstrap would say 1 to 1."""
    found, expected = interval(np.ones(32), 50, 0), stats.binomtest(32, 32).proportion_ci(method="wilson")
    assert found.value == 1 and (found.low, found.high) == pytest.approx((expected.low, 1), abs=1e-4)
    assert found.low < 0.9
