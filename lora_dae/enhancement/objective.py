"""What the enhancement module learns from.

The loss is on-policy: it compares a state that the sampler itself reached, as a distribution of local band
energies, with really noised images at the same noise level. It never asks the predicted x0 for the band energy
of real images: a posterior mean lacks energy by right, and restoring it every step blows the chain up.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from lora_dae.config import LOSSES
from lora_dae.enhancement.bands import local_log_energy, noise_variances, split_bands

_REGULARIZATION = 1e-3
_FLOOR = 1e-4  # of band power in units of white noise, as for local energies


class OnPolicyLoss(NamedTuple):
    """Scalars; ``total``, the sum of those that count, carries the gradient."""

    total: Tensor
    distribution: Tensor
    power: Tensor
    regularization: Tensor


def on_policy_loss(
    state: Tensor,
    reference_state: Tensor,
    log_gain: Tensor,
    mask: Tensor | None = None,
    losses: Collection[str] = LOSSES,
) -> OnPolicyLoss:
    """Distance of an on-policy ``state`` from really noised ``reference_state``, mean over bands.

    Both (B, C, H, W), at one noise level; only their statistics over the batch are compared. ``log_gain``:
    (B, levels, H, W) as ``EnhancementModule.evaluate`` returns it. ``mask``: optional bool (B, 1, H, W), the
    places that count in both, at least one. Sums the 1-D Wasserstein distance of local log energies, the
    absolute log ratio of band power, and 1e-3 of the gains' mean square and total variation; of the first two those
    that ``losses`` names (distribution, power).
    """
    levels = log_gain.shape[1]
    bands, reference = split_bands(state, levels)[0], split_bands(reference_state.detach(), levels)[0]
    places = torch.ones_like(state[:, 0], dtype=torch.bool) if mask is None else mask[:, 0].bool()
    distribution = sorted_distance(_at(places, local_log_energy(bands)), _at(places, local_log_energy(reference)))
    power = (_log_power(bands, places) - _log_power(reference, places)).abs().mean()
    regularization = gain_regularization(log_gain)
    parts = {"distribution": distribution, "power": power}
    total = sum(value for name, value in parts.items() if name in losses) + regularization
    return OnPolicyLoss(total, distribution, power, regularization)


def sorted_distance(values: Tensor, reference: Tensor) -> Tensor:
    """1-D Wasserstein-1 distance of two equally large samples (last dimension), mean over the rest."""
    return (values.sort(-1).values - reference.sort(-1).values).abs().mean()


def gain_regularization(log_gain: Tensor) -> Tensor:
    """1e-3 of mean square and mean absolute difference between neighbors of (B, levels, H, W) log gains."""
    variation = log_gain.diff(dim=-1).abs().mean() + log_gain.diff(dim=-2).abs().mean()
    return _REGULARIZATION * (log_gain.square().mean() + variation)


def _at(places: Tensor, values: Tensor) -> Tensor:
    """(B, levels, H, W) values at the (B, H, W) places that count: (levels, count)."""
    return values.transpose(0, 1)[:, places]


def _log_power(bands: Tensor, places: Tensor) -> Tensor:
    """Log power per band over batch, channels and places, in units of white noise: (levels,)."""
    powers = [band.square().mean(1)[places].mean() for band in bands]
    noise = noise_variances(len(bands))
    return torch.stack([power / variance + _FLOOR for power, variance in zip(powers, noise, strict=True)]).log()
