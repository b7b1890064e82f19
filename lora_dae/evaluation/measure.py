"""Every number that applies to a set of generated images, in one call.

The real side is prepared once (``build_reference``) and shared by all methods of a table. Bootstrap samples
depend on the number of images and the seed only, so methods measured on the same prompts can be compared
pairwise (``table.paired_difference``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.evaluation import color, distances, edges, reference, texture
from lora_dae.evaluation.attributes import AttributeClassifier
from lora_dae.evaluation.bootstrap import (
    bootstrap_interval,
    bootstrap_weights,
    weighted_means,
    wilson_interval,
)
from lora_dae.evaluation.clip_score import ClipScore
from lora_dae.evaluation.features import FeatureExtractor, Features, as_float_images
from lora_dae.evaluation.perceptual import MS_SSIM_SIDE, Distance, ms_ssim
from lora_dae.evaluation.table import Better, MetricValue


@dataclass(frozen=True)
class Reference:
    """The real images and what is known of them. ``masks`` (N, H, W) of 0 and 1: the garment, or None."""

    images: Tensor
    masks: Tensor | None
    features: Features
    power: texture.BandPower
    garment_power: texture.BandPower | None

    def __len__(self) -> int:
        return len(self.images)


def build_reference(real: Tensor, masks: Tensor | None, extractor: FeatureExtractor) -> Reference:
    """Prepare the real side: ``real`` uint8 or float [0, 1] NCHW, ``masks`` (N, H, W) uint8 0/255 or bool."""
    images = as_float_images(real)
    inside = None if masks is None else _binary(masks, images)
    return Reference(
        images=images,
        masks=inside,
        features=extractor.extract([images]),
        power=texture.band_power(images),
        garment_power=None if inside is None else texture.band_power(images, inside),
    )


def evaluate_images(
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
    perceptual: Mapping[str, Distance] | None = None,
    clip: ClipScore | None = None,
    captions: Sequence[str] | None = None,
) -> dict[str, MetricValue]:
    """Measure generated images (uint8 or float [0, 1] NCHW) against real ones.

    Always: fd, kd, is under the extractor's names, ``power_low|mid|high`` and ``lsd``. With ``attributes``
    (what the captions say, per image) and a ``classifier``: ``attr_<name>``. With ``paired`` (image i was
    made from the source of real image i): ``psnr``, ``ssim``, from 161 pixels on ``ms_ssim``, and every distance of
    ``perceptual`` (by its name). With ``clip`` and ``captions``: ``clip_score``. With ``masks`` (the garment in the
    generated images; paired: the reference's by default): texture inside the garment, as ``power_low_garment`` and so
    on, and paired ``psnr_garment``, ``ssim_garment``, ``gradient_garment``, ``edge_f1_garment``, ``color_garment``.
    ``bootstrap=0`` leaves intervals out. Raises ConfigError when numbers of images or sizes do not fit.
    """
    images = as_float_images(generated)
    _check(images, real, attributes, paired)
    inside = real.masks if masks is None and paired else None if masks is None else _binary(masks, images)
    n, m = len(images), len(real)
    weights = bootstrap_weights(n, bootstrap, seed)
    # Paired: image i and real image i are drawn together. Else the two sets are drawn on their own.
    real_weights = weights if paired else bootstrap_weights(m, bootstrap, seed + 1)

    features = extractor.extract([images])
    result = _distances(features, real.features, extractor.names, (weights, real_weights), seed, paired)
    if classifier is not None and attributes is not None:
        for name, right in classifier.correct(images, [row or {} for row in attributes]).items():
            result[f"attr_{name}"] = _share(right, weights)
    result.update(_texture(images, inside, real, weights, real_weights))
    if paired:
        result["psnr"] = _mean(reference.psnr(images, real.images), weights)
        result["ssim"] = _mean(reference.ssim(images, real.images), weights)
        if min(images.shape[-2:]) >= MS_SSIM_SIDE:
            result["ms_ssim"] = _mean(ms_ssim(images, real.images), weights)
        for name, distance in (perceptual or {}).items():
            result[name] = _mean(distance(images, real.images), weights, "lower")
        if inside is not None:
            result["psnr_garment"] = _mean(reference.psnr(images, real.images, inside), weights)
            result["ssim_garment"] = _mean(reference.ssim(images, real.images, inside), weights)
            gradients = edges.gradient_distance(images, real.images, inside)
            result["gradient_garment"] = _mean(gradients, weights, "lower")
            result["edge_f1_garment"] = _mean(edges.edge_f1(images, real.images, inside), weights)
            result["color_garment"] = _mean(color.color_difference(images, real.images, inside), weights, "lower")
    if clip is not None and captions is not None:
        result["clip_score"] = _mean(clip(images, captions), weights)
    return result


def _distances(
    fake: Features,
    real: Features,
    names: Mapping[str, str],
    weights: tuple[Tensor, Tensor],
    seed: int,
    paired: bool,
) -> dict[str, MetricValue]:
    inner = distances.gram(fake.pooled, real.pooled)
    splits = distances.inception_splits(len(fake.probs))
    fd = distances.frechet_from_features(fake.pooled, real.pooled)
    kd = distances.kernel_distance(fake.pooled, real.pooled, paired)
    score = distances.inception_score(fake.probs, splits, seed)
    if len(weights[0]) == 0:
        fd_r = kd_r = score_r = torch.empty(0)
    else:
        fd_r = distances.frechet_replicates(inner, *weights)
        kd_r = distances.kernel_replicates(inner, *weights, paired)
        score_r = distances.inception_score_replicates(fake.probs, weights[0], splits, seed)
    return {
        names["fd"]: _metric(fd, fd_r, "lower", least=0),
        names["kd"]: _metric(kd, kd_r, "lower"),
        names["is"]: _metric(score, score_r, "higher", least=1),
    }


def _texture(
    images: Tensor, inside: Tensor | None, real: Reference, weights: Tensor, real_weights: Tensor
) -> dict[str, MetricValue]:
    real_power = real.power if inside is None else real.garment_power
    if real_power is None:
        raise ConfigError("garment masks are given for generated images but not for real ones; give both or none.")
    suffix = "" if inside is None else "_garment"
    power = texture.band_power(images, inside)
    spectra = power.spectrum(weights), real_power.spectrum(real_weights)
    replicates = texture.group_ratios(*spectra)
    result = {
        f"power_{name}{suffix}": _metric(ratio, replicates[name], None, least=0)
        for name, ratio in texture.band_power_ratio(power, real_power).items()
    }
    distances_r = texture.log_spectral_distance(*spectra)
    result[f"lsd{suffix}"] = _metric(texture.lsd(power, real_power), distances_r, "lower", least=0)
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


def _binary(masks: Tensor, images: Tensor) -> Tensor:
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
