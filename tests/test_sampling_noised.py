"""Real photos noised and drawn again: against diffusers' image-to-image, and what comes back where no step runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from lora_dae.backbone.layout import STUDIO
from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.config import SCHEDULERS, BackboneConfig, SamplingConfig
from lora_dae.evaluation.references import reconstructed
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.loop import noise_generator
from lora_dae.sampling.noised import Noised
from lora_dae.sampling.schedulers import build_scheduler

CAPTIONS = ["a red dress", "a blue shirt", "a green skirt"]
PHOTOS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
ODE = [s for s in SCHEDULERS if s not in ("ddpm", "euler_a", "lms")]  # lms: refused, see photo_mode


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return load_backbone(BackboneConfig(path=str(tiny_backbone)))


def _theirs(folder: Path, scheduler: str, strength: float, steps: int, guidance: float) -> torch.Tensor:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = build_scheduler(scheduler, pipe.scheduler)
    photos = torch.from_numpy(PHOTOS[:2]).permute(0, 3, 1, 2).float() / 255
    return pipe(
        CAPTIONS[:2], photos, strength=strength, num_inference_steps=steps, guidance_scale=guidance,
        generator=[noise_generator(0, 0), noise_generator(0, 1)], output_type="latent",
    ).images  # fmt: skip


def _ours(backbone: Backbone, scheduler: str, strength: float, steps: int, guidance: float) -> torch.Tensor:
    cfg = SamplingConfig(scheduler=scheduler, num_inference_steps=steps, guidance_scale=guidance, seed=0)
    start = Noised(backbone.encode_images(PHOTOS[:2])[0], strength)
    return Drawer(backbone, None, "none", "none", 32, cfg).latents(CAPTIONS[:2], None, 0.0, [0, 1], start=start)


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_equals_image_to_image_of_diffusers(
    name: str, strength: float, tiny_backbone: Path, backbone: Backbone
) -> None:
    theirs = _theirs(tiny_backbone, name, strength, 8, 3.0)
    torch.testing.assert_close(_ours(backbone, name, strength, 8, 3.0), theirs, atol=1e-4, rtol=1e-4)


def test_the_studio_model_draws_a_photo_again_as_diffusers_does() -> None:
    theirs = _theirs(STUDIO, "dpm++", 0.4, 10, 2.0)
    ours = _ours(load_backbone(BackboneConfig()), "dpm++", 0.4, 10, 2.0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_where_no_step_runs_the_photo_comes_back_as_the_vae_gives_it(name: str, backbone: Backbone) -> None:
    cfg = SamplingConfig(scheduler=name, num_inference_steps=4, batch_size=3)
    drawer = Drawer(backbone, None, "none", "none", 32, cfg)
    clean = backbone.encode_images(PHOTOS)[0]
    nothing = drawer.images(CAPTIONS, start=Noised(clean, 0.24))
    assert np.array_equal(nothing, reconstructed(backbone, PHOTOS))
    assert not np.array_equal(drawer.images(CAPTIONS, start=Noised(clean, 0.25)), nothing)


@pytest.mark.parametrize("name", ["ddim", "euler_a"])
def test_batches_do_not_change_a_photo_that_is_drawn_again(name: str, backbone: Backbone) -> None:
    cfg = SamplingConfig(scheduler=name, num_inference_steps=4, batch_size=2)
    drawer = Drawer(backbone, None, "none", "none", 32, cfg)
    start = Noised(backbone.encode_images(PHOTOS)[0], 0.5)
    alone = replace(drawer, cfg=replace(cfg, batch_size=1)).images(CAPTIONS, start=start)
    assert np.abs(drawer.images(CAPTIONS, start=start).astype(int) - alone).max() <= 1
