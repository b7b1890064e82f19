"""Runs in W&B that are online when asked to be, and closed when a training fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from compose import config
from rich.console import Console
from test_training_tracking import read_offline, records

from lora_dae.config import TrackingConfig
from lora_dae.training import run as training
from lora_dae.training import tracking
from lora_dae.training.ended import NonFiniteLossError
from lora_dae.training.module import LoraDae


def test_online_is_online_whatever_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B takes WANDB_MODE, unless wandb.init is told otherwise."""
    told: dict[str, Any] = {}
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb, "init", lambda **given: told.update(given))
    logger = tracking.wandb_logger(TrackingConfig(wandb="online"), tmp_path, {}, Console(quiet=True))
    assert logger is not None
    _ = logger.experiment
    assert told["mode"] == "online"


def test_a_training_that_failed_leaves_the_next_one_a_run_of_its_own(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, as jobs of Hydra's own launcher are: it would log into the run that is still open."""
    original = LoraDae._losses

    def broken(self: LoraDae, batch: dict[str, Any], draws: Any) -> Any:
        return original(self, batch, draws) * float("nan")

    cfg = config(
        tiny_backbone, tmp_path / "first", tmp_path / "cache", "tracking.wandb=offline", "trainer.max_steps=1",
        "trainer.log_every_n_steps=1", "enhancement=none", "adapter.rank=2",
    )  # fmt: skip
    with monkeypatch.context() as patched:
        patched.setattr(LoraDae, "_losses", broken)
        with pytest.raises(NonFiniteLossError):
            training.train(cfg)
    assert wandb.run is None
    trained = training.train(replace(cfg, run_dir=str(tmp_path / "next")))
    tracking.finish(trained.loggers)
    for name, code in (("first", 1), ("next", 0)):
        run, rows, _ = read_offline(tmp_path / name)
        (path,) = (tmp_path / name).glob("wandb/offline-run-*/*.wandb")
        (end,) = [r.exit for r in records(path) if r.WhichOneof("record_type") == "exit"]
        assert (run.display_name, end.exit_code) == (name, code)
        assert any("train/loss" in row for row in rows) == (name == "next")
