"""A job of a sweep: its overrides, its folder, and what is known of it, on disk and in memory.

    job.json      {"digest", "label", "overrides", "state", "exit_code", "seconds", "error"}   written by the launcher
    status.json   {"phase", "step", "of", "metrics", "time"}                          written by the job
    job.log       everything that the job printed

Only ``done`` counts when a sweep is started again; anything else is run again and goes on from its checkpoint.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from lora_dae.config import ConfigError
from lora_dae.sweep.files import read_json, unwritten, write_json

WAITING, RUNNING, ELSEWHERE, DONE, FAILED, STOPPED = "waiting", "running", "elsewhere", "done", "failed", "stopped"
INPUT_ERROR = 2  # the exit code of a mistake in the input: another try, or another trial of a search, would not help
LOG_TAIL = 32_000  # bytes of a log in which the error is looked for: torchrun says much after it


@dataclass
class Job:
    """One grid point. ``digest`` is the hash of its whole config, ``work`` that of what it would train."""

    number: int
    overrides: list[str]
    label: str  # the overrides that make it this job
    directory: Path
    digest: str
    work: str
    processes: int = 1
    gpus: int = 1
    state: str = WAITING
    exit_code: int | None = None
    error: str = ""
    started: float = 0.0
    log_start: int = 0  # bytes that earlier starts have left in the log
    seconds: float = 0.0
    inputs: Callable[[], dict[str, str]] | None = None  # what it would train and be measured on now
    process: subprocess.Popen[bytes] | None = None
    lock: FileLock | None = None
    devices: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.directory / "job.log"

    def finished_before(self) -> bool:
        """Whether an earlier start of this sweep finished exactly this job, with the photos and weights of now."""
        told = read_json(self.directory / "job.json")
        if told.get("state") != DONE or told.get("digest") != self.digest or not self._same_inputs():
            return False
        self.state, self.seconds, self.exit_code = DONE, float(told.get("seconds") or 0), 0
        return True

    def _same_inputs(self) -> bool:
        told = read_json(self.directory / "trained.json")
        if self.inputs is None or not told:  # without a store a run tells nothing of it
            return True
        try:
            return self.inputs().items() <= told.items()
        except ConfigError:  # the job itself says what is wrong
            return False

    def status(self) -> dict[str, Any]:
        """What the job itself told last; {} before that."""
        told = read_json(self.directory / "status.json")
        return told if told.get("time", 0) >= self.started or self.state == ELSEWHERE else {}

    def end(self, exit_code: int) -> None:
        """Note how the process ended; the error is the log's last line that names one."""
        self.exit_code, self.seconds = exit_code, time.time() - self.started
        self.state = DONE if exit_code == 0 else STOPPED if exit_code in (130, -2) else FAILED
        if self.state == FAILED:
            self.error = self.error or last_error(self.log, self.log_start) or f"exit code {exit_code}"
        self.note()

    def note(self) -> None:
        """``save``; what cannot be saved is told, and the next start does the job again."""
        try:
            self.save()
        except ConfigError as error:
            self.error = self.error or str(error)

    def save(self) -> None:
        """Write ``job.json``. Raises ConfigError where the disk does not take it."""
        path = self.directory / "job.json"
        told = {
            key: getattr(self, key)
            for key in ("digest", "label", "overrides", "state", "exit_code", "seconds", "error")
        }
        try:
            write_json(path, {"number": self.number, **told})
        except OSError as error:
            raise ConfigError(unwritten(error, path)) from error


def last_error(log: Path, start: int = 0) -> str:
    """The last ``error: ...`` of a log, else the last line of a traceback, ``SomeError: ...``.

    Only what stands after the first ``start`` bytes counts, and not torchrun's last word: that a process failed.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - LOG_TAIL, start))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in lines]  # as torch.distributed prints tracebacks
    said = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    raised = [line for line in lines if line.split(":")[0].endswith(("Error", "Interrupt"))]
    named = said or [line for line in raised if "ChildFailedError" not in line]
    return named[-1].strip() if named else ""
