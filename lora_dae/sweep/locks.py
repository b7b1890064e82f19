"""Locks between processes and machines that a crash cannot leave behind.

The operating system holds the lock (flock; over NFS by its lock service) and gives it back when its process ends,
however it ends. The lock file itself may stay; it means nothing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from lora_dae.config import ConfigError
from lora_dae.sweep.files import FULL, unwritten


def try_lock(path: Path) -> FileLock | None:
    """The lock, held, or None where another process holds it. Raises ConfigError on a disk without locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        lock.acquire(timeout=0)
        if isinstance(lock, SoftFileLock):  # filelock takes a file that a crash leaves behind where flock is missing
            lock.release()
            raise NotImplementedError("it has no flock")
    except Timeout:
        return None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise ConfigError(unwritten(error, path)) from error
        raise ConfigError(
            f"cannot lock {path} ({error}): sweeps need a folder that is writable on a file system with locks; set "
            "store= and hydra.sweep.dir= to one."
        ) from error
    with suppress(OSError):  # a full disk: others wait for "another process", and the lock holds
        _holder_file(path).write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}), encoding="utf-8")
    return lock


def holder(path: Path) -> str:
    """Who said last that it holds the lock: ``process 12 on host``."""
    try:
        told = json.loads(_holder_file(path).read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def _holder_file(path: Path) -> Path:
    return path.with_name(path.name + ".holder")


@contextmanager
def held(lock: FileLock) -> Iterator[None]:
    """Release at the end of a block."""
    try:
        yield
    finally:
        lock.release()
