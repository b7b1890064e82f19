"""Local pattern fidelity: does each patch of the generated garment look like the patch of the source that it shows?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_dae.evaluation.metrics.color import srgb_to_lab
from lora_dae.evaluation.metrics.texture import shrink

SIDE = 224  # pixels that the network sees
CELLS = 28  # patches a side, 8 pixels each
WINDOW = 2  # cells a side that a patch's statistics look at: a shift by a thread must not count
TAPS = (0, 2, 4)  # EfficientNet-lite0's blocks that end at strides 2, 4 and 8
NEAR = 1  # cells around the matched place
BATCH = 16
REMEMBERED = 64  # batches: about 8 MB each

Taps = Callable[[Tensor], list[Tensor]]  # float NCHW in [0, 1] of SIDE pixels -> feature maps (N, C, h, w)


class PatternDistance:
    """Distance between patches of the generated garment and the source's, at matched places; (N,), lower is better.

    A patch is described by mean and standard deviation of each early feature in its window, made one unit vector per
    tap (as LPIPS does with features, as DISTS does with statistics); the distance of two patches is the mean over taps
    of half the squared difference, in [0, 2]. Where a patch lies in the source is found with the real photo: its patch
    is matched with the most alike patch of the source, and the generated patch at the same place is compared with the
    best of the 3 x 3 around that match. The real photo's own value is not zero: it is what a perfect picture gets.
    Rewards copying the source's light; does not see errors larger than a patch.
    """

    def __init__(self, taps: Taps) -> None:
        self.taps = taps
        self._known: dict[bytes, list[Tensor]] = {}  # every row of a table is compared with the same photos

    @torch.inference_mode()
    def __call__(self, images: Tensor, target: Tensor, source: Tensor, masks: Tensor) -> Tensor:
        """Float NCHW in [0, 1] of one size, ``masks`` (N, H, W) of 0 and 1 on ``target`` -> (N,); NaN: empty mask."""
        values = []
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            made = self._describe(images[part])
            real, given = (self._remembered(x[part]) for x in (target, source))
            values.append(_distance(made, real, given, _cells(masks[part])))
        return torch.cat(values)

    @torch.inference_mode()
    def source_color(self, target: Tensor, source: Tensor, masks: Tensor) -> Tensor:
        """Mean L*a*b* color of the source where the patches of the garment in ``target`` are found in it, (N, 3).

        For sources without a mask of their own. Shapes as in ``__call__``; NaN for an empty mask.
        """
        means = []
        for start in range(0, len(target), BATCH):
            part = slice(start, start + BATCH)
            matched = _matched(self._remembered(target[part]), self._remembered(source[part]))
            lab = srgb_to_lab(source[part].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            colors = F.adaptive_avg_pool2d(lab, CELLS).flatten(2).transpose(1, 2)
            found = colors.gather(1, matched.to(colors.device)[..., None].expand(-1, -1, 3))
            inside = _cells(masks[part]).to(colors.device)[..., None]
            means.append((found * inside).sum(1) / inside.sum(1))  # 0 / 0 = NaN
        return torch.cat(means)

    def _remembered(self, images: Tensor) -> list[Tensor]:
        key = hashlib.blake2b(images.cpu().contiguous().numpy().tobytes()).digest()
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = self._describe(images)
        return self._known[key]

    def _describe(self, images: Tensor) -> list[Tensor]:
        """Per tap, unit vectors (N, CELLS^2, 2 C)."""
        pixels = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        return [F.normalize(_statistics(maps.float().cpu()), dim=2) for maps in self.taps(pixels)]


def _statistics(maps: Tensor) -> Tensor:
    """Mean and standard deviation of each channel around each cell, (N, CELLS^2, 2 C)."""
    step = maps.shape[2] // CELLS
    window, pad = step * (1 + WINDOW), step * WINDOW // 2
    means, squares = (
        F.avg_pool2d(m, window, stride=step, padding=pad, count_include_pad=False)[..., :CELLS, :CELLS]
        for m in (maps, maps.square())
    )
    deviations = (squares - means.square()).clamp(min=0).sqrt()
    return torch.cat([means, deviations], dim=1).flatten(2).transpose(1, 2)


def _cells(masks: Tensor) -> Tensor:
    """Which cells lie in the garment, (N, CELLS^2)."""
    return F.adaptive_avg_pool2d(shrink(masks)[:, None], CELLS)[:, 0].flatten(1) > 0.5


def _matched(real: list[Tensor], given: list[Tensor]) -> Tensor:
    """Where in the source each patch of the real photo is found, (N, CELLS^2)."""
    return torch.stack([r @ g.transpose(1, 2) for r, g in zip(real, given, strict=True)]).mean(0).argmax(2)


def _distance(made: list[Tensor], real: list[Tensor], given: list[Tensor], inside: Tensor) -> Tensor:
    matched = _matched(real, given)
    row, column = matched // CELLS, matched % CELLS
    best = torch.full(matched.shape, torch.inf)
    for dy in range(-NEAR, NEAR + 1):
        for dx in range(-NEAR, NEAR + 1):
            place = (row + dy).clamp(0, CELLS - 1) * CELLS + (column + dx).clamp(0, CELLS - 1)
            cosines = []
            for m, g in zip(made, given, strict=True):
                there = g.gather(1, place[..., None].expand(-1, -1, g.shape[2]))
                cosines.append((m * there).sum(2))
            best = torch.minimum(best, 1 - torch.stack(cosines).mean(0))
    count = inside.sum(1)
    return torch.where(count > 0, (best * inside).sum(1) / count, torch.nan).float()


def effnet_taps(network: Any, device: torch.device) -> Taps:
    """Early maps of the EfficientNet-lite0 of ``features.EffnetFeatures``."""

    def taps(images: Tensor) -> list[Tensor]:
        x = (images.to(device) * 255 - 127) / 128
        x = network._swish(network._bn0(network._conv_stem(x)))
        maps = []
        for k, block in enumerate(network._blocks[: max(TAPS) + 1]):
            x = block(x)
            if k in TAPS:
                maps.append(x)
        return maps

    return taps


def pattern_distance(extractor: nn.Module) -> PatternDistance | None:
    """The distance on an extractor's own network where it is the EfficientNet, else None."""
    network = getattr(extractor, "network", None)
    if not hasattr(network, "_conv_stem"):
        return None
    return PatternDistance(effnet_taps(network, next(extractor.parameters()).device))
