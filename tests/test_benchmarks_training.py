"""benchmarks.train_speed: both sides train the same thing, and what is counted is what is said."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_photos
from diffusers import UNet2DConditionModel
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from benchmarks import example, stamped, train_speed
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.config import conf_dir, from_dict, register
from lora_dae.rules import check


def asked(backbone: Path, work: Path) -> argparse.Namespace:
    return argparse.Namespace(backbone=backbone, work=work, resolution=32, batch=4, steps=3)


def test_the_example_trains_on_the_layers_of_our_run(tiny_backbone: Path, tmp_path: Path) -> None:
    write_photos(tmp_path, 8)
    (tmp_path / "metadata.jsonl").rename(tmp_path / "images" / "metadata.jsonl")
    args = (tiny_backbone, tmp_path / "images", tmp_path / "datasets", 32, 4, 3)
    times, unet = example.train(*args, "no", 16)
    assert len(times) == 3 and times == sorted(times)
    theirs = {name: parameter for name, parameter in unet.named_parameters() if "lora_" in name}
    assert all(p.requires_grad for p in theirs.values())
    assert all(p.abs().sum() > 0 for name, p in theirs.items() if "lora_B" in name)  # which began at zero
    register()
    words = [w for w in train_speed.overrides(asked(tiny_backbone, tmp_path), "fp32", "disk") if "hydra" not in w]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = OmegaConf.to_container(compose("train", [*words, "run_dir=x"]))
    cfg = from_dict({k: v for k, v in composed.items() if k != "hydra"})  # type: ignore[union-attr]
    check(cfg)
    assert (cfg.data.cache, cfg.trainer["precision"], cfg.enhancement.enabled) == ("disk", "32-true", False)
    ours = UNet2DConditionModel.from_pretrained(tiny_backbone / "unet")
    inject(ours, cfg.adapter)
    assert {n: p.shape for n, p in trainable_parameters(ours).items()} == {n: p.shape for n, p in theirs.items()}


def test_transforms_are_those_that_torchvision_documents() -> None:
    """Shorter side to the resolution, the middle of the longer one, [0, 255] to [-1, 1], channels first."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = [255, 0, 51]
    found = example.transform(Image.fromarray(pixels), 20)
    expected = torch.tensor([1.0, -1.0, 51 / 127.5 - 1])[:, None, None].expand(3, 20, 20)
    torch.testing.assert_close(found, expected)


def test_the_rate_leaves_out_the_start() -> None:
    times = [100.0, 101.0, 101.5, 102.0, 102.5]
    assert train_speed.rate(times, 2, 16) == pytest.approx(32)


def test_stamps_end_the_process_with_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    stamps = stamped.Stamps(2, tmp_path / "stamps.json")
    stamps.on_train_batch_end(None, None, None, None, 0)
    assert not ended
    stamps.on_train_batch_end(None, None, None, None, 1)
    assert ended == [0] and json.loads((tmp_path / "stamps.json").read_text()) == stamps.times
