"""A training that stops early: at which step and why, also after a kill in between, and how it goes on."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from compose import config
from safetensors.torch import load_file

from lora_dae.config import Config
from lora_dae.training import run as training
from lora_dae.training.ended import InterruptedRunError
from lora_dae.training.module import LoraDae


def script_validation(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Validation after step s finds ``losses[s]``."""

    def scripted(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self._validated += torch.tensor([losses[self.global_step], 1.0])

    monkeypatch.setattr(LoraDae, "validation_step", scripted)


EARLY = ("trainer.max_steps=6", "trainer.val_check_interval=1", "trainer.early_stop_patience=2", "enhancement=none",
         "evaluation.frozen=false")  # fmt: skip


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


class Interrupt(lightning.Callback):
    """Ctrl-C in the middle of the step after ``step``, or in the validation after it."""

    def __init__(self, step: int, validating: bool = False) -> None:
        self.step, self.validating = step, validating

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.validating:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == self.step and self.validating:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_between_two_validations_is_not_judged(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It validates as well; with step 3 there would be two validations without a better one at step 4."""
    script_validation(monkeypatch, {2: 2.0, 3: 9.0, 4: 3.0, 6: 1.0})
    options = ("trainer.max_steps=7", "trainer.val_check_interval=2", "trainer.early_stop_patience=2",
               "enhancement=none")  # fmt: skip
    make = partial(config, tiny_backbone, tmp_path / "run", tmp_path / "cache", *options)
    with pytest.raises(InterruptedRunError, match="step 3 of 7"):
        training.train(make(), [Interrupt(2)])
    assert training.train(make("ckpt_path=last")).stopped_early == ""


def test_a_stop_in_the_last_validation_is_one(tiny_backbone: Path, tmp_path: Path) -> None:
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "trainer.max_steps=2")
    with pytest.raises(InterruptedRunError, match="step 2 of 2"):
        training.train(cfg, [Interrupt(2, validating=True)])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["adapter.ckpt"]


def test_training_stops_early_and_says_when_and_why(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best at step 2, two validations without a better one: the end is step 4, also after a kill in between."""

    def make(*overrides: str, name: str) -> Config:
        return config(tiny_backbone, tmp_path / name, tmp_path / "cache", *overrides)

    script_validation(monkeypatch, {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0, 5: 1.0, 6: 1.0})
    training.run(make(*EARLY, name="straight"))
    said = "stopped early at step 4 of 6: val/loss did not fall below 2 in 2 validations"
    assert capsys.readouterr().out.strip().endswith(said)

    class KilledError(Exception):
        pass

    steps: list[int] = []
    original = LoraDae.training_step

    def dies_at(death: int) -> None:
        def step(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            if self.global_step == death:
                raise KilledError
            steps.append(self.global_step)
            return original(self, batch, batch_idx)

        monkeypatch.setattr(LoraDae, "training_step", step)

    dies_at(3)
    with pytest.raises(KilledError):
        training.train(make(*EARLY, name="cut"))
    dies_at(-1)
    assert training.train(make(*EARLY, "ckpt_path=last", name="cut")).stopped_early == said
    assert steps == [0, 1, 2, 3]
    straight, resumed = (weights(Path(make(name=n).run_dir)) for n in ("straight", "cut"))
    assert straight and all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert training.train(make(*EARLY, "ckpt_path=last", name="cut")).stopped_early == said  # it had stopped: no step
    assert steps == [0, 1, 2, 3]
    longer = [o for o in EARLY if "patience" not in o] + ["trainer.early_stop_patience=4"]
    assert training.train(make(*longer, "ckpt_path=last", name="cut")).stopped_early == ""
    assert steps == [0, 1, 2, 3, 4, 5]
