"""What ships in the package: an ordinary diffusers folder, small, trained; a classifier that can read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from lora_dae.backbone.layout import STUDIO
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.studio.autoencoder import fidelity
from lora_dae.config import BackboneConfig
from lora_dae.data.studio.attributes import draw_look
from lora_dae.data.studio.scene import Photo, photo
from lora_dae.evaluation.attributes.classifier import load_embedded
from lora_dae.evaluation.attributes.recipe import words
from lora_dae.evaluation.metrics.features import stack_images

FIRST = 30_000_000  # indices that no split uses


@pytest.fixture(scope="module")
def shots() -> list[Photo]:
    return [photo(draw_look(5, FIRST + i, "target"), 5, FIRST + i, 128) for i in range(48)]


def test_it_is_small() -> None:
    files = list(STUDIO.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) <= 20e6


def test_plain_diffusers_draws_with_it() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(STUDIO, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompt = "a woman wearing a red dress, white background"
    image = pipe(prompt, num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    assert image.shape == (128, 128, 3)
    corners = image[[2, 2, 60, 60], [2, -3, 2, -3]]
    assert corners.mean() > 0.75  # a white studio, not noise
    assert corners.std() < 0.12
    assert image.std() > 0.05  # and somebody in it


def test_captions_are_words_to_it() -> None:
    tokenizer = load_backbone(BackboneConfig()).tokenizer
    ids = tokenizer("a woman wearing a red herringbone sweater, white background").input_ids
    assert len(ids) == 2 + 10  # start, nine words, comma, end: nothing is spelled out
    assert tokenizer.decode(ids, skip_special_tokens=True).split()[4] == "red"


def test_autoencoder_keeps_photos_that_it_never_saw(shots: list[Photo]) -> None:
    vae = AutoencoderTiny.from_pretrained(STUDIO / "vae", torch_dtype=torch.float32)
    images, masks = np.stack([s.image for s in shots[:16]]), np.stack([s.mask for s in shots[:16]])
    quality = fidelity(vae.eval(), images, masks)
    assert quality["psnr"] > 33
    assert min(v for k, v in quality.items() if k.startswith("power") and k != "power_48_64") > 0.85


def test_classifier_reads_real_photos(shots: list[Photo]) -> None:
    labels = [words(draw_look(5, FIRST + i, "target").words()) for i in range(len(shots))]
    accuracy = load_embedded().accuracy(stack_images([s.image for s in shots]), labels)
    # Chance is 1/6, 1/12 and 1/10.
    assert accuracy["garment"] > 0.8 and accuracy["color"] > 0.8 and accuracy["pattern"] > 0.7
