"""Put questions to a judge: cached, several at once, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from lora_dae.config import ConfigError
from lora_dae.vqa.bank import Question
from lora_dae.vqa.cache import AnswerCache, image_hash
from lora_dae.vqa.judges import PROMPT_VERSION, Judge, JudgeFailedError, JudgeRefusedError, prompt
from lora_dae.vqa.parse import Parsed, parse_answer, parse_score

GIVE_UP_AFTER = 5  # failures in a row: the endpoint is down; prompts refused, and no answer yet: it refuses all


@dataclass(frozen=True)
class Task:
    """A question about one picture, or two (uint8 (H, W, 3)), of prompt ``item``; ``methods`` made them."""

    item: int
    methods: tuple[str, ...]
    images: tuple[np.ndarray, ...]
    question: Question


@dataclass(frozen=True)
class Answer:
    """``raw`` is None when the judge failed on this question: unanswered, which is not the same as unreadable.

    ``why`` then says how it failed.
    """

    task: Task
    raw: str | None
    parsed: Parsed
    why: str | None = None


@dataclass
class _Failures:
    """``why`` by question; ``in_a_row``: without a word of the judge; ``refused``: prompts with a refused request."""

    why: dict[int, str] = field(default_factory=dict)
    in_a_row: int = 0
    refused: set[int] = field(default_factory=set)


def ask_all(
    tasks: Sequence[Task], judge: Judge, cache: AnswerCache, on_answer: Callable[[], None] | None = None
) -> list[Answer]:
    """Answers to all tasks that the judge takes, in their order; what the cache holds is not asked again.

    A question that is refused, or fails after the judge's retries, is left unanswered. What the judge was paid by
    earlier commands into this cache counts in its ``cost``. Raises ConfigError when the judge is down (5 failures in a
    row), refuses everything (questions of 5 prompts, none answered), or reaches its limits; everything answered until
    then is in the cache.
    """
    tasks = [t for t in tasks if judge.takes(t.question)]
    hashes: dict[int, str] = {id(image): "" for t in tasks for image in t.images}
    for t in tasks:
        for image in t.images:
            hashes[id(image)] = hashes[id(image)] or image_hash(image)
    keys = [(tuple(hashes[id(i)] for i in t.images), prompt(t.question), judge.key, PROMPT_VERSION) for t in tasks]
    raws: list[str | None] = [cache.get(*key) for key in keys]
    # The same picture may stand in two rows (a method that reproduces the photo): it is asked about once.
    first = {key: k for k, key in reversed(list(enumerate(keys)))}
    todo = [k for k, raw in enumerate(raws) if raw is None and first[keys[k]] == k]
    for _ in range(len(tasks) - len(todo)):
        _told(on_answer)
    failures = _Failures()
    judge.cost = max(judge.cost, cache.cost(judge.key))

    def one(k: int) -> str:
        try:
            raw = judge.ask(tasks[k].images, tasks[k].question).raw
        finally:
            if judge.cost > 0:  # also of a reply that is no answer
                cache.put_cost(judge.key, judge.cost)
        cache.put(*keys[k], raw)
        return raw

    pool = ThreadPoolExecutor(judge.concurrency)
    running: dict[Future[str], int] = {}
    waiting = iter(todo)
    try:
        for k in waiting:
            running[pool.submit(one, k)] = k
            while len(running) >= judge.concurrency:
                _collect(running, tasks, raws, failures, on_answer)
        while running:
            _collect(running, tasks, raws, failures, on_answer)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if failures.why and all(raw is None for raw in raws):
        raise ConfigError(f"{list(failures.why.values())[-1]} (None of its {len(tasks)} questions was answered.)")
    asked = [first[key] for key in keys]
    return [
        Answer(t, raws[k], _parsed(raws[k], t.question), failures.why.get(k)) for t, k in zip(tasks, asked, strict=True)
    ]


def _parsed(raw: str | None, question: Question) -> Parsed:
    if raw is None:
        return Parsed(None, "missing")
    return parse_score(raw) if question.kind == "score" else parse_answer(raw, question.options)


def _collect(
    running: dict[Future[str], int],
    tasks: Sequence[Task],
    raws: list[str | None],
    failures: _Failures,
    on_answer: Callable[[], None] | None,
) -> None:
    """Take finished answers; ConfigError when the judge failed too often in a row, or refuses whatever it is asked."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        k = running.pop(future)
        try:
            raws[k] = future.result()
            failures.in_a_row = 0
        except JudgeRefusedError as error:
            failures.why[k], failures.in_a_row = str(error), 0
            failures.refused.add(tasks[k].item)  # a filter that stops one picture stops all questions about it
            if len(failures.refused) >= GIVE_UP_AFTER and all(raw is None for raw in raws):
                raise ConfigError(f"{error} (So it did for {GIVE_UP_AFTER} prompts, and answered none.)") from error
        except JudgeFailedError as error:
            failures.why[k] = str(error)
            failures.in_a_row += 1
            if failures.in_a_row >= GIVE_UP_AFTER:
                raise ConfigError(f"{error} ({GIVE_UP_AFTER} questions in a row; earlier answers are kept.)") from error
        _told(on_answer)


def _told(on_answer: Callable[[], None] | None) -> None:
    if on_answer is not None:
        on_answer()
