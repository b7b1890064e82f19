"""Diffusion arithmetic: noise, x0 <-> model output, loss weights, noise levels of diffusers schedulers.

Everywhere ``x_t = alpha * x0 + sigma * noise`` and ``lambda = log(alpha / sigma)``. Two families exist.
Variance-preserving samples (DDIM, DDPM, DPM-Solver++, UniPC, PNDM) have ``alpha^2 + sigma^2 = 1``.
Sigma-space samples (Euler, Heun, LMS) are not normalized: ``alpha = 1``, and sigma may exceed 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_dae.config import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

Level = Tensor | float  # an alpha or a sigma: a number, or a tensor that broadcasts against the latents


def add_noise(x0: Tensor, noise: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """The forward process ``alpha * x0 + sigma * noise``; all shapes as ``x0``."""
    return alpha * x0 + sigma * noise


def velocity(x0: Tensor, noise: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """The v target ``alpha * noise - sigma * x0`` (Salimans & Ho 2022) of a variance-preserving process."""
    return alpha * noise - sigma * x0


def training_target(x0: Tensor, noise: Tensor, alpha: Level, sigma: Level, prediction_type: str) -> Tensor:
    """What a network of ``prediction_type`` learns to output, shaped as ``x0``; ConfigError if unknown."""
    _check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(x0, noise, alpha, sigma)
    return x0


def predict_x0(
    output: Tensor,
    sample: Tensor,
    alpha: Level,
    sigma: Level,
    prediction_type: str,
    sigma_space: bool = False,
) -> Tensor:
    """The clean latents that a network output implies.

    ``output`` and ``sample`` have one shape; the result has it too, in their dtype. In sigma space the
    network still saw the normalized sample, hence the other v formula (Karras et al. 2022, table 1 as
    diffusers' Euler writes it). Unknown prediction types raise ConfigError.
    """
    _check_prediction_type(prediction_type)
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (sample - sigma * output) / alpha
    if sigma_space:
        variance = sigma**2 + 1
        return sample / variance - output * (sigma / variance**0.5)
    return alpha * sample - sigma * output


def x0_delta_to_output_delta(
    delta: Tensor, alpha: Level, sigma: Level, prediction_type: str, sigma_space: bool = False
) -> Tensor:
    """What to add to the network output so that ``predict_x0`` rises by ``delta`` at the same sample.

    Adding a delta keeps the rounding of the untouched output; going through x0 and back would not.
    ``sigma`` must not be 0 except for ``sample``. Unknown prediction types raise ConfigError.
    """
    _check_prediction_type(prediction_type)
    if prediction_type == "sample":
        return delta
    if prediction_type == "epsilon":
        return delta * (-alpha / sigma)
    if sigma_space:
        return delta * (-((sigma**2 + 1) ** 0.5) / sigma)
    return delta * (-1 / sigma)


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """Signal-to-noise ratio ``(alpha / sigma)^2``; 0 for pure noise, infinite at sigma 0."""
    return (alpha / sigma) ** 2


def half_log_snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """``lambda = log(alpha / sigma)``, the time variable of DPM-Solver (Lu et al. 2022)."""
    return alpha.log() - sigma.log()


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR loss weight (Hang et al. 2023) for the network's own target; shape of ``snr``, in [0, gamma].

    Finite at ``snr = 0`` (zero-terminal-SNR schedules) and at infinity. ``gamma <= 0`` or an unknown
    prediction type raises ConfigError.
    """
    _check_prediction_type(prediction_type)
    if gamma <= 0:
        raise ConfigError(f"min-SNR gamma is {gamma}; give a positive number, or apply no weight at all.")
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # = min(snr, gamma) / snr without 0 / 0
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma)


def is_sigma_space(scheduler: Any) -> bool:
    """Whether the scheduler's samples are un-normalized (``alpha = 1``).

    DPM-Solver++ and UniPC keep a sigma table as well, but convert it and hold normalized samples.
    """
    return hasattr(scheduler, "sigmas") and not hasattr(scheduler, "_sigma_to_alpha_sigma_t")


def alpha_sigma(scheduler: Any, timestep: Tensor | int | float, like: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) of a diffusers scheduler, float32 on ``like``'s device, broadcastable to ``like``.

    A vector of integer timesteps ``(B,)`` is read from the training schedule (``alphas_cumprod``). A single
    timestep is the one that the sampling loop is at: schedulers with a sigma table know it by ``step_index``.
    Schedulers without ``alphas_cumprod`` (flow matching, EDM) raise ConfigError.
    """
    if isinstance(timestep, Tensor) and timestep.ndim > 0:
        cumprod = _alphas_cumprod(scheduler).to(like.device)[timestep.to(like.device).long()]
        cumprod = cumprod.float().reshape(-1, *([1] * (like.ndim - 1)))
        alpha, sigma = cumprod.sqrt(), (1 - cumprod).sqrt()
        return (torch.ones_like(alpha), sigma / alpha) if is_sigma_space(scheduler) else (alpha, sigma)
    shape = [1] * like.ndim
    alpha_value, sigma_value = current_level(scheduler, timestep)
    return (
        torch.full(shape, alpha_value, dtype=torch.float32, device=like.device),
        torch.full(shape, sigma_value, dtype=torch.float32, device=like.device),
    )


def current_level(scheduler: Any, timestep: Tensor | int | float) -> tuple[float, float]:
    """(alpha, sigma) that the network was just evaluated at, as numbers; call before ``scheduler.step``."""
    if hasattr(scheduler, "sigmas"):
        return _table_level(scheduler, _step_index(scheduler, timestep))
    return _cumprod_level(_alphas_cumprod(scheduler)[int(timestep)])


def next_level(scheduler: Any, timestep: Tensor | int | float) -> tuple[float, float]:
    """(alpha, sigma) that the current step leads to, as numbers; call before ``scheduler.step``."""
    return step_levels(scheduler, timestep)[1]


def step_levels(scheduler: Any, timestep: Tensor | int | float) -> tuple[tuple[float, float], tuple[float, float]]:
    """(alpha, sigma) that the current step starts from, and that it leads to; call before ``scheduler.step``.

    Needs ``set_timesteps``. Follows each scheduler's own rule: DDIM and PNDM subtract a constant stride, DDPM looks its
    predecessor up, the others read the next entry of their sigma table. The later stages of Heun's and PNDM's steps
    evaluate the network where the stage before led to, and start again from where that one started.
    """
    if hasattr(scheduler, "sigmas"):
        index = _step_index(scheduler, timestep)
        if not getattr(scheduler, "state_in_first_order", True):  # Heun's second stage
            index -= 1
        following = min(index + 1, len(scheduler.sigmas) - 1)
        return _table_level(scheduler, index), _table_level(scheduler, following)
    time = int(timestep)
    if hasattr(scheduler, "previous_timestep"):
        start, end = time, int(scheduler.previous_timestep(time))
    else:
        stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        start, end = time, time - stride
        stage = getattr(scheduler, "counter", 0)
        if not scheduler.config.get("skip_prk_steps", True) and stage < len(scheduler.prk_timesteps):  # Runge-Kutta
            start, end = int(scheduler.prk_timesteps[stage // 4 * 4]), time - (0 if stage % 2 else stride // 2)
        elif stage == 1:
            start, end = time + stride, time
    cumprod = _alphas_cumprod(scheduler)
    last = getattr(scheduler, "final_alpha_cumprod", 1.0)
    return _cumprod_level(cumprod[start]), _cumprod_level(cumprod[end] if end >= 0 else last)


def _check_prediction_type(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigError(
            f"prediction type {prediction_type!r} of the scheduler is not supported; "
            f"use one of {', '.join(PREDICTION_TYPES)}."
        )


def _alphas_cumprod(scheduler: Any) -> Tensor:
    if not hasattr(scheduler, "alphas_cumprod") or getattr(scheduler.config, "use_flow_sigmas", False):
        raise ConfigError(
            f"{type(scheduler).__name__} has no discrete variance-preserving noise schedule; "
            "use DDIM, DDPM, DPM-Solver++, UniPC, PNDM, Euler, Heun or LMS."
        )
    return scheduler.alphas_cumprod


def _cumprod_level(cumprod: Tensor | float) -> tuple[float, float]:
    value = float(cumprod)
    return value**0.5, (1 - value) ** 0.5


def _step_index(scheduler: Any, timestep: Tensor | int | float) -> int:
    # Most schedulers set step_index lazily, inside their first step.
    if scheduler.step_index is not None:
        return scheduler.step_index
    if scheduler.begin_index is not None:
        return scheduler.begin_index
    return int(scheduler.index_for_timestep(timestep))


def _table_level(scheduler: Any, index: int) -> tuple[float, float]:
    _alphas_cumprod(scheduler)  # refuses flow-matching tables, whose sigma means something else
    sigma = float(scheduler.sigmas[index])
    if is_sigma_space(scheduler):
        return 1.0, sigma
    alpha = (sigma**2 + 1) ** -0.5
    return alpha, sigma * alpha
