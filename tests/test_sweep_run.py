"""A whole sweep as a user types it, on the tiny backbone: one training, two runs, one report; by two engines."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from compose import SHORT
from lightning import Trainer

from lora_dae.config import ConfigError
from lora_dae.sweep.files import read_json
from lora_dae.training.trainer import check_processes

ROOT = Path(__file__).parent.parent


# What sbatch tells a script of one task, as in experiments/sweep.sbatch.
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "lora-dae", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
         "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip


def start(tmp_path: Path, backbone: Path, *overrides: str, slurm: bool = False) -> subprocess.Popen[str]:
    short = [o for o in SHORT if not o.startswith(("trainer.max_steps", "tracking.wandb"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if not k.startswith("SLURM")} | (SLURM if slurm else {})
    return subprocess.Popen(
        [
            sys.executable, str(ROOT / "train.py"), "-m", "adapter.rank=2", "enhancement.strength=0,1",
            "trainer.max_steps=2", f"backbone.path={backbone}", "evaluation.frozen=false", "tracking.wandb=disabled",
            f"data.cache_dir={tmp_path / 'cache'}", *short, *overrides,
        ],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def sweep(tmp_path: Path, backbone: Path, *overrides: str, slurm: bool = False) -> subprocess.CompletedProcess[str]:
    process = start(tmp_path, backbone, *overrides, slurm=slurm)
    output, errors = process.communicate(timeout=900)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def check(tmp_path: Path) -> Path:
    """What every engine leaves: one training, a run folder per job, the table and the report."""
    trained = list((tmp_path / "multirun" / "store").glob("*/trained.json"))
    assert len(trained) == 1
    folder = next(path.parent for path in (tmp_path / "multirun").glob("*/report.html"))
    assert len([path for path in folder.glob("*/report.html")]) == 2
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["enhancement.strength"] for row in rows] == ["0.0", "1.0"]
    for row in rows:
        assert f"group: {folder.name}\n" in (tmp_path / row["runs"] / "config.yaml").read_text()
        table = json.loads((tmp_path / row["runs"] / "metrics.json").read_text())
        method = f"strength {float(row['enhancement.strength']):g}"
        assert float(row["fd_effnet"]) == table["methods"][method]["fd_effnet"]["value"]
    assert (folder / "plots" / "curves.png").is_file()
    return folder


def test_sweep_trains_once_and_goes_on_with_the_same_command(tmp_path: Path, tiny_backbone: Path) -> None:
    done = sweep(tmp_path, tiny_backbone, "-j", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = check(tmp_path)
    assert f"report   {folder.relative_to(tmp_path) / 'report.html'}" in done.stdout
    logs = [path.read_text() for path in sorted(folder.glob("*/job.log"))]
    assert sum("trained already" in log for log in logs) == 1
    before = (folder / "0_default" / "metrics.json").stat().st_mtime_ns
    again = sweep(tmp_path, tiny_backbone, "-j", "2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (folder / "0_default" / "metrics.json").stat().st_mtime_ns == before


def test_a_job_that_is_killed_while_it_trains_goes_on_with_the_same_command(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    options = ("enhancement=none", "enhancement.strength=0", "trainer.max_steps=8", "trainer.val_check_interval=1",
               "evaluation.controls=false")  # fmt: skip
    store, first = tmp_path / "multirun" / "store", start(tmp_path, tiny_backbone, *options)
    while not list(store.glob("*/checkpoints/adapter.ckpt")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    os.kill(read_json(next(store.glob("*.lock.holder")))["pid"], signal.SIGKILL)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 1 and "job 0 failed: exit code -9" in errors
    assert not list(store.glob("*/trained.json"))
    began, since = time.time(), None
    again = start(tmp_path, tiny_backbone, *options)
    while again.poll() is None:  # what it says while it trains; later it says that it measures
        for path in (tmp_path / "multirun").glob("*/0_default/status.json"):
            told = read_json(path)
            since = told["first"] if told.get("begun", 0) > began else since
        time.sleep(0.05)
    assert again.returncode == 0, again.communicate()
    assert since is not None and since >= 1
    assert len(list(store.glob("*/trained.json"))) == 1


@pytest.mark.parametrize("torchrun", [False, True], ids=["lightning", "torchrun"])
def test_sweep_of_jobs_of_two_processes(torchrun: bool, tmp_path: Path, tiny_backbone: Path) -> None:
    """On a node of Slurm. The first job trains on two ranks; the second finds that training and only measures."""
    engine = f"hydra.launcher.torchrun={str(torchrun).lower()}"
    done = sweep(tmp_path, tiny_backbone, "trainer=ddp", "trainer.devices=2", engine, slurm=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = check(tmp_path)
    logs = [path.read_text() for path in sorted(folder.glob("*/job.log"))]
    assert ["trained already" in log for log in logs] == [False, True]
    assert ["2 processes, " in log for log in logs] == [True, False]
    assert len(list((tmp_path / "multirun" / "store").glob("*/csv/metrics*.csv"))) == 1


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="pip install lora-dae[slurm]")
def test_submitit_leaves_the_same_folders_also_of_a_failure(tmp_path: Path, tiny_backbone: Path) -> None:
    """All jobs start at once: the second waits for the first one's training at the store's lock, the third fails."""
    done = sweep(tmp_path, tiny_backbone, "enhancement.strength=0,1,-1", "hydra/launcher=submitit_local")
    assert done.returncode == 1
    assert "JobError: enhancement.strength=-1" in done.stderr, done.stderr[-3000:]
    folder = check(tmp_path)
    assert f"report   {folder.relative_to(tmp_path) / 'report.html'}" in done.stdout


def test_another_number_of_processes_than_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script of sbatch without srun Lightning takes the one process that is there; under torchrun all of them."""
    monkeypatch.setattr(sys, "argv", ["train.py"])  # pytest's own workers are commands of no training
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    check_processes(Trainer(**options, devices=1))
    with pytest.raises(ConfigError, match=r"trainer.devices=2 needs 2 processes, but 1 were started"):
        check_processes(Trainer(**options, devices=2, strategy="ddp"))
    for name in SLURM:
        monkeypatch.delenv(name)
    check_processes(Trainer(**options, devices=2, strategy="ddp"))
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0",
                        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"trainer.devices=1 needs 1 processes, but 2 were started"):
        check_processes(Trainer(**options, devices=1))


def test_processes_that_nobody_could_start_are_refused(
    tmp_path: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning gives a process's command again: in Hydra's own sweep and in a worker that is no training's."""
    done = sweep(tmp_path, tiny_backbone, "trainer=ddp", "trainer.devices=2", "hydra/launcher=basic")
    assert done.returncode == 1 and "from here no other process can be started" in done.stderr, done.stderr[-3000:]
    assert not list((tmp_path / "multirun" / "store").glob("*/checkpoints"))
    slurm = sweep(tmp_path, tiny_backbone, "trainer=ddp", "trainer.devices=2", "hydra/launcher=basic", slurm=True)
    assert slurm.returncode == 1 and "hydra.launcher.nodes=1 hydra.launcher.tasks_per_node=2" in slurm.stderr
    monkeypatch.setattr(sys, "argv", ["-c"])  # as the processes of sweep.compare
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    check_processes(Trainer(**options, devices=1))
    with pytest.raises(ConfigError, match="trainer.devices=2: from here no other process"):
        check_processes(Trainer(**options, devices=2, strategy="ddp"))
    with pytest.raises(ConfigError, match="trainer.devices=1 with trainer.num_nodes=2: from here no other process"):
        check_processes(Trainer(**options, devices=1, num_nodes=2, strategy="ddp"))


def test_words_after_the_multi_node_file_reach_train_last(tmp_path: Path) -> None:
    """Of two values of a key Hydra takes the later one: so a run is gone on with."""
    for name, text in (("scontrol", "echo node0"), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    told = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64"}  # fmt: skip
    given = ["hydra.run.dir=runs/slurm-3", "name=two words"]
    done = subprocess.run(
        ["bash", str(ROOT / "experiments" / "multi_node.sbatch"), *given],
        env={**os.environ, **told}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    words = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert words[words.index("train.py") + 1] == "experiment=rank16"
    assert words[-3:] == ["hydra.run.dir=runs/slurm-7", *given]


def test_ray_leaves_the_same_folders(tmp_path: Path, tiny_backbone: Path) -> None:
    """On a Ray of this machine, started for the sweep: both jobs start at once, and Ray passes on what they print."""
    pytest.importorskip("ray", reason="pip install lora-dae[ray]")
    local = "+hydra.launcher.ray.init={address:local,num_cpus:2,include_dashboard:false}"
    done = sweep(tmp_path, tiny_backbone, "hydra/launcher=ray", local)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = check(tmp_path)
    assert sum("(_run_job pid=" in line and "trained already" in line for line in done.stdout.splitlines()) == 1
    assert not list(folder.glob("*/job.json"))  # our own launcher had no part in it
