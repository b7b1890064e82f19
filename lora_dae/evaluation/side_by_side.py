"""Several methods on the same held-out pairs, measured alike: a run's rows, or runs beside each other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_dae.evaluation.attributes.classifier import AttributeClassifier
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.metrics.extras import Extras
from lora_dae.evaluation.metrics.features import FeatureExtractor, stack_images
from lora_dae.evaluation.metrics.measure import Reference, measure_images
from lora_dae.evaluation.metrics.observe import Observed
from lora_dae.evaluation.metrics.pattern import PatternDistance
from lora_dae.evaluation.report.plots import plot_band_power
from lora_dae.evaluation.report.table import MetricValue


def measure_methods(
    pictures: Mapping[str, Sequence[np.ndarray] | np.ndarray],
    held_out: HeldOut,
    real: Reference,
    extractor: FeatureExtractor,
    extras: Extras,
    *,
    from_source: Collection[str],
    given: bool,
    classifier: AttributeClassifier | None,
    pattern: PatternDistance | None,
    bootstrap: int,
    seed: int,
) -> tuple[dict[str, dict[str, MetricValue]], dict[str, Observed]]:
    """The numbers of every method and what was seen of its pictures, uint8 (H, W, 3), one for each held-out pair.

    ``from_source``: the methods that saw the source photos; they alone are measured against the photo of the same pair,
    and the others keep what they have in common with them. ``given``: all were given the real photos themselves.
    """
    sources = None if held_out.sources is None else stack_images(list(held_out.sources))
    methods: dict[str, dict[str, MetricValue]] = {}
    seen: dict[str, Observed] = {}
    for name, images in pictures.items():
        methods[name], seen[name] = measure_images(
            stack_images(list(images)),
            real,
            extractor,
            attributes=held_out.attributes,
            classifier=classifier,
            bootstrap=bootstrap,
            seed=seed,
            paired=given or (sources is not None and name in from_source),
            together=sources is not None,  # who saw no source, too: one test of the same pairs for all methods
            perceptual=extras.perceptual,
            clip=extras.clip,
            captions=held_out.captions,
            sources=sources,
            pattern=pattern,
            more=extras.more,
        )
    comparable = next((set(methods[name]) for name in methods if name in from_source), None)
    if sources is not None and not given and comparable is not None:
        for name in methods:
            methods[name] = {k: v for k, v in methods[name].items() if k in comparable}
    return methods, seen


def plot_texture(seen: Mapping[str, Observed], real: Reference, folder: Path) -> Path:
    """The texture's spectra of the methods whose texture is in the table: of garments, where any was measured there."""
    on_garment = any(observed.on_garment for observed in seen.values())
    spectra = {n: observed.power.spectrum() for n, observed in seen.items() if observed.on_garment == on_garment}
    return plot_band_power(spectra, real.observed(on_garment).power.spectrum(), folder / "band_power.svg")
