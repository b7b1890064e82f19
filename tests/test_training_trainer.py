"""What trainer.* may ask of lightning.Trainer: what it cannot do here is refused, what it can is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from compose import config
from lightning.pytorch.callbacks import ProgressBar

from lora_dae.config import Config, ConfigError, EnhancementConfig
from lora_dae.training import run as training
from lora_dae.training.trainer import check_deterministic, check_trainer


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("callbacks", []),
        ("check_val_every_n_epoch", 1),
        ("default_root_dir", "elsewhere"),
        ("enable_checkpointing", False),
        ("enable_model_summary", True),
        ("limit_train_batches", 2),
        ("logger", False),
        ("max_epochs", 1),
        ("num_sanity_val_steps", 2),
        ("use_distributed_sampler", True),
    ],
)
def test_what_lightning_takes_and_a_training_would_not_do_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^trainer.{option} cannot be given here") as caught:
        check_trainer(Config(run_dir="x", trainer={"max_steps": 1, option: value}))
    assert "\n" not in str(caught.value)


class Bars(lightning.Callback):
    """The progress bars of a training."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found += [type(one).__name__ for one in trainer.callbacks if isinstance(one, ProgressBar)]


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_may_be_left_out(shown: bool, tiny_backbone: Path, tmp_path: Path) -> None:
    bars, bar = Bars(), f"+trainer.enable_progress_bar={str(shown).lower()}"
    options = ("enhancement=none", "adapter.rank=2", "logger=none", "trainer.max_steps=1")
    training.train(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", bar, *options), [bars])
    assert bars.found == ["StepProgress"] * shown


def test_gradients_that_no_gpu_computes_deterministically_are_refused_before_the_adapter_trains() -> None:
    """torch.use_deterministic_algorithms lists grid_sample among what raises; a CPU has it, and warn lets it be."""
    asked = Config(run_dir="x", conditioning="source", trainer={"max_steps": 1, "deterministic": True})
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    for enhancement in (EnhancementConfig(), EnhancementConfig(texture=False), EnhancementConfig(decoder=False)):
        with pytest.raises(ConfigError, match="trainer.deterministic=warn"):
            check_deterministic(replace(asked, enhancement=enhancement), gpu)
    check_deterministic(asked, cpu)
    check_deterministic(replace(asked, trainer={"max_steps": 1, "deterministic": "warn"}), gpu)
    check_deterministic(replace(asked, conditioning="none"), gpu)
    check_deterministic(replace(asked, enhancement=EnhancementConfig(texture=False, decoder=False)), gpu)
    check_deterministic(replace(asked, enhancement=EnhancementConfig(enabled=False)), gpu)
