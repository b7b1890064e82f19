"""A job's own word on how far it is, for the launcher's table and for pruning."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from lora_dae.sweep.files import write_json

EVERY = 1.0  # seconds
SHOWN = ("train/loss", "val/loss")


class Status(Callback):
    """Keeps ``status.json``: phase, step, of, metrics, and since when; at most once a second, on rank 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first, self._begun, self._written = 0, 0.0, 0.0
        self._validated: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._first, self._begun, self._written = trainer.global_step, time.time(), 0.0
        self._validated = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and time.time() - self._written >= EVERY:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and "val/loss" in trainer.callback_metrics:
            self._validated[str(trainer.global_step)] = float(trainer.callback_metrics["val/loss"])
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: Any) -> None:
        self._written = time.time()
        found = trainer.callback_metrics
        told = {
            "phase": pl_module.stage,
            "step": trainer.global_step,
            "of": trainer.max_steps,
            "first": self._first,
            "begun": self._begun,
            "time": self._written,
            "metrics": {name: float(found[name]) for name in SHOWN if name in found},
            "validated": self._validated,
        }
        write_json(self.path, told)


def say(path: Path, phase: str) -> None:
    """Outside of training: what is done now."""
    write_json(path, {"phase": phase, "time": time.time()})
