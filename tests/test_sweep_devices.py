"""Which devices and cores a job gets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.sweep.devices import Devices, named_devices
from lora_dae.sweep.jobs import DONE, FAILED, Job
from lora_dae.sweep.launcher import at_once, run_jobs


def test_devices_are_given_out_once() -> None:
    devices = Devices(3, ["0", "1", "2"])
    assert devices.take(2) == ["0", "1"]
    assert devices.take(2) is None
    assert devices.take(1) == ["2"]
    devices.give_back(["0", "1"])
    assert devices.take(1) == ["0"]
    with pytest.raises(ConfigError, match="4 GPUs and there are 1"):
        Devices(2, ["0"]).check(4)
    Devices(2, []).check(4)  # nothing is known of what there is
    with pytest.raises(ConfigError, match="jobs=0"):
        Devices(0, [])
    assert Devices(1, ["0", "1"]).take(2) == []  # a single job sees them all
    named = Devices(1, ["5", "7"], chosen=True)
    assert named.environment(named.take(1) or []) == {"CUDA_VISIBLE_DEVICES": "5,7"}
    assert named.take(1) is None
    assert Devices(1, [], chosen=True).environment([])["CUDA_VISIBLE_DEVICES"] == ""  # none was meant


@pytest.mark.parametrize(("given", "names"), [([5, 7], ["5", "7"]), (5, ["5"]), ("5, 7", ["5", "7"]), ([], [])])
def test_devices_may_be_named_as_a_list_a_number_or_text(given: object, names: list[str]) -> None:
    assert named_devices(given) == names


def test_jobs_share_the_cores_that_there_are_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under Slurm not all of the machine's; a job's processes share its own."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    threads = [Devices(jobs, []).environment([], processes) for jobs, processes in ((1, 1), (2, 1), (2, 2), (8, 4))]
    assert threads == [{}, *({"OMP_NUM_THREADS": str(n)} for n in (4, 2, 1))]


def test_jobs_that_cannot_run_take_no_share_of_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two jobs at -j 4 each has half of them, and no quarter."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    jobs = [Job(number, [], "", tmp_path / str(number), "", str(number)) for number in range(2)]
    code = "import os; print(os.environ.get('OMP_NUM_THREADS'))"
    run_jobs(jobs, lambda _: [sys.executable, "-c", code], Devices(4, []), Console(quiet=True))
    assert [one.log.read_text() for one in jobs] == ["4\n", "4\n"]


def test_jobs_that_train_the_same_run_side_by_side_once_that_is_done(tmp_path: Path) -> None:
    """Before, one of them trains, and the others wait for it."""
    jobs = [Job(number, [], "", tmp_path, "", work) for number, work in enumerate("xxxy")]
    assert at_once(jobs) == 2
    jobs[0].state = DONE
    assert at_once(jobs) == 3
    jobs[3].state = FAILED
    assert at_once(jobs) == 2
