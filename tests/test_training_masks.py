"""Masks that show no garment end a training before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compose import config
from conftest import write_photos
from PIL import Image

from lora_dae.config import ConfigError
from lora_dae.training import run as training


def test_masks_without_a_garment_are_refused_before_weights_are_loaded(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class's dark red without its palette: weighing by it would weigh nothing."""

    def loads(*_: Any) -> None:
        pytest.fail("weights were loaded")

    root = tmp_path / "photos"
    write_photos(root, 8)
    (root / "mask").mkdir()
    for number in range(8):
        mask = np.zeros((30, 40, 3), np.uint8)
        mask[5:20, 10:30] = (128, 0, 0)
        Image.fromarray(mask).save(root / "mask" / f"{number:03d}.png")
    monkeypatch.setattr(training, "load_backbone", loads)
    options = ("data=folder", f"data.root={root}", "enhancement=none", "objective.garment_weight=3")
    with pytest.raises(ConfigError, match=r"garment masks looked at in .* has a pixel of a garment: draw garments"):
        training.train(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    assert not (tmp_path / "run").exists()
