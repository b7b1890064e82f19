"""Jobs of a sweep: their errors and processes, a full disk, and the table on the screen."""

from __future__ import annotations

import errno
import io
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from test_sweep_launcher import job, run_one, wait_for

from lora_dae.config import ConfigError
from lora_dae.sweep.devices import Devices
from lora_dae.sweep.files import write_json
from lora_dae.sweep.jobs import DONE, FAILED, RUNNING, WAITING, Job, last_error
from lora_dae.sweep.launcher import run_jobs
from lora_dae.sweep.live import LiveTable, fitting_table, remaining, table
from lora_dae.sweep.locks import holder, try_lock

LEAVES_A_CHILD = """
import os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_last_error_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last):\n  File ...\ntorch.OutOfMemoryError: too big\nbye\n")
    assert last_error(log) == "torch.OutOfMemoryError: too big"
    log.write_text("some words\nerror: adapter.rank=0 is below 1\n")
    assert last_error(log) == "adapter.rank=0 is below 1"
    assert last_error(log, log.stat().st_size) == ""
    traceback = "[rank1]: Traceback (most recent call last):\n[rank1]:   File ...\n[rank1]: ValueError: x is odd\n"
    log.write_text(traceback)
    assert last_error(log) == "ValueError: x is odd"
    log.write_text("error: adapter.rank=0 is below 1\n" + traceback)
    assert last_error(log) == "adapter.rank=0 is below 1"  # the sentence that was written for people


def test_the_error_is_that_of_the_last_start(tmp_path: Path) -> None:
    one = replace(job(0, "x"), directory=tmp_path)
    one.log.write_text("error: adapter.rank=0 is below 1\n")
    run_one(one, "import os; os.kill(os.getpid(), 9)")
    assert (one.state, one.error) == (FAILED, "exit code -9")


def test_the_error_is_the_jobs_own_and_not_torchruns(tmp_path: Path) -> None:
    """torchrun's last word is a traceback of its own: that a process failed."""
    script = tmp_path / "job.py"
    script.write_text("import sys\nprint('error: adapter.rank=0 is below 1', flush=True)\nsys.exit(2)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(script)]
    one = replace(job(0, "x"), directory=tmp_path / "run")
    run_jobs([one], lambda _: command, Devices(1, []), Console(quiet=True))
    assert "ChildFailedError" in one.log.read_text()
    assert (one.state, one.error) == (FAILED, "adapter.rank=0 is below 1")


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_killed_job_leaves_no_process_behind(tmp_path: Path) -> None:
    """As Lightning's first process would the others, on GPUs that the next job is given."""
    one = replace(job(0, "x"), directory=tmp_path)
    run_one(one, LEAVES_A_CHILD)
    assert one.error == "exit code -9"
    wait_for(lambda: gone(int(one.log.read_text())), seconds=20)


@pytest.mark.parametrize(("state", "ended"), [(RUNNING, FAILED), (DONE, DONE)], ids=["at its start", "at its end"])
def test_a_full_disk_stops_no_other_job(
    state: str, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, values: dict[str, Any]) -> None:
        if path.parent.name == "0" and values["state"] == state:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_json(path, values)

    monkeypatch.setattr("lora_dae.sweep.jobs.write_json", full)
    jobs = [replace(job(number, str(number)), directory=tmp_path / str(number)) for number in range(2)]
    run_jobs(jobs, lambda _: [sys.executable, "-c", ""], Devices(1, []), Console(quiet=True))
    assert [one.state for one in jobs] == [ended, DONE]
    assert jobs[0].error == f"no room left to write {tmp_path / '0' / 'job.json'}: make some; earlier files stay."
    lock = try_lock(tmp_path / "0" / ".job.lock")  # given back
    assert lock is not None
    lock.release()


def test_a_full_disk_has_room_for_a_lock_or_says_that_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock is an empty file; who holds it, which others are told, takes room."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.lock"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        lock = try_lock(path)
    assert lock is not None and holder(path) == "another process"
    lock.release()
    monkeypatch.setattr("lora_dae.sweep.locks.FileLock", full)
    with pytest.raises(ConfigError, match=r"^no room left to write .*x\.lock: make some; earlier files stay\.$"):
        try_lock(path)


def test_remaining_time_is_steps_left_at_the_speed_so_far() -> None:
    status = {"step": 30, "of": 100, "first": 20, "begun": 1000.0, "time": 1050.0}
    assert remaining(status, 0.0, 1050.0) == pytest.approx(350.0)  # 5 s a step, 70 steps
    assert remaining(status, 0.0, 1060.0) == pytest.approx(340.0)
    assert remaining({}, 0.0, 1.0) is None


def test_the_table_says_what_a_job_tells(tmp_path: Path) -> None:
    """One row: how far it is, its last losses, how long it has run, and how long it still needs."""
    one = Job(3, [], "adapter.rank=4", tmp_path, "", "", state=RUNNING, started=1000.0)
    told = {"phase": "adapter", "step": 30, "of": 100, "first": 20, "begun": 1000.0, "time": 1050.0,
            "metrics": {"train/loss": 0.51234, "val/loss": 0.25}, "validated": {"30": 0.25}}  # fmt: skip
    write_json(tmp_path / "status.json", told)
    shown = table([one], 1060.0)
    heads = [str(column.header) for column in shown.columns]
    assert heads == ["#", "job", "state", "step", "last", "time", "phase left"]
    assert [str(next(iter(column.cells))) for column in shown.columns] == [
        "3", "adapter.rank=4", "adapter", "30/100", "train/loss 0.5123 val/loss 0.25", "1:00", "5:40",
    ]  # fmt: skip


def jobs_in(states: list[str], label: str, folder: Path) -> list[Job]:
    return [
        Job(number, [], f"{label}={number}", folder / str(number), "", str(number), state=state, started=time.time())
        for number, state in enumerate(states)
    ]


def test_the_screen_shows_what_runs_and_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A live display shows as many lines as there are: the first jobs, which ended long ago, would be all of them."""
    monkeypatch.setenv("TERM", "xterm")
    jobs = jobs_in([DONE] * 28 + [RUNNING, FAILED] + [WAITING] * 10, "adapter.rank", tmp_path)
    screen = io.StringIO()
    with LiveTable(jobs, Console(file=screen, force_terminal=True, width=100, height=20)) as live:
        live.update()
        shown = screen.getvalue()
    assert "adapter.rank=28" in shown and "adapter.rank=29" in shown and "adapter.rank=27" not in shown
    assert "10 waiting, 28 done" in shown
    assert "adapter.rank=27" in screen.getvalue()  # at its end, with all others


def test_jobs_with_long_names_fit_onto_a_narrow_screen(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=60, height=20)
    jobs = jobs_in([FAILED] * 30 + [RUNNING], "optimizer.learning_rate=0.0001 enhancement.strength=0.5 seed", tmp_path)
    shown = fitting_table(jobs, time.time(), console)
    assert shown.row_count < len(jobs) and len(console.render_lines(shown, pad=False)) <= 20
    assert str(next(iter(shown.columns[0].cells))) == "30"  # what runs comes first
