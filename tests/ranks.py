"""Real processes with gloo between them, forked from the test: nothing is imported or loaded again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How one process ended: exit code (None: it had to be killed), what it printed, seconds."""

    code: int | None
    text: str
    seconds: float


def run_ranks(function: Callable[[int], None], folder: Path, world: int = 2, patience: float = 240) -> list[Ended]:
    """Call ``function(rank)`` in each of ``world`` processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    started = time.monotonic()
    processes = [fork.Process(target=_run, args=(function, rank, world, port, logs[rank])) for rank in range(world)]
    for process in processes:
        process.start()
    ended = []
    for process, log in zip(processes, logs, strict=True):
        process.join(max(patience - (time.monotonic() - started), 0.1))
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        ended.append(Ended(code, log.read_text(encoding="utf-8"), time.monotonic() - started))
    return ended


def _run(function: Callable[[int], None], rank: int, world: int, port: int, log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    code = 0
    try:
        function(rank)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no exit handlers of the test process
