"""Judges that think before they answer: they refuse parameters of other models, and thoughts use up the limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Server, ask, serving, some_tasks

from lora_dae.config import ConfigError
from lora_dae.vqa.cache import AnswerCache

pytest.importorskip("openai", reason="openai is not installed: pip install 'lora-dae[judge]'")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    with serving() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "answers.sqlite")


def reasoning(request: dict[str, Any], number: int) -> tuple[int, Any]:
    """As OpenAI's reasoning models answer: they name one parameter at a time that they do not take, in these words."""
    for name, why in (
        ("max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model."),
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
    ):
        if name in request:
            return 400, {"error": {"message": why, "type": "invalid_request_error", "param": name}}
    return 200, ['{"answer": "yes"}', None] if request.get("stream") else '{"answer": "yes"}'


@pytest.mark.parametrize("stream", [False, True])
def test_a_reasoning_model_is_asked_as_it_can_be(
    stream: bool, server: Server, cache: AnswerCache, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is found out once, said once, and no question goes unanswered; nor is one asked again later."""
    server.behavior = reasoning
    answers = ask(server, cache, some_tasks(3), concurrency=1, stream=stream, max_tokens=4000)
    assert [a.parsed.answer for a in answers] == ["yes"] * 3
    names = ("max_tokens", "max_completion_tokens", "temperature")
    limits = [{name: r[name] for name in names if name in r} for r in server.requests]
    assert limits == [
        {"max_tokens": 4000, "temperature": 0},
        {"max_completion_tokens": 4000, "temperature": 0},
        *[{"max_completion_tokens": 4000}] * 3,
    ]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "max_completion_tokens instead of max_tokens=4000" in told
    assert "instead of temperature=0" in told
    ask(server, cache, some_tasks(3), concurrency=1, stream=stream, max_tokens=4000)
    assert len(server.requests) == 5


def test_requests_that_leave_together_find_out_each_for_itself(
    server: Server, cache: AnswerCache, capsys: pytest.CaptureFixture[str]
) -> None:
    barrier = threading.Barrier(4, timeout=20)

    def together(request: dict[str, Any], number: int) -> tuple[int, Any]:
        if number <= 4:
            barrier.wait()
        return reasoning(request, number)

    server.behavior = together
    answers = ask(server, cache, some_tasks(8), concurrency=4)
    assert [a.parsed.answer for a in answers] == ["yes"] * 8
    assert capsys.readouterr().err.count("instead of temperature=0") == 1


def test_a_judge_that_answered_at_temperature_0_is_asked_in_no_other_way(server: Server, cache: AnswerCache) -> None:
    """Or answers of two kinds would lie under one key: a refusal may name the word for another reason."""
    refused = (400, {"error": {"message": "unsafe: the picture's color temperature"}})
    server.behavior = lambda request, number: refused if number == 2 else (200, '{"answer": "yes"}')
    answers = ask(server, cache, some_tasks(3), concurrency=1)
    assert [a.parsed.answer for a in answers] == ["yes", None, "yes"]
    assert [r["temperature"] for r in server.requests] == [0, 0, 0]


@pytest.mark.parametrize("thought", ["", "<think>First, the collar: it is"])
def test_thoughts_that_leave_no_room_for_an_answer_are_said_and_paid(
    thought: str, server: Server, cache: AnswerCache
) -> None:
    """Some servers keep what a model thinks, others give it within the text; neither is an answer to be kept."""
    choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": thought}}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    server.behavior = lambda request, number: (200, body)
    with pytest.raises(ConfigError, match="no answer within max_tokens=10, .*raise judges.judge.max_tokens"):
        ask(server, cache, some_tasks(), max_tokens=10)
    assert len(cache) == 0
    with pytest.raises(ConfigError, match="stopped at max_cost=0.003 .0.002 spent"):
        ask(server, cache, some_tasks(9), max_tokens=10, max_cost=0.003, price_in=10.0, price_out=100.0, concurrency=1)
    assert len(server.requests) == 2
