"""Rows for honesty: what real photos get by the same metrics on the same images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from lora_dae.backbone.load import Backbone
from lora_dae.evaluation.attributes.classifier import AttributeClassifier
from lora_dae.evaluation.controls import blurred, over_sharpened
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.metrics.extras import Extras
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features, as_float_images, stack_images
from lora_dae.evaluation.metrics.measure import Reference, evaluate_images
from lora_dae.evaluation.metrics.pattern import PatternDistance
from lora_dae.evaluation.report.table import MetricValue

FLOOR = "real training photos"  # the floor of distances
CEILING = "real, through the VAE"  # the ceiling of a latent model
PIXELS = 2**23  # through the VAE at once
CONTROLS = {"real, blurred": blurred, "real, over-sharpened": over_sharpened}


def reference_rows(
    held_out: HeldOut,
    real: Reference,
    training: HeldOut | None,
    backbone: Backbone | None,
    extractor: FeatureExtractor,
    extras: Extras,
    classifier: AttributeClassifier | None,
    bootstrap: int,
    seed: int,
    pattern: PatternDistance | None = None,
    from_photos: bool = False,
) -> dict[str, dict[str, MetricValue]]:
    """Real training photos against the real held-out ones, and the held-out ones through the VAE, blurred, sharpened.

    A distance cannot be expected to fall below the first row's, nor texture to be better than the second's; a metric of
    texture that ranks the last two well says nothing. ``training``: as many training pairs, all of one size with
    the held-out ones, or None; ``backbone``: None leaves the VAE's row out. ``from_photos``: the methods
    were given the photos, and are measured on their garments whether they saw sources or not.
    """
    on_garment = held_out.masks is not None and (from_photos or held_out.sources is not None)
    if not on_garment:  # as the methods are measured: on the whole picture
        real = replace(real, masks=None, garment_power=None)
    originals = np.stack([p.image for p in held_out.pairs])
    common = {"bootstrap": bootstrap, "seed": seed, "clip": extras.clip, "more": extras.more, "classifier": classifier}
    rows = {}
    if training is not None and (training.masks is not None or not on_garment):
        rows[FLOOR] = evaluate_images(
            stack_images([p.image for p in training.pairs]),
            real,
            extractor,
            masks=training.masks if on_garment else None,
            attributes=training.attributes,
            captions=training.captions,
            **common,
        )
    images = {}
    if backbone is not None:
        images[CEILING] = reconstructed(backbone, originals)
    images |= {name: np.stack([make(image) for image in originals]) for name, make in CONTROLS.items()}
    sources = held_out.sources
    for name, made in images.items():
        rows[name] = evaluate_images(
            stack_images(list(made)),
            real,
            extractor,
            paired=True,
            attributes=held_out.attributes,
            captions=held_out.captions,
            perceptual=extras.perceptual,
            sources=None if sources is None else stack_images(list(sources)),
            pattern=pattern,
            **common,
        )
    return rows


def reconstructed_features(backbone: Backbone, held_out: HeldOut, extractor: FeatureExtractor) -> Features:
    """Of the held-out photos as the VAE gives them back: the nearest to them that a latent model can come."""
    images = reconstructed(backbone, np.stack([pair.image for pair in held_out.pairs]))
    return extractor.extract([as_float_images(stack_images(list(images)))])


def reconstructed(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    """Photos, uint8 (N, H, W, 3), encoded to the mean of the VAE's posterior and decoded."""
    size = max(1, PIXELS // (images.shape[1] * images.shape[2]))
    found = []
    with torch.no_grad():
        for k in range(0, len(images), size):
            pixels = backbone.decode(backbone.encode_images(images[k : k + size])[0]).permute(0, 2, 3, 1)
            found.append((pixels * 255).round().to(torch.uint8).cpu().numpy())
    return np.concatenate(found)
