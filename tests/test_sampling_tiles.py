"""sampling.tiled_decode reaches the VAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig, SamplingConfig
from lora_dae.sampling.draw import Drawer


def test_pictures_in_tiles_are_those_of_the_whole_up_to_their_seams(tiny_backbone: Path) -> None:
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    backbone.vae.tile_latent_min_size = 8  # the test's pictures are small: tiles of 64 pixels (see Backbone._tiling)
    drawer = Drawer(backbone, None, "none", "none", 128, SamplingConfig(num_inference_steps=1, guidance_scale=1.0))
    whole = drawer.images(["a red dress"]).astype(int)
    tiled = replace(drawer, cfg=replace(drawer.cfg, tiled_decode=True)).images(["a red dress"]).astype(int)
    assert not np.array_equal(tiled, whole) and np.abs(tiled - whole).mean() < 3
    assert np.abs(tiled - whole)[:, :24, :24].max() <= 1  # inside the first tile, away from the others
