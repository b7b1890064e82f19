"""What the log says of speed: of steps alone, and without a GPU being waited for."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compose import config

from lora_dae.data.cache import LatentCache
from lora_dae.evaluation.report.plots import read_metrics
from lora_dae.training import callbacks
from lora_dae.training import run as training
from lora_dae.training.callbacks import Checkpoint, Throughput
from lora_dae.training.module import LoraDae
from lora_dae.training.stages import Training


def test_checkpoints_and_pictures_are_neither_steps_nor_waiting_for_data(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of its own: a step takes 1 s and a batch half of one; what comes between them takes minutes."""
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    train, fetch, save = LoraDae.training_step, LatentCache.__getitems__, Checkpoint._save

    def trains(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        passes(1)
        return train(self, batch, batch_idx)

    def fetches(self: LatentCache, numbers: Any) -> dict[str, torch.Tensor]:
        passes(0.5)
        return fetch(self, numbers)

    def saves(self: Checkpoint, trainer: Any) -> None:
        passes(100)
        save(self, trainer)

    def draws(self: Training, ema: Any, step: int) -> None:
        passes(1000)

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(LoraDae, "training_step", trains)
    monkeypatch.setattr(LatentCache, "__getitems__", fetches)
    monkeypatch.setattr(Checkpoint, "_save", saves)
    monkeypatch.setattr(Training, "_grid", draws)
    cfg = config(
        tiny_backbone, tmp_path / "run", tmp_path / "cache", "trainer.max_steps=4", "trainer.val_check_interval=2",
        "trainer.limit_val_batches=0", "trainer.log_every_n_steps=1", "tracking.sample_every_n_steps=3",
        "enhancement=none", "adapter.rank=2", "logger=csv", "data.batch_size=4",
    )  # fmt: skip
    training.train(cfg)
    found = read_metrics(tmp_path / "run" / "csv" / "metrics.csv")
    assert found["images/s"][1] == pytest.approx([4.0] * 4)
    # Of three times between steps the first alone is waiting: a checkpoint fills the second, pictures the third.
    assert found["data_wait"][1] == pytest.approx([0.5 / 2.5, 0.5 / 3.5, 0.5 / 4.5])


def test_speed_is_logged_in_tensors_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning puts plain numbers on the model's device, and reads them back from there in every step."""
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=count().__next__))
    told: dict[str, Any] = {}
    module: Any = SimpleNamespace(log=lambda name, value, **_: told.update({name: value}))
    throughput, trainer = Throughput(4), SimpleNamespace(world_size=1)
    for number in range(2):
        throughput.on_train_batch_start(trainer, module, None, number)  # type: ignore[arg-type]
        throughput.on_train_batch_end(trainer, module, None, None, number)  # type: ignore[arg-type]
    assert told.keys() == {"images/s", "data_wait"}
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in told.values())
