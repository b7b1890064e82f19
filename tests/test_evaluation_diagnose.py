"""The diagnosis: closed forms of its numbers, and the command on a finished run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compose import config

from lora_dae.evaluation.diagnose import Diagnosis, calibration_slope, missing_energy
from lora_dae.training import run as training

ROOT = Path(__file__).parent.parent


def test_a_posterior_mean_is_calibrated_and_misses_nothing_and_a_shrunk_one_shows_by_how_much():
    x0, noise = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0))
    mean = 0.5 * (x0 + noise)  # E[x0 | x0 + noise] for unit variances
    assert calibration_slope(x0, mean) == pytest.approx(1, abs=0.01)
    assert missing_energy(x0, mean) == pytest.approx(0, abs=0.01)
    assert calibration_slope(x0, 0.8 * mean) == pytest.approx(1 / 0.8, abs=0.01)
    assert missing_energy(x0, 0.8 * mean) == pytest.approx(1 - 0.8 / 1.2, abs=0.01)


def test_the_verdict_names_what_is_missing_and_what_is_too_much():
    def said(*final):
        return Diagnosis([50], [[1, 1, 1]], [[0, 0, 0]], [50], {"strength 0": [list(final)]}, None).verdict()[0]

    assert "lacks texture" in said(0.7, 1, 1) and "too much" in said(1, 1.3, 1) and "is right" in said(1, 1, 1.05)


def test_the_command_diagnoses_a_finished_run(tiny_backbone: Path, tmp_path: Path) -> None:
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "evaluation.frozen=false")
    training.run(cfg)
    done = subprocess.run(
        [sys.executable, "-m", "lora_dae.enhancement", "diagnose", f"run={tmp_path / 'run'}", "num_samples=4"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "run" / "diagnosis"
    found = json.loads((folder / "diagnosis.json").read_text())
    assert len(found["slope"]) == len(found["timesteps"]) and set(found["energy"]) == {"strength 0", "strength 1"}
    assert 0 < found["confidence"]["garment"] <= 1
    assert (folder / "energy.png").stat().st_size > 0 and (folder / "matches.png").stat().st_size > 0
    missing = subprocess.run(
        [sys.executable, "-m", "lora_dae.enhancement", "diagnose", f"run={tmp_path / 'none'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert missing.returncode == 2 and "does not exist" in missing.stderr
