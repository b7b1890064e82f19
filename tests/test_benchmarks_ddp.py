"""benchmarks.ddp: it ends, also where its processes do."""

from __future__ import annotations

import os
import threading

import pytest

from benchmarks import ddp


def test_a_process_that_dies_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, as it would otherwise wait for ever."""
    monkeypatch.setattr(ddp, "_train", os.getpid)  # which takes no arguments: each process raises at once
    said: list[str] = []

    def measures() -> None:
        try:
            ddp.measure(True, 1)
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=measures, daemon=True)
    thread.start()
    thread.join(120)
    assert said == ["one of the two processes died: see what it printed."]
