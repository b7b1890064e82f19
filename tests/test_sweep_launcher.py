"""The launcher on a script without torch: processes, failures, kills, locks, devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lora_dae.cli import expand_jobs
from lora_dae.config import ConfigError
from lora_dae.sweep.devices import Devices
from lora_dae.sweep.files import read_json, write_json
from lora_dae.sweep.jobs import DONE, FAILED, RUNNING, WAITING, Job
from lora_dae.sweep.launcher import may_start, quoted, run_jobs
from lora_dae.sweep.locks import holder, try_lock
from lora_dae.sweep.name import sweep_name

ROOT = Path(__file__).parent.parent
APP = """
import os, sys, time
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path=".", config_name="app")
def main(cfg):
    here = Path(HydraConfig.get().runtime.output_dir)
    with open("ran.txt", "a") as file:
        file.write(f"{cfg.a} {os.getpid()} {here} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
    mode = cfg.mode if cfg.a == cfg.at else "fine"
    try:
        if mode == "fail" and not Path("repaired").exists():
            raise ValueError(f"a={cfg.a} is broken")
        if mode == "usage":
            sys.exit(2)
        while mode == "wait" and not Path("repaired").exists():
            time.sleep(0.05)
        while cfg.mode == "meet" and len(Path("ran.txt").read_text().splitlines()) < 2:
            time.sleep(0.05)
    except KeyboardInterrupt:
        Path("interrupted.txt").touch()
        sys.exit(130)

if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults:
  - _self_
  - override hydra/launcher: process
a: 0
at: 2
mode: fine
hydra:
  job: {chdir: false}
  sweep: {dir: sweep, subdir: "job_${a}"}
  launcher: {same_work: null, inputs: null, overrides: []}
"""
Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Run:
    """Starts the app as a sweep in tmp_path; ``.communicate()`` waits for it."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "app.yaml").write_text(CONFIG)
    folder = tmp_path / "hydra" / "launcher"
    folder.mkdir(parents=True)
    (folder / "process.yaml").write_text((ROOT / "conf" / "hydra" / "launcher" / "process.yaml").read_text())
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}

    def run(*overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "app.py"), "-m", *overrides], cwd=tmp_path, text=True,
            env={**environment, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            # A shell starts background commands with SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    return run


def ran(tmp_path: Path) -> list[list[str]]:
    path = tmp_path / "ran.txt"
    return sorted(line.split() for line in path.read_text().splitlines()) if path.is_file() else []


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def states(tmp_path: Path) -> dict[str, str]:
    return {path.parent.name: read_json(path).get("state", "") for path in tmp_path.glob("sweep/*/job.json")}


def test_every_job_is_a_process_with_a_folder_of_its_own(start: Run, tmp_path: Path) -> None:
    process = start("a=1,2,3")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [line[0] for line in ran(tmp_path)] == ["1", "2", "3"]
    assert len({line[1] for line in ran(tmp_path)} | {str(process.pid)}) == 4
    assert [Path(line[2]).name for line in ran(tmp_path)] == ["job_1", "job_2", "job_3"]
    assert (tmp_path / "sweep" / "job_2" / ".hydra" / "config.yaml").is_file()
    assert "job 1 done: a=2" in output
    again = start("a=1,2,3", "hydra.launcher.jobs=2")
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert len(ran(tmp_path)) == 3  # all were done


def test_a_failure_stops_nobody_and_is_run_again(start: Run, tmp_path: Path) -> None:
    process = start("a=1,2,3", "mode=fail")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert states(tmp_path) == {"job_1": "done", "job_2": "failed", "job_3": "done"}
    assert "job 1 failed: ValueError: a=2 is broken" in errors
    assert "a=2 is broken" in (tmp_path / "sweep" / "job_2" / "job.log").read_text()
    (tmp_path / "repaired").touch()
    again = start("a=1,2,3", "mode=fail")
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert [line[0] for line in ran(tmp_path)] == ["1", "2", "2", "3"]


def test_another_config_in_the_same_folder_is_another_job(start: Run, tmp_path: Path) -> None:
    start("a=1", "at=2").communicate(timeout=120)
    start("a=1", "at=3").communicate(timeout=120)
    assert len(ran(tmp_path)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the parent's death is told by the Linux kernel alone")
def test_killed_launcher_takes_its_job_along_and_goes_on_with_the_same_command(start: Run, tmp_path: Path) -> None:
    process = start("a=1,2,3", "mode=wait")
    wait_for(lambda: len(ran(tmp_path)) == 2 and states(tmp_path).get("job_2") == "running")
    time.sleep(0.3)  # into the loop that waits
    process.kill()
    process.communicate(timeout=60)
    wait_for((tmp_path / "interrupted.txt").is_file)
    (tmp_path / "repaired").touch()
    again = start("a=1,2,3", "mode=wait")
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert [line[0] for line in ran(tmp_path)] == ["1", "2", "2", "3"]


def test_killed_job_fails_alone(start: Run, tmp_path: Path) -> None:
    process = start("a=1,2,3", "mode=wait")
    wait_for(lambda: len(ran(tmp_path)) == 2)
    os.kill(int(ran(tmp_path)[1][1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "job 1 failed: exit code -9" in errors
    assert states(tmp_path) == {"job_1": "done", "job_2": "failed", "job_3": "done"}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_reaches_the_jobs(sent: signal.Signals, start: Run, tmp_path: Path) -> None:
    process = start("a=2,3", "mode=wait")
    wait_for(lambda: len(ran(tmp_path)) == 1)
    time.sleep(0.3)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in errors
    assert (tmp_path / "interrupted.txt").is_file()
    assert states(tmp_path)["job_2"] == "stopped"


def test_jobs_at_once_are_pinned_to_devices_of_their_own(start: Run, tmp_path: Path) -> None:
    """Each of the two waits for the other: one after the other they would never end."""
    process = start("a=1,2", "mode=meet", "hydra.launcher.jobs=2", "hydra.launcher.devices=[5,7]")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert {line[3] for line in ran(tmp_path)} == {"5", "7"}


def test_a_job_that_asks_for_too_many_gpus_lets_none_start(start: Run, tmp_path: Path) -> None:
    options = ("+trainer.devices=3", "hydra.launcher.jobs=2", "hydra.launcher.devices=[5,7]")
    process = start("a=1,2", *options)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "error: a job asks for 3 GPUs and there are 2: lower trainer.devices." in errors
    assert not ran(tmp_path)
    named = start("a=1", "+trainer.devices=[5,7]")
    _, errors = named.communicate(timeout=120)
    assert named.returncode == 2 and not ran(tmp_path)
    assert "error: trainer.devices=[5, 7] in a sweep: give how many, and which ones there are by" in errors
    batches = start("a=1,2", "hydra.sweeper.max_batch_size=1")
    _, errors = batches.communicate(timeout=120)
    assert batches.returncode == 2 and not ran(tmp_path)
    assert "hydra.launcher.jobs says how many run at once" in errors
    on_cpu = start("a=1,2", *options, "+trainer.accelerator=cpu")
    on_cpu.communicate(timeout=120)
    assert on_cpu.returncode == 0 and len(ran(tmp_path)) == 2


def test_jobs_over_several_nodes_are_refused(start: Run, tmp_path: Path) -> None:
    """Nobody would start the processes of the second node, for which the first would wait."""
    process = start("a=1,2", "+trainer.num_nodes=2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and not ran(tmp_path)
    assert "error: trainer.num_nodes=2 in a sweep: its jobs have this machine alone" in errors


def test_a_mode_in_a_config_file_is_that_of_the_sweep_alone(start: Run, tmp_path: Path) -> None:
    """A job that were the same sweep once more would wait for itself."""
    (tmp_path / "app.yaml").write_text(CONFIG.replace("hydra:\n", "hydra:\n  mode: MULTIRUN\n"))
    process = start("a=1,2")
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert [line[0] for line in ran(tmp_path)] == ["1", "2"]


def test_jobs_compose_what_the_sweep_composes(start: Run, tmp_path: Path) -> None:
    """Hydra's own options name another main config, and a folder of configs of one's own."""
    (tmp_path / "other.yaml").write_text(CONFIG.replace("a: 0", "a: 7"))
    (tmp_path / "mine" / "extra").mkdir(parents=True)
    (tmp_path / "mine" / "extra" / "wide.yaml").write_text("at: 5")
    process = start("--config-name", "other", "--config-dir", "mine", "mode=fine", "+extra=wide")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [line[0] for line in ran(tmp_path)] == ["7"]


def test_two_sweeps_share_their_jobs(start: Run, tmp_path: Path) -> None:
    both = [start("a=1,2,3,4"), start("a=1,2,3,4")]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [line[0] for line in ran(tmp_path)] == ["1", "2", "3", "4"]


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from lora_dae.sweep.locks import try_lock
lock = try_lock(Path({str(path)!r}))
print("held", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert try_lock(path) is None
    assert str(process.pid) in holder(path)
    process.kill()
    process.communicate(timeout=60)
    lock = try_lock(path)
    assert lock is not None
    lock.release()


def job(number: int, work: str, state: str = WAITING) -> Job:
    return Job(number, [], "", Path("nowhere"), "", work, state=state)


def run_one(one: Job, code: str) -> None:
    run_jobs([one], lambda _: [sys.executable, "-c", code], Devices(1, []), Console(quiet=True))


def test_jobs_that_would_train_the_same_wait_for_the_first() -> None:
    first, same, other = job(0, "x", RUNNING), job(1, "x"), job(2, "y")
    assert not may_start(same, [first, same, other])
    assert may_start(other, [first, same, other])
    first.state = DONE
    assert may_start(same, [first, same, other])
    same.state = RUNNING
    third = job(3, "x")
    assert may_start(third, [first, same, third])  # both only measure


def test_a_mistake_in_one_job_is_not_told_of_others_that_train_the_same(tmp_path: Path) -> None:
    """The mistake may be in what is done with the training, as in a sampler that does not exist."""
    jobs = [replace(job(number, "same"), directory=tmp_path / str(number)) for number in range(2)]
    codes = {jobs[0].directory: 2, jobs[1].directory: 0}
    run_jobs(
        jobs, lambda one: [sys.executable, "-c", f"raise SystemExit({codes[one.directory]})"], Devices(1, []),
        Console(quiet=True),
    )  # fmt: skip
    assert [one.state for one in jobs] == [FAILED, DONE]


def test_sweep_name_is_that_of_the_command() -> None:
    overrides = ["experiment=rank4,rank8", "enhancement.strength=0,0.5"]
    assert sweep_name(overrides) == sweep_name(list(overrides))
    # In another order the jobs have other numbers: in one folder each would be there twice, and pass as two seeds.
    assert sweep_name(overrides) != sweep_name(overrides[::-1])
    assert sweep_name(overrides) != sweep_name(["experiment=rank4,rank8", "enhancement.strength=0,1"])
    assert sweep_name(overrides).startswith("experiment-rank4+rank8_strength-0+0.5-")


def test_jobs_option_is_short_for_hydras() -> None:
    expected = ["-m", "hydra.launcher.jobs=2", "a=1"]
    for short in (["-j", "2"], ["-j2"], ["--jobs", "2"]):
        assert expand_jobs(["-m", *short, "a=1"]) == expected


def test_json_files_are_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "x.json").write_text('{"a": ')
    assert read_json(tmp_path / "x.json") == {}
    assert read_json(tmp_path / "none.json") == {}


def test_a_job_is_no_task_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With these Lightning would start no second process, and train with one."""
    for name in ("NTASKS", "NTASKS_PER_NODE", "PROCID", "LOCALID", "NODEID", "JOB_ID"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    one = replace(job(0, "x"), directory=tmp_path)
    run_one(one, "import os; print(*(name for name in os.environ if name.startswith('SLURM_')))")
    assert one.log.read_text().split() == ["SLURM_JOB_ID"]


def test_a_job_with_other_photos_is_another_job(tmp_path: Path) -> None:
    one = replace(job(0, "x"), directory=tmp_path, state=DONE, inputs=lambda: {"hash": "t", "measured_on": "p"})
    one.save()
    assert one.finished_before()  # without a store a run tells nothing of its photos
    write_json(tmp_path / "trained.json", {"hash": "t", "measured_on": "p", "seconds": 1})
    assert one.finished_before()
    for change in ({"hash": "u"}, {"measured_on": "q"}):
        write_json(tmp_path / "trained.json", {"hash": "t", "measured_on": "p", **change})
        assert not one.finished_before()

    def gone() -> dict[str, str]:
        raise ConfigError("data.root=photos does not exist.")

    assert not replace(one, inputs=gone).finished_before()


def test_paths_survive_hydras_grammar(tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for name in ("a,b=c", "with space", "[x]{y}", 'quo"te', "back\\slash"):
        parsed = OverridesParser.create().parse_override(f"hydra.run.dir={quoted(Path(name))}")
        assert parsed.value() == name
