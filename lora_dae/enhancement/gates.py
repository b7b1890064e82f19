"""The gain: how much of each frequency band there should be, per place and per noise level.

It edits the predicted clean latents once per reverse step, ``x0' = x0 + strength * delta`` with

    delta = sum_b (exp(l_b) - 1) * W_b x0,      l_b = cap * tanh(c_b + (1 - e^-h) * first_order * u_b)

``c_b`` calibrates the network. ``u_b`` repairs what a first-order solver loses: a DDIM step multiplies a
band's standard deviation by a cosine, the smaller the longer the step. It fades as steps get short,
and is off where the solver is of higher order or draws fresh noise; there it would over-sharpen.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_dae.config import ConfigError
from lora_dae.diffusion import Level, half_log_snr
from lora_dae.enhancement.bands import local_log_energy, split_bands

# Off above roughly t = 750 of Stable Diffusion's 1000, fully on below t = 620: gains at high noise compound
# over the chain and blow up under strong guidance.
WINDOW = (-1.4, -0.9)  # lambda = log(alpha / sigma)
_FREQUENCIES = 4  # of the Fourier features of lambda
NOISE_FEATURES = 2 * _FREQUENCIES + 2
LAMBDA_RANGE = 8.0
FEATURE_SCALE = 0.25  # log energies span about [-9, 4]


class BandGain(nn.Module):
    """Band gains from local energies, noise level and step size; about 3 k parameters, any channel count.

    ``levels`` bands, ``hidden`` channels, gains within ``exp(+-max_log_gain)`` at strength 1; ``inputs`` as in
    ``visible``. The last layer starts at zero: a new module is the exact identity. Values that make no sense raise
    ConfigError.
    """

    def __init__(self, levels: int = 3, hidden: int = 32, max_log_gain: float = 0.405, inputs: str = "energy") -> None:
        super().__init__()
        if levels < 1 or hidden < 1 or not 0 < max_log_gain < math.inf:
            raise ConfigError(
                f"enhancement.levels={levels}, hidden={hidden}, max_log_gain={max_log_gain}: "
                "all must be positive and finite."
            )
        self.levels = levels
        self.hidden = hidden
        self.max_log_gain = max_log_gain
        self.inputs = inputs
        self.input = nn.Linear(3 * levels, hidden, bias=False)
        self.spatial = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.film = nn.Sequential(nn.Linear(NOISE_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.output = nn.Linear(hidden, 2 * levels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def judge(self, seen: Observed, step: NoiseStep, direction: bool = False) -> tuple[Tensor, Tensor]:
        """Delta (B, C, H, W) and log gains (B, levels, H, W), both float32.

        Delta is to be added to x0 or, with ``direction``, to the predicted noise; its mean per image and channel is 0.
        """
        assert seen.noisy is not None and seen.noise_energy is not None
        with torch.autocast(device_type=seen.bands.device.type, enabled=False):
            features = torch.cat([seen.conditional, seen.noise_energy, seen.excess], dim=1) * FEATURE_SCALE
            features = visible(features, self.levels, self.inputs)
            log_gain = self._log_gain(features, seen.excess, step)
            bands = seen.bands
            if direction:  # bands of the noise that x0 and sample imply, by linearity
                bands = (step.scale * seen.noisy - step.alpha * bands) / step.sigma
            delta = weighted(torch.expm1(log_gain), bands)
            # Bands have zero mean, but a gain that varies in space would move it again.
            return delta - delta.mean((2, 3), keepdim=True), log_gain

    def _log_gain(self, features: Tensor, excess: Tensor, step: NoiseStep) -> Tensor:
        scale, shift = self.film(step.features).chunk(2, dim=1)
        hidden = self.spatial(pointwise(self.input, features))
        hidden = functional.silu(torch.addcmul(shift[:, :, None, None], hidden, 1 + scale[:, :, None, None]))
        calibration, discretization = pointwise(self.output, hidden).chunk(2, dim=1)

        log_gain = self.max_log_gain * torch.tanh(calibration + step.phi * step.first_order * discretization)
        budgeted = (log_gain - 0.5 * excess.clamp_min(0)).clamp_min(0)
        return torch.where(log_gain > 0, budgeted, log_gain) * step.window


class Observed(NamedTuple):
    """What gates see of a reverse step: bands (levels, B, C, H, W) and local log energies (B, levels, H, W)."""

    bands: Tensor
    rest: Tensor  # (B, C, H, W), what the bands leave
    energy: Tensor
    conditional: Tensor  # energies of the conditional prediction
    excess: Tensor  # log q_b: what guidance has amplified, 0 without guidance
    noisy: Tensor | None  # bands of the noisy latents
    noise_energy: Tensor | None


def observe(x0: Tensor, x0_cond: Tensor, sample: Tensor | None, step: NoiseStep, levels: int) -> Observed:
    """What gates see of ``x0``, the guided prediction; all (B, C, H, W).

    ``x0_cond``: the conditional prediction (the same object where there is no guidance); ``sample``: the noisy latents,
    None where nothing is told of them.
    """
    with torch.autocast(device_type=x0.device.type, enabled=False):
        # One call for all: at latent sizes it is the number of calls that costs.
        parts = [x0, *([] if sample is None else [sample.float() / step.scale]), *([] if x0_cond is x0 else [x0_cond])]
        split, rest = split_bands(torch.cat([part.float() for part in parts]), levels)
        energies, bands = local_log_energy(split).chunk(len(parts)), split.chunk(len(parts), dim=1)
        noisy, noise_energy = (None, None) if sample is None else (bands[1], energies[1])
        conditional = energies[0 if x0_cond is x0 else -1]
        excess = energies[0] - conditional
        return Observed(bands[0], rest[: len(x0)], energies[0], conditional, excess, noisy, noise_energy)


class NoiseStep(NamedTuple):
    """What the gates are told of a reverse step; (1 or B, 1, 1, 1) but for ``features`` (1 or B, NOISE_FEATURES)."""

    alpha: Tensor
    sigma: Tensor
    scale: Tensor  # 1 unless in sigma space, where it makes samples normalized
    phi: Tensor  # 1 - e^-h
    first_order: Tensor
    features: Tensor
    window: Tensor


def noise_step(alpha: Level, sigma: Level, h: Level, first_order: Level, device: torch.device) -> NoiseStep:
    """What gates are told of a step: numbers, or tensors of B values; those of a step are computed once for all images.

    ``alpha``, ``sigma``: noise level of the sample; ``h``: step size in lambda, >= 0, may be infinite; ``first_order``
    in [0, 1]: how far the solver is a deterministic first-order one.
    """
    values = (alpha, sigma, h, first_order)
    if any(isinstance(value, Tensor) for value in values):
        return _noise_step(*values, device)
    with torch.inference_mode(False):
        return _known_step(*(float(value) for value in values), device)


def _noise_step(alpha: Level, sigma: Level, h: Level, first_order: Level, device: torch.device) -> NoiseStep:
    a, s, step, share = (
        torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1, 1, 1, 1)
        for value in (alpha, sigma, h, first_order)
    )
    log_snr, phi = half_log_snr(a, s).clamp(-LAMBDA_RANGE, LAMBDA_RANGE), -torch.expm1(-step)
    scale = (a.square() + s.square()).sqrt()
    return NoiseStep(a, s, scale, phi, share, noise_features(log_snr, phi), noise_window(log_snr))


_known_step = lru_cache(maxsize=1024)(_noise_step)


def noise_window(log_snr: Tensor) -> Tensor:
    """Smooth switch over ``lambda``: 0 at high noise (t above about 750 of 1000), 1 below about 620."""
    low, high = WINDOW
    ramp = ((log_snr - low) / (high - low)).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def visible(energies: Tensor, levels: int, inputs: str) -> Tensor:
    """What gates may see of log energies (B, k * levels, H, W), for ablations.

    ``energy``: those of each band; ``place``: their mean over the bands, in every band's stead; ``time``: zeros.
    """
    if inputs == "energy":
        return energies
    if inputs == "time":
        return torch.zeros_like(energies)
    mean = energies.unflatten(1, (-1, levels)).mean(2, keepdim=True)
    return mean.expand(-1, -1, levels, -1, -1).flatten(1, 2)


def weighted(weights: Tensor, bands: Tensor) -> Tensor:
    """The sum of the bands (levels, B, C, H, W), each times its weight at each place (B, levels, H, W)."""
    return (weights.transpose(0, 1)[:, :, None] * bands).sum(0)


def pointwise(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """A ``layer`` of 1 x 1 over the channels of (B, C, H, W). With few channels much faster on CPU than convolving."""
    y = torch.bmm(layer.weight.flatten(1).expand(len(x), -1, -1), x.flatten(2))  # `@` would copy into another layout
    if layer.bias is not None:
        y = y + layer.bias[:, None]
    return y.unflatten(2, x.shape[2:])


def noise_features(log_snr: Tensor, phi: Tensor) -> Tensor:
    """(B or 1, 2 * frequencies + 2): sines and cosines of lambda, and the step size in two scalings."""
    octaves = 2.0 ** torch.arange(_FREQUENCIES, device=log_snr.device) * (math.pi / LAMBDA_RANGE / 2)
    angles = log_snr.flatten(1) * octaves
    step = phi.flatten(1)
    angles, step = (value.expand(max(len(angles), len(step)), -1) for value in (angles, step))
    return torch.cat([angles.sin(), angles.cos(), step, step.sqrt()], dim=1)
