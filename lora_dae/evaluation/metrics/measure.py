"""Every number that applies to a set of generated images, in one call.

The real side is prepared once (``build_reference``) and shared by all methods of a table. Resampled sets depend on the
number of images and the seed only, so methods measured on the same prompts can be compared pairwise
(``table.paired_difference``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.evaluation.attributes.classifier import AttributeClassifier
from lora_dae.evaluation.metrics import distances, grouped, texture
from lora_dae.evaluation.metrics.clip_score import ClipScore
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features, as_float_images
from lora_dae.evaluation.metrics.observe import Batch, Meters, Observed, observe
from lora_dae.evaluation.metrics.pattern import PatternDistance
from lora_dae.evaluation.metrics.perceptual import Distance
from lora_dae.evaluation.report.table import Better, MetricValue
from lora_dae.evaluation.statistics.bootstrap import (
    bootstrap_interval,
    bootstrap_weights,
    weighted_means,
    wilson_interval,
)

LOWER = ("lpips", "dists", "gradient", "color", "pattern")  # of these metrics less is better
BATCH = 32


@dataclass(frozen=True)
class Reference:
    """The real images and what is known of them. ``masks`` (N, H, W) of 0 and 1: the garment, or None."""

    images: Tensor
    masks: Tensor | None
    features: dict[str, Features]
    power: texture.BandPower
    garment_power: texture.BandPower | None

    def __len__(self) -> int:
        return len(self.images)

    def observed(self, on_garment: bool) -> Observed:
        """The real side of ``summarize``. Raises ConfigError where garments are asked for and masks were not given."""
        if on_garment and self.garment_power is None:
            raise ConfigError("garment masks are given for generated images but not for real ones; give both or none.")
        power = self.garment_power if on_garment and self.garment_power is not None else self.power
        return Observed(self.features, power, on_garment, {})


def build_reference(real: Tensor, masks: Tensor | None, *extractors: FeatureExtractor) -> Reference:
    """Prepare the real side: ``real`` uint8 or float [0, 1] NCHW, ``masks`` (N, H, W) uint8 0/255 or bool."""
    images = as_float_images(real)
    inside = None if masks is None else binary(masks, images)
    return Reference(
        images=images,
        masks=inside,
        features={extractor.name: extractor.extract([images]) for extractor in extractors},
        power=texture.band_power(images),
        garment_power=None if inside is None else texture.band_power(images, inside),
    )


def measure_images(
    generated: Tensor,
    real: Reference,
    extractor: FeatureExtractor,
    *,
    masks: Tensor | None = None,
    attributes: Sequence[Mapping[str, str] | None] | None = None,
    classifier: AttributeClassifier | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    paired: bool = False,
    together: bool = False,
    perceptual: Mapping[str, Distance] | None = None,
    clip: ClipScore | None = None,
    captions: Sequence[str] | None = None,
    sources: Tensor | None = None,
    pattern: PatternDistance | None = None,
    more: Sequence[FeatureExtractor] = (),
) -> tuple[dict[str, MetricValue], Observed]:
    """Measure generated images (uint8 or float [0, 1] NCHW) against real ones.

    Always: fd, kd, is under the extractor's names, ``power_low|mid|high`` and ``lsd``; the distances of ``more``. With
    ``attributes`` (what the captions say, per image) and a ``classifier``: ``attr_<name>``. With ``paired`` (image i
    was made from the source of real image i): ``psnr``, ``ssim``, from 176 pixels on ``ms_ssim``, and every distance of
    ``perceptual`` (by its name). With ``clip`` and ``captions``: ``clip_score``. With ``masks`` (the garment in the
    generated images; paired: the reference's by default): texture inside the garment, as ``power_low_garment`` and so
    on, and paired ``psnr_garment``, ``ssim_garment``, ``gradient_garment``, ``edge_f1_garment``, ``color_garment``,
    ``lpips_alex_garment`` (its map), ``ms_ssim_composed`` and ``dists_composed`` (pasted into the real photo); with
    ``pattern`` and ``sources`` (uint8 NCHW) also ``pattern_garment`` and ``color_to_source_garment``.
    ``together``: not paired, but drawn from the real images' captions, and resampled with them, as paired ones are.
    ``bootstrap=0`` leaves intervals out. The numbers, and what they were made of. Raises ConfigError when numbers of
    images or sizes do not fit.
    """
    images = as_float_images(generated)
    _check(images, real, attributes, paired or together)
    inside = real.masks if masks is None and paired else None if masks is None else binary(masks, images)
    given = None if sources is None else as_float_images(sources)
    everything = Batch(images, real.images if paired else None, given, inside, attributes, captions)
    meters = Meters((extractor, *more), classifier, perceptual or {}, clip, pattern)
    observed = observe(pieces(everything), meters)
    on_garment = inside is not None
    as_pairs = paired or together
    return summarize(observed, real.observed(on_garment), meters.extractors, bootstrap, seed, as_pairs), observed


def evaluate_images(
    generated: Tensor, real: Reference, extractor: FeatureExtractor, **options: Any
) -> dict[str, MetricValue]:
    """The numbers of ``measure_images`` alone."""
    return measure_images(generated, real, extractor, **options)[0]


def pieces(batch: Batch, size: int = BATCH) -> Iterator[Batch]:
    """A large batch cut into pieces of ``size``."""
    parts = (batch.images, batch.target, batch.source, batch.masks, batch.attributes, batch.captions)
    for start in range(0, len(batch.images), size):
        yield Batch(*(None if x is None else x[start : start + size] for x in parts))  # type: ignore[arg-type]


def summarize(
    observed: Observed,
    real: Observed,
    extractors: Sequence[FeatureExtractor],
    bootstrap: int,
    seed: int,
    paired: bool,
) -> dict[str, MetricValue]:
    """The numbers of observed images against real ones, with intervals over images.

    ``paired``: image i and real image i are drawn together; else the two sets are drawn on their own.
    """
    weights = bootstrap_weights(len(observed), bootstrap, seed)
    real_weights = weights if paired else bootstrap_weights(len(real), bootstrap, seed + 1)
    result: dict[str, MetricValue] = {}
    for extractor in extractors:
        fake, true = observed.features[extractor.name], real.features[extractor.name]
        result |= _distances(fake, true, extractor.names, (weights, real_weights), seed, paired)
    values = observed.values
    result |= {name: _share(value, weights) for name, value in values.items() if name.startswith("attr_")}
    result |= _texture(observed, real, weights, real_weights)
    for name, value in values.items():
        if not name.startswith("attr_"):
            result[name] = _mean(value, weights, "lower" if name.split("_")[0] in LOWER else "higher")
    return result


def distances_to(
    other: Features, suffix: str, observed: Observed, extractor: FeatureExtractor, bootstrap: int, seed: int
) -> dict[str, MetricValue]:
    """fd and kd between observed images and ``other`` images, one for each, named with ``suffix``."""
    weights = bootstrap_weights(len(observed), bootstrap, seed)
    names = {kind: name + suffix for kind, name in extractor.names.items() if kind in ("fd", "kd")}
    return _distances(observed.features[extractor.name], other, names, (weights, weights), seed, paired=True)


def _distances(
    fake: Features,
    real: Features,
    names: Mapping[str, str],
    weights: tuple[Tensor, Tensor],
    seed: int,
    paired: bool,
) -> dict[str, MetricValue]:
    x, y = fake.pooled, real.pooled
    result: dict[str, MetricValue] = {}
    if grouped.is_large(len(x), len(y)):
        result |= _large(x, y, names, len(weights[0]) > 0, seed, paired)
    else:
        inner = distances.gram(x, y)
        drawn = len(weights[0]) > 0
        none = torch.empty(0)
        if "fd" in names:
            replicates = distances.frechet_replicates(inner, *weights) if drawn else none
            result[names["fd"]] = _metric(distances.frechet_from_features(x, y), replicates, "lower", least=0)
        if "kd" in names:
            replicates = distances.kernel_replicates(inner, *weights, paired) if drawn else none
            result[names["kd"]] = _metric(distances.kernel_distance(x, y, paired), replicates, "lower")
        if "mmd" in names:
            replicates = distances.cmmd_replicates(inner, *weights) if drawn else none
            result[names["mmd"]] = _metric(distances.cmmd_distance(x, y), replicates, "lower", least=0)
    if "is" in names:
        splits = distances.inception_splits(len(fake.probs))
        score = distances.inception_score(fake.probs, splits, seed)
        replicates = distances.inception_score_replicates(fake.probs, weights[0], splits, seed)
        std = distances.inception_score_std(fake.probs, splits, seed) if splits > 1 else None
        result[names["is"]] = replace(_metric(score, replicates, "higher", least=1), std=std)
    return result


def _large(
    x: Tensor, y: Tensor, names: Mapping[str, str], intervals: bool, seed: int, paired: bool
) -> dict[str, MetricValue]:
    """The same for large sets: intervals by leaving out one of 20 groups."""
    groups_x = grouped.groups_of(len(x), seed)
    groups_y = groups_x if paired else grouped.groups_of(len(y), seed + 1)
    result: dict[str, MetricValue] = {}
    if "fd" in names:
        value = distances.frechet_from_features(x, y)
        left_out = grouped.grouped_frechet(x, y, groups_x, groups_y) if intervals else torch.empty(0)
        result[names["fd"]] = _grouped(value, left_out, least=0)
    if "kd" in names:
        kernel = distances.polynomial_kernel
        value, left_out = grouped.grouped_mmd(x, y, groups_x, groups_y, kernel, skip_same=True, paired=paired)
        result[names["kd"]] = _grouped(value, left_out if intervals else torch.empty(0))
    if "mmd" in names:
        value, left_out = grouped.grouped_mmd(x, y, groups_x, groups_y, distances.gaussian_kernel, skip_same=False)
        left_out = distances.CMMD_SCALE * left_out if intervals else torch.empty(0)
        result[names["mmd"]] = _grouped(distances.CMMD_SCALE * value, left_out, least=0)
    return result


def _grouped(value: float, left_out: Tensor, least: float = -math.inf) -> MetricValue:
    replicates = grouped.as_replicates(value, left_out) if len(left_out) else left_out
    return _metric(value, replicates, "lower", least)


def _texture(observed: Observed, real: Observed, weights: Tensor, real_weights: Tensor) -> dict[str, MetricValue]:
    suffix = "_garment" if observed.on_garment else ""
    spectra = observed.power.spectrum(weights), real.power.spectrum(real_weights)
    replicates = texture.group_ratios(*spectra)
    result = {
        f"power_{name}{suffix}": _metric(ratio, replicates[name], None, least=0)
        for name, ratio in texture.band_power_ratio(observed.power, real.power).items()
    }
    distances_r = texture.log_spectral_distance(*spectra)
    result[f"lsd{suffix}"] = _metric(texture.lsd(observed.power, real.power), distances_r, "lower", least=0)
    return result


def _metric(value: float, replicates: Tensor, better: Better | None, least: float = -math.inf) -> MetricValue:
    """``least``: the smallest value that the metric can have; the interval stops there."""
    if len(replicates) == 0:
        return MetricValue(value, None, None, better)
    low, high = bootstrap_interval(value, replicates)
    return MetricValue(value, max(low, least), high, better, replicates)


def _mean(values: Tensor, weights: Tensor, better: Better = "higher") -> MetricValue:
    """Mean over images; NaN (an empty mask) does not count."""
    replicates = weighted_means(values, weights)
    return _metric(values.nanmean().item(), replicates, better)


def _share(right: Tensor, weights: Tensor) -> MetricValue:
    """Share of 1 among 0 and 1 with Wilson's interval: a bootstrap of 256 of 256 would claim certainty."""
    low, high = wilson_interval(right.nansum().item(), int(right.isfinite().sum()))
    replicates = weighted_means(right, weights) if len(weights) else None
    return MetricValue(right.nanmean().item(), low, high, "higher", replicates)


def binary(masks: Tensor, images: Tensor) -> Tensor:
    """Garment masks, uint8 0/255 or bool, as (N, H, W) float of 0 and 1. Raises ConfigError for another shape."""
    if masks.shape != (len(images), *images.shape[2:]):
        raise ConfigError(f"masks must be {(len(images), *images.shape[2:])}, got {tuple(masks.shape)}; resize them.")
    return ((masks > 127) if masks.dtype == torch.uint8 else (masks > 0.5)).float()


def _check(images: Tensor, real: Reference, attributes: Sequence[object] | None, paired: bool) -> None:
    if images.shape[1:] != real.images.shape[1:]:
        raise ConfigError(
            f"generated images are {tuple(images.shape[1:])}, real ones {tuple(real.images.shape[1:])}; "
            "measure both at one resolution."
        )
    if paired and len(images) != len(real):
        raise ConfigError(f"paired metrics need one real image each, got {len(images)} and {len(real)}.")
    if attributes is not None and len(attributes) != len(images):
        raise ConfigError(f"{len(images)} images need as many attribute rows, got {len(attributes)}.")
