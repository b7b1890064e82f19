"""Several processes as a user starts them: one run folder, one table, one run in W&B."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compose import SHORT
from test_training_ddp import distance, weights
from test_training_tracking import read_offline

from lora_dae.sampling.load import load_run
from lora_dae.training.stages import planned_stages

ROOT = Path(__file__).parent.parent


def test_two_processes_make_one_run(tmp_path: Path, tiny_backbone: Path) -> None:
    """As a user types it: Lightning starts the second process. One run in W&B too, every step in it once."""
    short = [o for o in SHORT if not o.startswith(("trainer.max_steps", "data.difficulty", "tracking.wandb"))]
    arguments = [
        "experiment=rank4", "trainer=ddp", "trainer.devices=2", "trainer.max_steps=2", "adapter.rank=2",
        f"backbone.path={tiny_backbone}", f"data.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}",
        "evaluation.frozen=false", "tracking.wandb=offline", "trainer.log_every_n_steps=1", *short,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    run = load_run(tmp_path / "run")
    assert run.cfg.trainer["devices"] == 2
    assert (tmp_path / "run" / "report.html").is_file()
    assert len(list((tmp_path / "run" / "csv").glob("metrics*.csv"))) == 1
    told, rows, _ = read_offline(tmp_path / "run")  # there is exactly one
    assert told.job_type == "train"
    planned = planned_stages(run.cfg, run.enhancement)
    steps = [row["trainer/global_step"] for row in rows if "train/loss" in row]
    assert steps == sorted(set(steps)) and len(steps) == sum(count for _, count, _ in planned)
    assert any("test/fd_effnet" in row for row in rows)


def test_two_agents_of_torchrun_make_one_run(tmp_path: Path, tiny_backbone: Path) -> None:
    """As on two nodes: an agent each, with the first process of its node; one folder, one table, one run in W&B."""
    short = [o for o in SHORT if not o.startswith(("trainer.max_steps", "tracking.wandb"))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        "--rdzv-id=one", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1", str(ROOT / "train.py"),
        "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2", "trainer.max_steps=1", "adapter.rank=2",
        "enhancement=none", f"backbone.path={tiny_backbone}", f"data.cache_dir={tmp_path / 'cache'}",
        f"hydra.run.dir={tmp_path / 'run'}", "evaluation.frozen=false", "evaluation.controls=false",
        "tracking.wandb=offline", *short,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=out, stderr=subprocess.STDOUT)
        for out in ((tmp_path / f"agent{number}.log").open("w") for number in range(2))
    ]
    try:
        codes = [agent.wait(timeout=300) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    texts = [(tmp_path / f"agent{number}.log").read_text() for number in range(2)]
    assert codes == [0, 0], texts
    assert sorted(text.count("2 processes, ") for text in texts) == [0, 1]
    assert sorted(text.count("Distance to real photos") for text in texts) == [0, 1]
    assert list(tmp_path.rglob("report.html")) == [tmp_path / "run" / "report.html"]
    assert len(list((tmp_path / "run" / "csv").glob("metrics*.csv"))) == 1
    assert sum("test/fd_effnet" in row for row in read_offline(tmp_path / "run")[1]) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_trains(tmp_path: Path, tiny_backbone: Path) -> None:
    """With NCCL between them: adapter and all parts of the enhancement."""
    short = [o for o in SHORT if not o.startswith(("trainer.accelerator", "data.batch_size", "enhancement.batch_size",
                                                   "enhancement.texture_batch_size"))]  # fmt: skip
    for devices in (1, 2):
        size = 4 // devices
        arguments = [
            "trainer=ddp", "trainer.accelerator=gpu", f"trainer.devices={devices}", f"data.batch_size={size}",
            f"enhancement.batch_size={size}", f"enhancement.texture_batch_size={size}", "adapter.rank=2",
            f"backbone.path={tiny_backbone}", f"data.cache_dir={tmp_path / 'cache'}",
            f"hydra.run.dir={tmp_path / str(devices)}", "evaluation.frozen=false", *short,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("2 processes" in done.stdout) == (devices == 2)
    assert distance(weights(tmp_path / "2"), weights(tmp_path / "1")) < 1e-2
