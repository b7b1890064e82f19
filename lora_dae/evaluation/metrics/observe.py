"""What is kept of every image: features, band power, one number per metric. Batch by batch, so memory holds no images.

Several processes may share the work: each observes every W-th image, ``gathered`` puts the parts together in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.evaluation.attributes.classifier import AttributeClassifier
from lora_dae.evaluation.metrics import color, edges, reference, texture
from lora_dae.evaluation.metrics.clip_score import ClipScore
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features
from lora_dae.evaluation.metrics.pattern import PatternDistance
from lora_dae.evaluation.metrics.perceptual import MS_SSIM_SIDE, Distance, Lpips, composed, ms_ssim


@dataclass(frozen=True)
class Batch:
    """Images, float NCHW in [0, 1], and what is known of each.

    ``target``: the real photo that image i should reproduce (the paired mode only); ``source``: the photo that it was
    drawn from; ``masks`` (N, H, W) of 0 and 1: the garment in ``images`` and ``target``.
    """

    images: Tensor
    target: Tensor | None = None
    source: Tensor | None = None
    masks: Tensor | None = None
    attributes: Sequence[Mapping[str, str] | None] | None = None
    captions: Sequence[str] | None = None


@dataclass(frozen=True)
class Meters:
    """What measures; the first extractor is the one whose scores are always there."""

    extractors: Sequence[FeatureExtractor]
    classifier: AttributeClassifier | None = None
    perceptual: Mapping[str, Distance] = field(default_factory=dict)
    clip: ClipScore | None = None
    pattern: PatternDistance | None = None


@dataclass(frozen=True)
class Observed:
    """All that the numbers of a set of N images are made of.

    ``features``: by extractor; ``power``: of the garment where masks were given, else of the whole picture; ``values``:
    metric -> (N,), NaN where it does not apply. About 6 kB an image.
    """

    features: dict[str, Features]
    power: texture.BandPower
    on_garment: bool
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.power.area)

    def take(self, index: Tensor) -> Observed:
        """The images at ``index``, in that order."""
        features = {k: Features(f.pooled[index], f.probs[index]) for k, f in self.features.items()}
        power = texture.BandPower(self.power.sums[index], self.power.area[index])
        return Observed(features, power, self.on_garment, {k: v[index] for k, v in self.values.items()})


def observe(batches: Iterable[Batch], meters: Meters) -> Observed:
    """Look at every batch once. Raises ConfigError without images, and for a set whose garment masks are all empty."""
    parts = [_observe(batch, meters) for batch in batches]
    if not parts:
        raise ConfigError("there are no images to measure; check the folder or split.")
    seen = joined(parts)
    if seen.power.area.sum() == 0:
        raise ConfigError("no garment mask holds a pixel, so texture cannot be measured; uint8 masks are 0 and 255.")
    return seen


def joined(parts: Sequence[Observed]) -> Observed:
    """One after the other. A value that only some parts have is NaN in the others."""
    names = list(dict.fromkeys(name for part in parts for name in part.values))
    missing = [torch.full((len(part),), torch.nan) for part in parts]
    return Observed(
        {
            k: Features(*(torch.cat([getattr(p.features[k], x) for p in parts]) for x in ("pooled", "probs")))
            for k in parts[0].features
        },
        texture.BandPower(torch.cat([p.power.sums for p in parts]), torch.cat([p.power.area for p in parts])),
        parts[0].on_garment,
        {n: torch.cat([p.values.get(n, m) for p, m in zip(parts, missing, strict=True)]) for n in names},
    )


def share(count: int) -> range:
    """The images of this process: all of them, or every W-th where W processes work together."""
    if not dist.is_initialized():
        return range(count)
    return range(dist.get_rank(), count, dist.get_world_size())


def gathered(own: Observed) -> Observed:
    """What all processes saw of their ``share``, in the images' order, on every process."""
    if not dist.is_initialized():
        return own
    parts: list[Observed | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    known = [part for part in parts if part is not None]
    total, world = sum(map(len, known)), len(known)
    order = torch.cat([torch.arange(rank, total, world) for rank in range(world)])
    return joined(known).take(order.argsort())


def _observe(batch: Batch, meters: Meters) -> Observed:
    images, target, masks = batch.images, batch.target, batch.masks
    values: dict[str, Tensor] = {}
    if meters.classifier is not None and batch.attributes is not None:
        found = meters.classifier.correct(images, [row or {} for row in batch.attributes])
        values |= {f"attr_{name}": right for name, right in found.items()}
    if target is not None:
        values["psnr"] = reference.psnr(images, target)
        values["ssim"] = reference.ssim(images, target)
        if min(images.shape[-2:]) >= MS_SSIM_SIDE:
            values["ms_ssim"] = ms_ssim(images, target)
        for name, distance in meters.perceptual.items():
            if masks is not None and isinstance(distance, Lpips):  # from the same features
                values[name], values[f"{name}_garment"] = distance.with_inside(images, target, masks)
            else:
                values[name] = distance(images, target)
    if target is not None and masks is not None:
        values["psnr_garment"] = reference.psnr(images, target, masks)
        values["ssim_garment"] = reference.ssim(images, target, masks)
        if min(images.shape[-2:]) >= MS_SSIM_SIDE:
            values["ms_ssim_composed"] = composed(ms_ssim, images, target, masks)
        for name, distance in meters.perceptual.items():
            if not isinstance(distance, Lpips):
                values[f"{name}_composed"] = composed(distance, images, target, masks)
        values["gradient_garment"] = edges.gradient_distance(images, target, masks)
        values["edge_f1_garment"] = edges.edge_f1(images, target, masks)
        values["color_garment"] = color.color_difference(images, target, masks)
        if meters.pattern is not None and batch.source is not None:
            values["pattern_garment"] = meters.pattern(images, target, batch.source, masks)
            expected = meters.pattern.source_color(target, batch.source, masks)
            values["color_to_source_garment"] = color.difference_to(images, expected, masks)
    if meters.clip is not None and batch.captions is not None:
        values["clip_score"] = meters.clip(images, batch.captions)
    return Observed(
        {extractor.name: extractor.extract([images]) for extractor in meters.extractors},
        texture.band_power(images, masks, allow_empty=True),
        masks is not None,
        {name: value.float().cpu() for name, value in values.items()},
    )
