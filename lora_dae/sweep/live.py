"""The table of jobs on the console: what each one is, does, and how long it still needs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lora_dae.sweep.jobs import DONE, ELSEWHERE, FAILED, RUNNING, STOPPED, WAITING, Job

STYLES = {WAITING: "dim", RUNNING: "bold", ELSEWHERE: "cyan", DONE: "green", FAILED: "bold red", STOPPED: "yellow"}
URGENT = (RUNNING, ELSEWHERE, FAILED, STOPPED)  # shown first where not all jobs fit
REFRESH = 2  # per second


def remaining(status: dict[str, object], started: float, now: float) -> float | None:
    """Seconds until the present phase ends, at the speed so far; None while that is unknown."""
    step, of, first = (status.get(key) for key in ("step", "of", "first"))
    begun = status.get("begun", started)
    if not isinstance(step, int) or not isinstance(of, int) or not isinstance(begun, float | int):
        return None
    done = step - (first if isinstance(first, int) else 0)
    told = status.get("time")
    if done < 1 or not isinstance(told, float | int):
        return None
    return max((told - begun) / done * (of - step) - (now - told), 0.0)


def clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(jobs: Sequence[Job], now: float, others: Sequence[Job] = ()) -> Table:
    """One row per job, and one that counts ``others`` by their state."""
    shown = Table(box=None, pad_edge=False, expand=False)
    for name, justify in (("#", "right"), ("job", "left"), ("state", "left"), ("step", "right"), ("last", "left"),
                          ("time", "right"), ("phase left", "right")):  # fmt: skip
        shown.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for job in jobs:
        status = job.status() if job.state in (RUNNING, ELSEWHERE) else {}
        state = str(status.get("phase") or job.state) if job.state == RUNNING else job.state
        step = f"{status['step']}/{status['of']}" if "step" in status and "of" in status else ""
        metrics = status.get("metrics") or {}
        last = " ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[-2:]) or job.error
        spent = now - job.started if job.state == RUNNING else job.seconds
        shown.add_row(
            str(job.number),
            Text(job.label),
            Text(state, style=STYLES[job.state]),
            step,
            Text(last),
            clock(spent) if spent else "",
            clock(remaining(status, job.started, now)) if job.state == RUNNING else "",
        )
    counts = Counter(job.state for job in others)
    if counts:
        shown.add_row("", Text(", ".join(f"{counts[s]} {s}" for s in STYLES if counts[s]), style="dim"))
    return shown


def fitting_table(jobs: Sequence[Job], now: float, console: Console) -> Table:
    """All jobs, or those that run or failed, as many as the screen has lines for: Live cuts off what is below."""
    shown = table(jobs, now)
    first = sorted((job for job in jobs if job.state in URGENT), key=lambda job: URGENT.index(job.state))
    lines = len(console.render_lines(shown, pad=False))
    while lines > console.height:
        rows = {job.number for job in first}
        shown = table(first, now, [job for job in jobs if job.number not in rows])
        lines = len(console.render_lines(shown, pad=False))
        if not first:
            break
        first = first[: min(len(first) - 1, len(first) * console.height // lines)]  # some take several lines
    return shown


class LiveTable:
    """On a terminal the table, redrawn in place; elsewhere (a file, a batch log) one line per change of state."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self.jobs, self.console = jobs, console
        self._told: dict[int, str] = {}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._last = 0.0

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.__enter__()
        return self

    def update(self) -> None:
        if self._live is None:
            for job in self.jobs:
                if self._told.get(job.number, WAITING) != job.state:
                    self._told[job.number] = job.state
                    words = f"job {job.number} {job.state}: {job.label}"
                    self.console.print(words + (f" ({job.error})" if job.error else ""), soft_wrap=True, markup=False,
                                       highlight=False)  # fmt: skip
        elif time.monotonic() - self._last > 1 / REFRESH:
            self._last = time.monotonic()
            self._live.update(fitting_table(self.jobs, time.time(), self.console), refresh=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(table(self.jobs, time.time()), refresh=True)
            self._live.__exit__(kind, error, trace)
        else:
            self.console.print(table(self.jobs, time.time()))
