"""Several processes as a user starts them: one run folder and one table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compose import SHORT

from lora_dae.sampling.load import load_run

ROOT = Path(__file__).parent.parent


def test_two_processes_make_one_run(tmp_path: Path, tiny_backbone: Path) -> None:
    """As a user types it: Lightning starts the second process."""
    short = [o for o in SHORT if not o.startswith(("trainer.max_steps", "data.difficulty"))]
    arguments = [
        "experiment=rank4", "trainer=ddp", "trainer.devices=2", "trainer.max_steps=2", "adapter.rank=2",
        f"backbone.path={tiny_backbone}", f"data.cache_dir={tmp_path / 'cache'}", f"hydra.run.dir={tmp_path / 'run'}",
        "evaluation.frozen=false", *short,
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
