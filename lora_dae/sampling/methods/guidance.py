"""Methods that mix or change predictions in another way than classifier-free guidance; no further network call."""

from __future__ import annotations

import math

import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from lora_dae.config import EnhancementConfig
from lora_dae.diffusion import half_log_snr
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.gates import noise_window
from lora_dae.sampling.method import Method, Step

LEVELS = 2  # bands that count as high frequencies


class ProjectedGuidance(Method):
    """Adaptive projected guidance, Sadat et al. 2024 (arXiv 2410.02416, algorithm 1), on x0 as in the paper.

    ``eta`` scales the part of the update that is parallel to the conditional prediction (over-saturation), ``norm``
    is the largest length of the update before it is scaled (0: any), ``momentum`` of it over the steps. The length is
    that of all latents of an image, so a norm for SDXL's is wide for smaller ones.
    """

    def __init__(self, eta: float, norm: float, momentum: float) -> None:
        self.eta, self.norm = eta, norm
        self.buffer = MomentumBuffer(momentum) if momentum else None

    def guide(self, step: Step) -> Tensor:
        plain = super().guide(step)
        scale = step.guidance.largest(step.conditions.source is not None) - 1
        if scale <= 0:
            return plain
        conditional, guided = step.x0(step.conditional), step.x0(plain)
        # With two scales, what guidance adds is one direction as well.
        opposite = conditional - (guided - conditional) / scale
        changed = normalized_guidance(
            conditional, opposite, scale, self.buffer, self.eta, self.norm, use_original_formulation=True
        )
        return plain + step.output_delta(changed - guided)


class RescaledGuidance(Method):
    """The guided output with the standard deviation of the conditional one, by ``phi`` in [0, 1].

    Lin et al. 2023 (arXiv 2305.08891, equations 15 and 16).
    """

    def __init__(self, phi: float) -> None:
        self.phi = phi

    def guide(self, step: Step) -> Tensor:
        return rescale_noise_cfg(super().guide(step), step.conditional, self.phi)


class FrequencyGuidance(Method):
    """Frequency-decoupled guidance, Sadat et al. 2025 (arXiv 2506.19713): a scale of its own for each frequency.

    ``low`` and ``high`` multiply what guidance adds there; 1 and 1 is plain guidance. The paper gives each frequency a
    scale of its own, SDXL's 5 and 10, which is a ``high`` of 2.25 for a guidance of 5. Bands are the project's
    undecimated ones in place of a Laplacian pyramid: what counts as high begins lower. FreSca (arXiv 2504.02154)
    scales the same with a Fourier mask.
    """

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def guide(self, step: Step) -> Tensor:
        plain = super().guide(step)
        bands, rest = split_bands(plain - step.conditional, LEVELS)
        return plain + (self.low - 1) * rest + (self.high - 1) * bands.sum(0)


class BandGain(Method):
    """Every band of the predicted x0 times exp(``log_gain``), in all places alike.

    What the enhancement's gain would be without learning: the same bands and noise levels, no gate. Below 0 it blurs.
    """

    def __init__(self, log_gain: float) -> None:
        self.log_gain = log_gain

    def guide(self, step: Step) -> Tensor:
        plain = super().guide(step)
        share = float(noise_window(half_log_snr(*map(torch.tensor, step.level))))
        if share == 0:
            return plain
        bands, _ = split_bands(step.x0(plain), EnhancementConfig().levels)
        return plain + step.output_delta(share * math.expm1(self.log_gain) * bands.sum(0))
