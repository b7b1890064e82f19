"""sampling.tiled_decode reaches the VAE, from evaluate.py too, which draws in the precision of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compose import config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from test_evaluation_measure import TinyFeatures
from torch import Tensor

from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.config import BackboneConfig, SamplingConfig, conf_dir
from lora_dae.evaluation.command import EvaluateRequest, evaluate
from lora_dae.sampling.draw import Drawer
from lora_dae.training.run import write_config


def test_pictures_in_tiles_are_those_of_the_whole_up_to_their_seams(tiny_backbone: Path) -> None:
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    backbone.vae.tile_latent_min_size = 8  # the test's pictures are small: tiles of 64 pixels (see Backbone._tiling)
    drawer = Drawer(backbone, None, "none", "none", 128, SamplingConfig(num_inference_steps=1, guidance_scale=1.0))
    whole = drawer.images(["a red dress"]).astype(int)
    tiled = replace(drawer, cfg=replace(drawer.cfg, tiled_decode=True)).images(["a red dress"]).astype(int)
    assert not np.array_equal(tiled, whole) and np.abs(tiled - whole).mean() < 3
    assert np.abs(tiled - whole)[:, :24, :24].max() <= 1  # inside the first tile, away from the others


def test_an_evaluation_draws_in_as_little_memory_as_it_is_told(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("conditioning=none", "data.resolution=32", "enhancement=none", "evaluation.frozen=false")
    run_dir = tmp_path / "run"
    (run_dir / "adapter").mkdir(parents=True)
    write_config(config(tiny_backbone, run_dir, tmp_path / "cache", *options, "evaluation.controls=false"))
    decoded: list[tuple[int, bool]] = []
    original = Backbone.decode

    def decode(self: Backbone, latents: Tensor, tiled: bool = False) -> Tensor:
        decoded.append((len(latents), tiled))
        return original(self, latents)

    monkeypatch.setattr(Backbone, "decode", decode)
    monkeypatch.setattr("lora_dae.evaluation.run.load_features", lambda name: TinyFeatures())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        asked = compose("evaluate", [f"run={run_dir}", "batch_size=3", "tiled_decode=true"])
    evaluate(EvaluateRequest(**OmegaConf.to_container(asked)), Console(quiet=True))  # type: ignore[arg-type]
    assert decoded == [(3, True), (1, True)]
    assert (run_dir / "evaluations" / "tiled_decode=true" / "metrics.json").is_file()


def test_an_evaluation_draws_in_the_precision_that_the_run_trained_in(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine where bfloat16 is the faster one."""
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    write_config(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "trainer.precision=32-true"))
    told: list[bool] = []
    monkeypatch.setattr("lora_dae.backbone.precision._cpu_gains", lambda: True)
    monkeypatch.setattr("lora_dae.evaluation.command.evaluate_run", lambda *_, **given: told.append(given["bf16"]))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        asked = compose("evaluate", [f"run={tmp_path / 'run'}"])
    evaluate(EvaluateRequest(**OmegaConf.to_container(asked)), Console(quiet=True))  # type: ignore[arg-type]
    assert told == [False]
