"""A rank that failed comes to its end, whatever its backend waits for."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lora_dae.training import together


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_a_rank_that_failed_and_does_not_end_is_ended_under_nccl(
    backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """NCCL's own end may wait for the other ranks; with gloo nobody ends a process that has more to say."""
    ended, codes = threading.Event(), []

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(together.os, "_exit", end)
    monkeypatch.setattr(together, "GRACE", 0.01)
    monkeypatch.setattr(together, "world_size", lambda: 2)
    monkeypatch.setattr(together, "_store", lambda: SimpleNamespace(compare_set=lambda key, old, new: new.encode()))
    monkeypatch.setattr(together.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(together.dist, "get_backend", lambda: backend)
    stop, trainer, before = together.StopTogether(), SimpleNamespace(), set(threading.enumerate())
    failed: Any = ValueError("a broken shard")
    stop.on_exception(trainer, None, failed)  # type: ignore[arg-type]
    if backend == "gloo":
        assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer) and one not in before]
        return
    assert ended.wait(60)
    assert codes == [1] and "error: rank 1 failed: ValueError: a broken shard" in capsys.readouterr().err
