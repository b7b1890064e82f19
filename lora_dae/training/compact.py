"""Checkpoints of 10 bytes a weight instead of 16, from which a run still goes on bit for bit.

Weights are stored as they are. Adam's two moments and what the moving average differs from the weights by are rounded
to bfloat16 in the running training itself, after every ``EVERY`` steps: stochastically, so that what is smaller than a
rounding step is kept on average (1502.02551), and alike in all processes. A checkpoint of such a step stores them in 2
bytes each and nothing is lost; one of any other step (Ctrl-C) stores them in 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lora_dae.adapter.inject import trainable_parameters
from lora_dae.training.ema import EMACallback

EVERY = 5  # optimizer steps
MOMENTS = ("exp_avg", "exp_avg_sq")


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 of any shape, each to one of its two neighbors in bfloat16, the nearer one more often: unbiased."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(2**16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    return ((bits + noise) & -(2**16)).view(torch.float32)


class CompactState(Callback):
    """Rounds what the optimizer and ``ema`` hold; to be called after ``ema`` and before what writes checkpoints."""

    def __init__(self, ema: EMACallback) -> None:
        self.ema = ema
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step or step % EVERY:  # gradients accumulate, or it is not yet time
            return
        self._last_step = step
        generator = torch.Generator(pl_module.device).manual_seed(step)
        for held in _moments(optimizer.state for optimizer in trainer.optimizers):
            for name in MOMENTS:
                held[name].copy_(round_to_bfloat16(held[name], generator))
        if self.ema.ema is not None:
            for name, weight in trainable_parameters(pl_module).items():
                average = self.ema.ema.shadow[name]
                offset = round_to_bfloat16(average - weight, generator)
                # Adding can lose the offset's last bit: what is left of it is stored exactly.
                average.copy_(weight + (weight + offset - weight).bfloat16().float())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for saved in checkpoint["optimizer_states"]:
            saved["state"] = {
                key: {name: _small(value) if name in MOMENTS else value for name, value in held.items()}
                for key, held in saved["state"].items()
            }
        average, weights = _average(checkpoint), checkpoint["state_dict"]
        for name, value in average.items():
            offset = (value - weights[name]).bfloat16()
            if torch.equal(weights[name] + offset.float(), value):
                average[name] = offset

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        average, weights = _average(checkpoint), checkpoint["state_dict"]
        for name, value in average.items():  # an optimizer casts its moments itself
            if value.dtype == torch.bfloat16:
                average[name] = weights[name] + value.float()


def _moments(states: Iterable[Mapping[Any, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [held for state in states for held in state.values() if all(name in held for name in MOMENTS)]


def _small(value: Tensor) -> Tensor:
    """In bfloat16 where that holds every value exactly."""
    small = value.bfloat16()
    return small if torch.equal(small.float(), value) else value


def _average(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The moving average's values in a checkpoint, to be replaced in place."""
    return checkpoint["callbacks"].get(EMACallback.__name__, {}).get("shadow", {})
