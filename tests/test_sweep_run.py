"""A whole sweep as a user types it, on the tiny backbone: one training, two runs, one report; by two engines."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compose import SHORT

ROOT = Path(__file__).parent.parent


def sweep(tmp_path: Path, backbone: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    short = [o for o in SHORT if not o.startswith(("trainer.max_steps", "tracking.wandb"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if not k.startswith("SLURM")}
    return subprocess.run(
        [
            sys.executable, str(ROOT / "train.py"), "-m", "adapter.rank=2", "enhancement.strength=0,1",
            "trainer.max_steps=2", f"backbone.path={backbone}", "evaluation.frozen=false", "tracking.wandb=disabled",
            f"data.cache_dir={tmp_path / 'cache'}", *short, *overrides,
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


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
    assert "group: adapter" not in (folder / "0_default" / "config.yaml").read_text()
    assert f"group: {folder.name}" in (folder / "0_default" / "config.yaml").read_text()
    before = (folder / "0_default" / "metrics.json").stat().st_mtime_ns
    again = sweep(tmp_path, tiny_backbone, "-j", "2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (folder / "0_default" / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("torchrun", [False, True], ids=["lightning", "torchrun"])
def test_sweep_of_jobs_of_two_processes(torchrun: bool, tmp_path: Path, tiny_backbone: Path) -> None:
    """The first job trains on two ranks; the second finds that training and only measures."""
    engine = f"hydra.launcher.torchrun={str(torchrun).lower()}"
    done = sweep(tmp_path, tiny_backbone, "trainer=ddp", "trainer.devices=2", engine)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = check(tmp_path)
    logs = [path.read_text() for path in sorted(folder.glob("*/job.log"))]
    assert ["trained already" in log for log in logs] == [False, True]
    assert len(list((tmp_path / "multirun" / "store").glob("*/csv/metrics*.csv"))) == 1


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="pip install lora-dae[slurm]")
def test_submitit_leaves_the_same_folders(tmp_path: Path, tiny_backbone: Path) -> None:
    """Both jobs start at once: the second waits for the first one's training at the store's lock."""
    done = sweep(tmp_path, tiny_backbone, "hydra/launcher=submitit_local")
    assert done.returncode == 0, done.stderr[-3000:]
    check(tmp_path)


def test_ray_leaves_the_same_folders(tmp_path: Path, tiny_backbone: Path) -> None:
    """On a Ray of this machine, started for the sweep: both jobs start at once, and Ray passes on what they print."""
    pytest.importorskip("ray", reason="pip install lora-dae[ray]")
    local = "+hydra.launcher.ray.init={address:local,num_cpus:2,include_dashboard:false}"
    done = sweep(tmp_path, tiny_backbone, "hydra/launcher=ray", local)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = check(tmp_path)
    assert sum("(_run_job pid=" in line and "trained already" in line for line in done.stdout.splitlines()) == 1
    assert not list(folder.glob("*/job.json"))  # our own launcher had no part in it
