"""Exponential moving average of what trains, and of nothing else.

    shadow <- decay_n * shadow + (1 - decay_n) * weight,    decay_n = min(decay, (1 + n) / (10 + n))

n = updates so far; the warm-up keeps the random start from lingering. (Lightning's own EMAWeightAveraging
copies the whole module, frozen backbone included.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lora_dae.adapter.inject import trainable_parameters
from lora_dae.config import ConfigError


class TrainableEMA:
    """Averaged copies of named parameters, on their device and in their dtype. ``decay`` is in [0, 1)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"optimizer.ema_decay is {decay}; set it to at least 0 and below 1.")
        self.decay = decay
        self.num_updates = 0
        self.shadow = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._raw: dict[str, Tensor] | None = None  # the trained weights while the average is swapped in

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take one step towards the parameters; call it after every optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.shadow = {name: self.shadow[name].to(parameter.device) for name, parameter in parameters.items()}
        torch._foreach_lerp_(list(self.shadow.values()), list(parameters.values()), 1 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def swap_in(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put the average into the parameters, in place; nothing happens if it is there already."""
        if self._raw is None:
            self._raw = {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                parameter.copy_(self.shadow[name])

    @torch.no_grad()
    def swap_out(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the trained weights back, bit for bit; nothing happens if they are there already."""
        if self._raw is not None:
            for name, parameter in parameters.items():
                parameter.copy_(self._raw[name])
            self._raw = None

    @contextmanager
    def swapped(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Run a block on the averaged weights. May be nested: the outermost block swaps."""
        if self._raw is not None:
            yield
            return
        self.swap_in(parameters)
        try:
            yield
        finally:
            self.swap_out(parameters)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ConfigError if the state averages other parameters than these."""
        shadow: dict[str, Tensor] = state["shadow"]
        for name in self.shadow.keys() | shadow.keys():
            if name not in shadow or name not in self.shadow or shadow[name].shape != self.shadow[name].shape:
                raise ConfigError(
                    f"The checkpoint's moving average does not fit {name}: it was written with another "
                    "adapter configuration; resume with that one, or start anew without ckpt_path."
                )
        self.num_updates = state["num_updates"]
        self.shadow = {name: shadow[name].to(own, copy=True) for name, own in self.shadow.items()}


class EMACallback(Callback):
    """Averages after every optimizer step, validates on the average, travels in the checkpoint.

    The checkpoint's own weights are the trained ones. ``with callback.swapped(module):`` runs on the average.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.ema: TrainableEMA | None = None
        self._restored: dict[str, Any] | None = None  # Lightning restores before on_fit_start
        self._last_step = 0

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Run a block on the averaged weights; on the weights as they are before any fit."""
        if self.ema is None:
            yield
        else:
            with self.ema.swapped(trainable_parameters(module)):
                yield

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ema = TrainableEMA(trainable_parameters(pl_module), self.decay)
        if self._restored is not None:
            self.ema.load_state_dict(self._restored)
            self._restored = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        self._parameters = trainable_parameters(pl_module)  # to look for them in every step takes milliseconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.ema is not None and trainer.global_step != self._last_step:  # not while gradients accumulate
            self._last_step = trainer.global_step
            self.ema.update(self._parameters)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ema is not None:
            self.ema.swap_in(trainable_parameters(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ema is not None:
            self.ema.swap_out(trainable_parameters(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
