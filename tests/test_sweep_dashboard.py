"""The W&B workspace, built but not saved: its panels ask for what runs log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_workspace_shows_what_runs_log() -> None:
    pytest.importorskip("wandb_workspaces")
    from lora_dae.sweep.dashboard import QUALITY, workspace

    made = workspace("somebody", "lora-dae", "LoRA-DAE")
    spec = made._to_model().model_dump_json(by_alias=True)
    for name in ("train/loss", "val/loss", "images/s", "enhancement/power_gap", "test/grid", "val/samples", *QUALITY):
        assert name in spec
    assert [section.name for section in made.sections] == ["Samples", "Quality", "Training", "What it depends on"]


def test_without_a_login_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_dae.sweep.dashboard", "--entity", "somebody"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: the dashboard lives on the W&B server") and done.stderr.count("\n") == 1
