"""Judges in this process: a tiny real vision-language model of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_vqa_score import _q
from vision_models import write_vlm

from lora_dae.config import ConfigError
from lora_dae.vqa.ask import Task, ask_all
from lora_dae.vqa.bank import PAIR_OPTIONS, Question
from lora_dae.vqa.cache import AnswerCache
from lora_dae.vqa.judges import JudgeConfig, JudgeFailedError, build_judge, enlarged
from lora_dae.vqa.score import per_item, reading


def _pictures(values: Sequence[int]) -> list[np.ndarray]:
    return [np.full((8, 8, 3), v, np.uint8) for v in values]


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm"))


def test_a_random_vision_language_model_is_deterministic_sees_pictures_and_is_never_scored(
    tiny_vlm: Path, tmp_path: Path
) -> None:
    judge = build_judge("tiny", JudgeConfig("transformers", model=str(tiny_vlm), max_tokens=8))
    questions = [_q("a"), _q("g", None, kind="graded")]
    images = _pictures([0, 90, 255])
    tasks = [Task(k, ("m",), (image,), q) for k, image in enumerate(images) for q in questions]
    tasks.append(Task(0, ("m", "n"), tuple(images[:2]), Question("p", "p", "pair", "?", PAIR_OPTIONS)))
    answers, again = (ask_all(tasks, judge, AnswerCache(tmp_path / f"{i}.sqlite")) for i in range(2))
    assert [a.raw for a in answers] == [a.raw for a in again]
    assert len({a.raw for a in answers if a.task.question.id == "a"}) > 1  # other pictures, other words
    single = [a for a in answers if len(a.task.methods) == 1]
    assert reading(single).parse_failures == 1
    assert all(np.isnan(v).all() for v in per_item(single, "m", 3).values())


def test_a_local_model_that_thinks_to_its_end_has_not_answered(tiny_vlm: Path) -> None:
    judge: Any = build_judge("tiny", JudgeConfig("transformers", model=str(tiny_vlm), max_tokens=8))
    judge.processor.decode = lambda tokens, **_: "<think>It might be"
    for told, length in (("no answer within max_tokens=8, .*raise judges.tiny.max_tokens", 8), (None, 5)):
        judge.model.generate = lambda length=length, **given: torch.cat(
            [given["input_ids"], torch.full((1, length), 40, device=judge.device)], dim=1
        )
        if told:
            with pytest.raises(JudgeFailedError, match=told):
                judge.ask(_pictures([90]), _q("a"))
        else:
            assert judge.ask(_pictures([90]), _q("a")).cut is False  # it stopped by itself: a bad answer, not a cut one


def test_vqascore_of_a_local_model_is_its_softmax(tiny_vlm: Path) -> None:
    """The probability of the tokens that spell yes, after the very input that a question would have."""
    judge: Any = build_judge("tiny", JudgeConfig("transformers", model=str(tiny_vlm)))
    question = Question("s", "vqascore", "score", "Is it red?", ("yes", "no"))
    assert not judge.takes(question)  # letters are its tokens: none of them is an answer
    tokenizer = judge.processor.tokenizer
    numbers = {word: tokenizer.convert_tokens_to_ids(letter) for word, letter in (("yes", "Y"), ("no", "n"))}
    judge._answers = {number: word for word, number in numbers.items()}  # as if these letters were the words
    picture = np.full((28, 28, 3), 90, np.uint8)
    inputs = judge.processor(images=[enlarged(picture)], text="<image>Is it red?", return_tensors="pt")
    with torch.no_grad():
        probabilities = judge.model(**inputs).logits[0, -1].softmax(0)
    told = {word: probabilities[number].item() for word, number in numbers.items()}
    assert judge.takes(question)
    assert json.loads(judge.ask([picture], question).raw) == pytest.approx(told, rel=1e-4)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path: Path, tiny_vlm: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_judge("x", JudgeConfig("transformers", model=str(tmp_path)))
