"""The diagnosis: closed forms of its numbers, and the command on a finished run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compose import config
from rich.console import Console
from scipy import stats
from test_training_on_policy import VARIANCE, ExactDenoiser, scheduler

from lora_dae.enhancement.gates import WINDOW
from lora_dae.evaluation.diagnose import (
    Watch,
    calibration_slope,
    diagnose,
    missing_energy,
    told_apart,
)
from lora_dae.evaluation.diagnosis import Diagnosis
from lora_dae.sampling.loop import Conditions, Guidance, sample_latents
from lora_dae.sampling.schedulers import build_scheduler
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
        return Diagnosis([50], [[1, 1, 1]], [[0, 0, 0]], [50], {"strength 0": [list(final)]}, None, None).verdict()[0]

    assert "lacks texture" in said(0.7, 1, 1) and "too much" in said(1, 1.3, 1) and "is right" in said(1, 1, 1.05)


def test_the_verdict_says_whether_pairs_match():
    def said(own, other):
        gates = told_apart(*(torch.full((20, 4, 4), value) + spread for value in (own, other)))
        return Diagnosis([], [], [], [], {}, {"garment": 0.4, "beside": 0.2}, gates).verdict()

    spread = torch.linspace(-0.1, 0.1, 20).view(20, 1, 1)
    assert "0.40 on the garment, 0.20 beside" in said(0.5, 0.1)[0]
    assert (
        "0.50 open with a pair's own source, 0.10 with another one's: the module tells them apart" in said(0.5, 0.1)[1]
    )
    assert "do the pairs match?" in said(0.3, 0.3)[1]
    own, other = torch.randn(2, 30, 4, 4, generator=torch.Generator().manual_seed(0))
    found, more = told_apart(own, other), (own - other).mean((1, 2))
    half = float(stats.norm.ppf(0.975) * stats.sem(more))
    assert (found["low"], found["high"]) == pytest.approx(
        (float(more.mean()) - half, float(more.mean()) + half), rel=1e-3
    )


def test_energies_along_a_chain_are_the_closed_form():
    """White latents, the exact denoiser, DDIM: each step multiplies their standard deviation by a cosine."""
    base, noise = scheduler(), torch.randn(2, 8, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    watch = Watch(VARIANCE**0.5 * noise[0], noise[1])
    plain = build_scheduler("ddim", base)
    start = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    conditions = Conditions(torch.zeros(8, 2, 3), torch.zeros(2, 3))
    sample_latents(ExactDenoiser(base.alphas_cumprod), plain, start, conditions, Guidance(), 10, watch)
    levels = [base.alphas_cumprod[t] / (1 - base.alphas_cumprod[t]) for t in plain.timesteps]  # (alpha / sigma)^2
    seen = next(float(level) for level in levels if level >= math.exp(2 * WINDOW[1]))
    assert watch.first is not None and (watch.first.alpha / watch.first.sigma) ** 2 == pytest.approx(seen, rel=1e-4)
    found = [(energies[:, 0] / energies[:, 1]).tolist() for energies in watch.energies]
    expected = 1.0
    for k, t in enumerate(plain.timesteps):
        following = plain.timesteps[k + 1] if k + 1 < len(plain.timesteps) else None
        a2 = base.alphas_cumprod[t]
        b2 = plain.final_alpha_cumprod if following is None else base.alphas_cumprod[following]
        states = [(VARIANCE * x + 1 - x) ** 0.5 for x in (a2, b2)]
        expected *= float((VARIANCE * (a2 * b2) ** 0.5 + ((1 - a2) * (1 - b2)) ** 0.5) / (states[0] * states[1])) ** 2
        for ratio, within in zip(found[k], (0.02, 0.06, 0.15), strict=True):  # coarse bands have fewer numbers
            assert ratio == pytest.approx(expected, rel=within)
    assert expected < 0.7


def test_the_command_diagnoses_a_finished_run(tiny_backbone: Path, tmp_path: Path) -> None:
    options = ("evaluation.frozen=false", "sampling.batch_size=2")  # fewer than it shows
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options)
    training.run(cfg)
    done = subprocess.run(
        [sys.executable, "-m", "lora_dae.enhancement", "diagnose", f"run={tmp_path / 'run'}", "num_samples=4"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "run" / "diagnosis"
    found = json.loads((folder / "diagnosis.json").read_text())
    assert len(found["slope"]) == len(found["timesteps"]) and set(found["energy"]) == {"strength 0", "strength 1"}
    assert 0 < found["confidence"]["garment"] <= 1 and found["gates"]["low"] <= found["gates"]["high"]
    assert "with another one's" in done.stdout
    assert (folder / "energy.png").stat().st_size > 0 and (folder / "matches.png").stat().st_size > 0
    own = tmp_path / "run" / "config.yaml"  # a solver that draws fresh noise, whatever the global generator
    own.write_text(own.read_text().replace("scheduler: dpm++", "scheduler: euler_a"))
    energies = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        diagnose(tmp_path / "run", Console(quiet=True), "test", 4)
        energies.append(json.loads((folder / "diagnosis.json").read_text())["energy"])
    assert energies[0] == energies[1] != found["energy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["run=none"], "does not exist"), (["run=none", "num_samples=1"], "num_samples=1 is below 2")],
)
def test_bad_requests_of_a_diagnosis_are_one_sentence(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_dae.enhancement.__main__ import main

    monkeypatch.setattr(sys, "argv", ["diagnose", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err
