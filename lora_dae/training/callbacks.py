"""What happens around the steps: throughput, checkpoints, sample grids, a clean stop on Ctrl-C, an early one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from lora_dae.adapter.inject import kept_modes


class Throughput(Callback):
    """Logs images/s of the training steps alone, and the share of the time spent waiting for data.

    To be called before what writes or draws after a step: neither counts as the step, nor (``pause``) as waiting.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._end = self._begin = 0.0
        self._busy = self._waited = 0.0
        self._steps = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._begin = time.perf_counter()
        if self._end:
            self._waited += self._begin - self._end

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._end = time.perf_counter()
        self._busy += self._end - self._begin
        self._steps += 1
        rate = self._steps * self.images_per_step * trainer.world_size / self._busy
        # Tensors on the CPU: of a plain number Lightning makes one on the GPU, and waits for it.
        pl_module.log("images/s", torch.tensor(rate), prog_bar=True, rank_zero_only=True)
        if self._steps > 1:
            waited = self._waited / (self._waited + self._busy)
            pl_module.log("data_wait", torch.tensor(waited), rank_zero_only=True)

    def pause(self) -> None:
        """Until the next step begins, nothing is waiting for data."""
        self._end = 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.pause()


class Checkpoint(Callback):
    """Writes ``path`` every so many steps and at the end; atomically, so that a kill leaves the last good one.

    ``after_validation``: once a validation at such a step is judged, because Lightning does not repeat it on resuming.
    """

    def __init__(self, path: Path, every_n_steps: int, after_validation: bool = False) -> None:
        self.path, self.every_n_steps, self.after_validation = path, every_n_steps, after_validation
        self._saved = 0

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved:
            return
        partial = self.path.with_suffix(".partial")
        try:
            trainer.save_checkpoint(partial)  # collective: every rank calls it
            if trainer.is_global_zero:
                partial.replace(self.path)
        finally:
            if trainer.is_global_zero:  # a full disk leaves the last good one and no half of the next
                partial.unlink(missing_ok=True)
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every_n_steps == 0 and not self.after_validation:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.after_validation:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer)


class EarlyStop(EarlyStopping):
    """Lightning's own on val/loss, every ``interval`` steps: a stop in between, as Ctrl-C, validates as well.

    A training that had stopped already stops again before its first step.
    """

    def __init__(self, patience: int, interval: int) -> None:
        super().__init__("val/loss", patience=patience, check_on_train_epoch_end=False)
        self.interval = interval
        self.why = ""  # it stopped, in words

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step % self.interval == 0:
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})  # more of it than before lets it go on

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True
        else:
            self.stopping_reason = EarlyStoppingReason.NOT_STOPPED

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        reasons = {
            EarlyStoppingReason.PATIENCE_EXHAUSTED: f"val/loss did not fall below {float(self.best_score):.4g} in "
            f"{self.wait_count} validation{'s' if self.wait_count > 1 else ''}",
            EarlyStoppingReason.NON_FINITE_METRIC: "val/loss is not finite",
        }
        if self.stopping_reason in reasons and trainer.global_step < trainer.max_steps:
            self.why = f"stopped early at step {trainer.global_step} of {trainer.max_steps}: "
            self.why += reasons[self.stopping_reason]


class CleanInterrupt(Callback):
    """On the first Ctrl-C the step is finished and a checkpoint written; the second one stops at once.

    Whichever process of a run is told, all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._asked = False
        self._previous: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(signum: int, frame: Any) -> None:
            self._asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self._previous = signal.signal(signal.SIGINT, stop)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            self.interrupted = trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        # In the last validation, which comes after the last step.
        self.interrupted = trainer.strategy.reduce_boolean_decision(self._asked, all=False)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class Drawing(Callback):
    """Draws the validation prompts every so many steps, on the averaged weights; every process calls ``draw``.

    ``paused`` is called after it.
    """

    def __init__(self, every_n_steps: int, draw: Callable[[int], None], paused: Callable[[], None]) -> None:
        self.every_n_steps, self.draw, self.paused = every_n_steps, draw, paused
        self._drawn = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step < trainer.max_steps and step != self._drawn:
            self._drawn = step  # batches whose gradients only accumulate come again with the same step
            with kept_modes(pl_module):
                pl_module.eval()
                self.draw(step)
            self.paused()


class Rest(Callback):
    """Calls ``rest`` once the data are encoded and before the model comes to the device, whose memory is free then.

    Lightning starts the other processes in ``fit``: whatever is encoded before, one encodes alone.
    """

    def __init__(self, rest: Callable[[], None]) -> None:
        self.rest = rest

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.rest()


class StepProgress(RichProgressBar):
    """Lightning's rich bar, counting steps: the training stream has no epochs."""

    def __init__(self, title: str) -> None:
        super().__init__(leave=True, theme=RichProgressBarTheme(metrics_format=".4g", metrics_text_delimiter="  "))
        self.title = title

    def _get_train_description(self, current_epoch: int) -> str:
        return f"training {self.title}"

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:  # type: ignore[override]
        found = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        return found if pl_module.last_loss is None else {"train/loss": pl_module.last_loss, **found}
