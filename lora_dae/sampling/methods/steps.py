"""Methods that change the chain itself: what noise level the network is told, and where a step leads to."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_dae.diffusion import current_level
from lora_dae.sampling.method import Method, Step

LEAST = 0.00466  # alphas_cumprod of Stable Diffusion's noisiest level


class DetailDaemon(Method):
    """The network is told less noise than there is, and takes what is left of it for detail.

    sigma is lowered by the share 0.1 x ``amount`` x guidance in the middle of the chain, less towards ``start`` and
    ``end`` (shares of the noise levels), following a cosine. Source: Jonseed/ComfyUI-Detail-Daemon, its defaults (bias
    0.5, exponent 1). With two guidance scales the larger one counts.
    """

    def __init__(self, amount: float, start: float, end: float) -> None:
        self.amount, self.start, self.end = amount, start, end

    def multiplier(self, position: float) -> float:
        """In [0, 1]; ``position`` is 0 at the first noise level and 1 at the last."""
        inside = (position - self.start) / (self.end - self.start)
        return 0.5 * (1 - math.cos(2 * math.pi * inside)) if 0 < inside < 1 else 0.0

    def seen_level(
        self, scheduler: Any, timestep: Tensor, position: float, guidance: float
    ) -> tuple[float, float] | None:
        lowered = 0.1 * self.amount * guidance * self.multiplier(position)
        if lowered == 0:
            return None
        alpha, sigma = current_level(scheduler, timestep)
        ratio = sigma / alpha * max(1e-6, 1 - lowered)
        return (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5


class WaveletCorrection(Method):
    """The sample that a step led to, moved away from the predicted x0 in Haar bands: a correction of the SNR-t bias.

    x_s += g (W x_s - W x0), with g = ``low`` * r in the low band and ``high`` * (1 - r) in the high ones; r in [0, 1]
    is the noise level that the step started from, sigma / alpha, as a share of the highest one. Yu et al. 2026 (arXiv
    2604.16044); the weights as in AMAP-ML/DCW, ``generate.py``, whose sigma is that ratio.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def after(self, step: Step, guided: Tensor, reached: Tensor, level: tuple[float, float]) -> Tensor:
        # A terminal SNR of zero has no ratio, and the level before it one that leaves all others no share.
        least = max(float(step.scheduler.alphas_cumprod[-1]), LEAST)
        alpha, sigma = step.level
        share = min(1.0, sigma / max(alpha, 1e-12) / math.sqrt((1 - least) / least))
        away = reached - step.x0(guided)
        smooth = haar_low(away)
        return reached + self.low * share * smooth + self.high * (1 - share) * (away - smooth)


def haar_low(x: Tensor) -> Tensor:
    """The part of (B, C, h, w), h and w even, in the low band of the Haar transform: means of 2 x 2 blocks."""
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0)
