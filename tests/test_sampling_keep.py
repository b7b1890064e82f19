"""Drawing a part of a real photo: against diffusers' inpainting, and what stays where nothing, or all, is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.config import SCHEDULERS, BackboneConfig, SamplingConfig
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.evaluation.references import reconstructed
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.keep import Kept
from lora_dae.sampling.loop import Conditions, Guidance, initial_noise, sample_latents
from lora_dae.sampling.schedulers import build_scheduler

CAPTIONS = ["a red dress", "a blue shirt", "a green skirt"]
PHOTOS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return load_backbone(BackboneConfig(path=str(tiny_backbone)))


@pytest.fixture(scope="module")
def pipe(tiny_backbone: Path) -> StableDiffusionInpaintPipeline:
    """Diffusers inpaints with UNets of 4 channels (or 9): the tiny parts, in that size."""
    torch.manual_seed(0)
    vae = AutoencoderTiny.from_config({**AutoencoderTiny.load_config(tiny_backbone / "vae"), "latent_channels": 4})
    config = UNet2DConditionModel.load_config(tiny_backbone / "unet")
    unet = UNet2DConditionModel.from_config({**config, "in_channels": 4, "out_channels": 4})
    words = CLIPTextModel.from_pretrained(tiny_backbone / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_backbone / "tokenizer")
    base = DDIMScheduler.from_pretrained(tiny_backbone / "scheduler")
    made = StableDiffusionInpaintPipeline(vae, words, tokenizer, unet, base, None, None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", [s for s in SCHEDULERS if s not in ("ddpm", "euler_a")])
def test_equals_inpainting_of_diffusers(name: str, pipe: StableDiffusionInpaintPipeline, backbone: Backbone) -> None:
    photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    masks = torch.zeros(2, 1, 32, 32)
    masks[:, :, 8:24, 4:20] = 1  # whole latents: how each side shrinks a mask is not compared here
    noise = initial_noise(0, [0, 1], (4, 8, 8))
    pipe.scheduler = build_scheduler(name, backbone.scheduler)
    theirs = pipe(
        CAPTIONS[:2], photos, masks, height=32, width=32, strength=1.0, latents=noise.clone(), num_inference_steps=5,
        guidance_scale=3.0, output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        clean = pipe.vae.encode(photos).latents * pipe.vae.config.scaling_factor
    text = backbone.encode_text(["", *CAPTIONS[:2]])
    kept = Kept(clean, masks[:, :, ::4, ::4] > 0)
    scheduler = build_scheduler(name, backbone.scheduler)
    ours = sample_latents(pipe.unet, scheduler, noise, Conditions(text[1:], text[0]), Guidance(3.0), 5, kept=kept)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-3)


def _drawer(backbone: Backbone, scheduler: str = "ddim", method: str = "none") -> Drawer:
    """With a module that changes latents and pixels everywhere."""
    torch.manual_seed(0)
    module = EnhancementModule(2, 8, 0.3, decoder=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    cfg = SamplingConfig(scheduler=scheduler, num_inference_steps=3, batch_size=2, method=method)
    return Drawer(backbone, module.eval(), "prediction", "none", 32, cfg)


def _kept(backbone: Backbone, value: int) -> Kept:
    return Kept.of_photos(backbone, PHOTOS, torch.full((3, 32, 32), value, dtype=torch.uint8))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_without_a_garment_the_photo_comes_back_and_with_nothing_else_all_is_drawn(
    name: str, backbone: Backbone
) -> None:
    drawer = _drawer(backbone, name, "unsharp")
    of_photos = backbone.encode_images(PHOTOS)[0]
    assert torch.equal(drawer.latents(CAPTIONS, None, 1.0, [0, 1, 2], _kept(backbone, 0)), of_photos)
    nothing = drawer.images(CAPTIONS, None, 1.0, keep=_kept(backbone, 0))
    expected = reconstructed(backbone, PHOTOS)
    assert np.abs(nothing.astype(int) - expected).max() <= 1  # decoded in other batches
    free = drawer.latents(CAPTIONS, None, 1.0, [0, 1, 2])
    assert torch.equal(drawer.latents(CAPTIONS, None, 1.0, [0, 1, 2], _kept(backbone, 255)), free)
    everything = drawer.images(CAPTIONS, None, 1.0, keep=_kept(backbone, 255))
    assert np.array_equal(everything, drawer.images(CAPTIONS, None, 1.0))
    assert np.abs(everything.astype(int) - nothing).mean() > 1


def test_a_latent_that_the_grown_mask_touches_is_drawn_and_no_other(backbone: Backbone) -> None:
    masks = torch.zeros(3, 32, 32, dtype=torch.uint8)
    masks[0, 9, 17] = 255  # in latent (2, 4); one pixel more on each side stays in it
    masks[1, 8, 16] = 255  # at that latent's corner: three others are touched
    masks[2, 9, 17] = 100  # dark
    drawn = Kept.of_photos(backbone, PHOTOS, masks).drawn[:, 0].nonzero().tolist()
    assert drawn == [[0, 2, 4], [1, 1, 3], [1, 1, 4], [1, 2, 3], [1, 2, 4]]


@pytest.mark.parametrize("name", ["ddim", "euler_a"])
def test_batches_do_not_change_what_is_drawn_into_a_photo(name: str, backbone: Backbone) -> None:
    masks = torch.zeros(3, 32, 32, dtype=torch.uint8)
    masks[:, 8:24, 8:24] = 255
    drawer, kept = _drawer(backbone, name), Kept.of_photos(backbone, PHOTOS, masks)
    together = drawer.images(CAPTIONS, None, 1.0, keep=kept)
    alone = replace(drawer, cfg=replace(drawer.cfg, batch_size=1)).images(CAPTIONS, None, 1.0, keep=kept)
    assert np.abs(together.astype(int) - alone).max() <= 1
