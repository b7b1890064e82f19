"""Attention of a run's UNet: chosen for the device that it will compute on, and without a trace in its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compose import config

from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.backbone import attention
from lora_dae.backbone.load import load_backbone
from lora_dae.config import SamplingConfig
from lora_dae.sampling import load
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.load import prepare_unet


def test_a_seed_starts_the_same_lora_whether_or_not_attention_was_measured_before(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "backbone.attention=auto", "adapter.rank=2")
    starts = []
    for remembered in (False, True):
        assert (tmp_path / "cache" / "attention.json").is_file() == remembered
        backbone = load_backbone(cfg.backbone)
        torch.manual_seed(0)
        prepare_unet(backbone, cfg)
        inject(backbone.unet, cfg.adapter)
        starts.append(trainable_parameters(backbone.unet))
    first, second = starts
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_attention_is_not_timed_on_the_cpu_for_a_unet_that_moves_to_a_gpu(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "backbone.attention=auto")
    monkeypatch.delattr(attention, "_time")
    assert prepare_unet(load_backbone(cfg.backbone), cfg, torch.device("cuda")) == "sdpa"
    with pytest.raises(NameError):  # what it would take here
        prepare_unet(load_backbone(cfg.backbone), cfg)


def test_a_cpu_draws_with_float16_weights_as_with_bfloat16(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Autocast knows bfloat16 alone there, and norms take no two half precisions at once. It is said once."""
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "backbone.weights=fp16", "data.resolution=32")
    load.say_once.cache_clear()
    drawn = []
    for weights in ("fp16", "fp16", "bf16"):
        backbone = load_backbone(replace(cfg.backbone, weights=weights))
        prepare_unet(backbone, cfg)
        assert {p.dtype for p in backbone.unet.parameters()} == {torch.bfloat16}
        drawer = Drawer(backbone, None, "none", "none", 32, SamplingConfig(num_inference_steps=2))
        drawn.append(drawer.images(["a red dress"]).astype(int))
    assert capsys.readouterr().err.count("bfloat16") == 1
    assert np.abs(drawn[0] - drawn[2]).max() <= 3
