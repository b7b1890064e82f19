"""What goes on around a stage: when the data are encoded, and how a stopped training says how to go on."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from compose import config
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_training_ddp import Interrupt

from lora_dae.backbone.load import Backbone
from lora_dae.data.module import PairDataModule
from lora_dae.training import run as training
from lora_dae.training.ended import InterruptedRunError
from lora_dae.training.resume import run_dir_override
from lora_dae.training.stages import Training

QUICK = ("enhancement=none", "adapter.rank=2", "logger=none")


def test_on_a_gpu_encoding_waits_for_the_other_processes(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning starts them in fit; VAE and text encoders have left the GPU before the model comes to it."""
    told: list[str] = []
    stages, fit, setup = Training.fit, lightning.Trainer.fit, PairDataModule.setup

    def on_a_gpu(self: Training, checkpoints: dict[str, Path]) -> None:
        self.device = torch.device("cuda")  # as the stages see it; Lightning trains on the CPU
        stages(self, checkpoints)

    def fits(self: lightning.Trainer, *args: Any, **options: Any) -> None:
        told.append("fit")
        fit(self, *args, **options)

    def encodes(self: PairDataModule, stage: str | None = None) -> None:
        told.append("encode")
        setup(self, stage)

    class Moved(lightning.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            told.append("model on the device")

    monkeypatch.setattr(Training, "fit", on_a_gpu)
    monkeypatch.setattr(lightning.Trainer, "fit", fits)
    monkeypatch.setattr(PairDataModule, "setup", encodes)
    monkeypatch.setattr(Backbone, "rest", lambda self, device, text=True: told.append(f"rest of {device}"))
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *QUICK, "trainer.max_steps=1")
    training.train(cfg, [Moved()])
    assert told == ["fit", "encode", "rest of cuda", "model on the device"]


@pytest.mark.parametrize(
    "name", ["plain_1.5-a", "my runs", "adapter.rank=4,8", "it's mine", 'a "b"', "[new] {x}", "kleid_ä", "$HOME (1)"]
)
def test_a_shell_and_hydra_read_the_run_folder_that_was_meant(name: str, tmp_path: Path) -> None:
    (word,) = shlex.split(run_dir_override(tmp_path / name))
    override = OverridesParser.create().parse_override(word)
    assert override.key_or_group == "hydra.run.dir" and override.value() == str(tmp_path / name)


def test_a_stopped_training_names_the_command_to_go_on(tiny_backbone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "my runs" / "a,b"
    cfg = config(tiny_backbone, run_dir, tmp_path / "cache", *QUICK, "trainer.max_steps=2")
    with pytest.raises(InterruptedRunError, match="step 1 of 2") as caught:
        training.train(cfg, [Interrupt(0)])
    words = shlex.split(str(caught.value).partition("go on with: ")[2])
    assert words[:2] == ["python", "train.py"] and words[-1] == "ckpt_path=last"
    assert OverridesParser.create().parse_override(words[-2]).value() == str(run_dir)
