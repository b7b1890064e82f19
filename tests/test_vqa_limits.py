"""How fast a judge behind HTTP is asked, and for how much money, over all commands into one output."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import Server, serving
from judge_server import ask as _ask
from judge_server import some_tasks as _tasks

from lora_dae.config import ConfigError
from lora_dae.vqa import endpoint
from lora_dae.vqa.cache import AnswerCache

pytest.importorskip("openai", reason="openai is not installed: pip install 'lora-dae[judge]'")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "answers.sqlite")


def test_requests_per_minute_are_kept(server: Server, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still the n-th request waits n intervals."""
    waits: list[float] = []

    class Clock:
        monotonic = staticmethod(lambda: 50.0)
        sleep = staticmethod(waits.append)

    monkeypatch.setattr(endpoint, "time", Clock)
    _ask(server, cache, _tasks(4), requests_per_minute=20, concurrency=4)
    assert sorted(waits) == [0, 3, 6, 9]


def test_asking_stops_at_the_cost_limit_and_goes_on_later(server: Server, cache: AnswerCache) -> None:
    prices = {"price_in": 10.0, "price_out": 100.0, "concurrency": 1}  # 100 + 10 tokens: 0.002 a request
    with pytest.raises(ConfigError, match="stopped at max_cost=0.005 .0.004 spent"):
        _ask(server, cache, _tasks(9), max_cost=0.005, **prices)
    assert len(cache) == 2
    assert len(_ask(server, cache, _tasks(9), max_cost=1.0, **prices)) == 9 and len(server.requests) == 9


def test_the_cost_limit_is_that_of_all_commands_together(server: Server, cache: AnswerCache, tmp_path: Path) -> None:
    """Its advice, to run the same command again, must not spend the limit once more."""
    prices = {"price_in": 10.0, "price_out": 100.0, "concurrency": 1}  # 100 + 10 tokens: 0.002 a request
    for _ in range(3):
        with pytest.raises(ConfigError, match="stopped at max_cost=0.004 .0.004 spent, by all commands"):
            _ask(server, cache, _tasks(9), max_cost=0.004, **prices)
        cache.close()
        cache = AnswerCache(tmp_path / "answers.sqlite")
        assert len(server.requests) == len(cache) == 2
    with pytest.raises(ConfigError, match="stopped at max_cost=0.004 .0.004 spent"):
        _ask(server, cache, _tasks(9), max_cost=0.004, model="another", **prices)
    assert len(server.requests) == 4  # each judge has its own


@pytest.mark.parametrize("stream", [False, True])
def test_a_cost_limit_needs_to_know_what_was_used(stream: bool, server: Server, cache: AnswerCache) -> None:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"answer": "yes"}'}}
    whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    server.behavior = lambda request, number: (200, ['{"answer": "yes"}', None] if stream else whole)
    with pytest.raises(ConfigError, match="does not tell how many tokens it used.*judges.judge.max_cost=null"):
        _ask(server, cache, _tasks(9), max_cost=5.0, price_in=10.0, concurrency=1, stream=stream)
    assert len(server.requests) == 1
    assert len(_ask(server, cache, _tasks(2), stream=stream)) == 2  # without a limit nobody needs to know


def test_requests_at_once_do_not_pass_the_cost_limit(server: Server, cache: AnswerCache) -> None:
    barrier = threading.Barrier(4, timeout=20)

    def together(request: dict[str, Any], number: int) -> tuple[int, str]:
        if 1 < number <= 5:  # the first shows what one costs; the next four leave together, before any is paid for
            barrier.wait()
        return 200, '{"answer": "yes"}'

    server.behavior = together
    with pytest.raises(ConfigError, match="stopped at max_cost=0.011 .0.01 spent"):
        _ask(server, cache, _tasks(20), max_cost=0.011, price_in=10.0, price_out=100.0, concurrency=4)
    assert len(server.requests) == len(cache) == 5  # of 0.002 each: a sixth would pass it
