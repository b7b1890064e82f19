"""Attention of a run's UNet: chosen for the device that it will compute on, and without a trace in its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compose import config

from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.backbone import attention
from lora_dae.backbone.load import load_backbone
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
