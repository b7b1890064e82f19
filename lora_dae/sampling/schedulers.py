"""Diffusers schedulers by name, with the noise schedule that the backbone was trained with."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from lora_dae.config import SCHEDULERS, ConfigError

_CLASSES: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
}
# Clipping to [-1, 1], diffusers' default, is for pixels. By keyword: from_config takes that default for all that the
# base's own config has left out. PNDM's warm-up multiplies the calls; every SD pipeline skips it.
_EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ddim", "ddpm", "heun"), {"clip_sample": False}),
    "pndm": {"skip_prk_steps": True},
}
# PNDM and DDIM with leading spacing reach past the last timestep without it.
_SPACING: dict[str, dict[str, Any]] = {"pndm": {"timestep_spacing": "leading", "steps_offset": 1}}
_NO_ZERO_SNR = ("heun", "lms", "pndm")


def build_scheduler(name: str, base: Any) -> Any:
    """A fresh scheduler called ``name`` (config.SCHEDULERS) on the betas and prediction type of ``base``.

    Raises ConfigError for an unknown name, and for a solver that cannot do the zero terminal SNR of ``base``.
    """
    if name not in _CLASSES:
        raise ConfigError(f"sampling.scheduler={name} is unknown: use one of {', '.join(SCHEDULERS)}.")
    if base.config.get("rescale_betas_zero_snr") and name in _NO_ZERO_SNR:
        raise ConfigError(
            f"sampling.scheduler={name} knows no zero terminal SNR, with which this backbone was trained: use ddim, "
            "euler, dpm++ or unipc."
        )
    return _CLASSES[name].from_config(base.config, **_EXTRA.get(name, {}), **_SPACING.get(name, {}))


def check_timesteps(scheduler: Any, steps: int, option: str = "") -> None:
    """Raises ConfigError where what ``set_timesteps(steps)``, asked for by ``option``, made goes below timestep 0.

    diffusers' trailing spacing by np.arange: rounding gives some numbers one step too many.
    """
    if scheduler.timesteps[-1] < 0:
        asked = f"{option}: " if option else ""
        raise ConfigError(
            f"{asked}{type(scheduler).__name__} has no {steps} steps in its trailing spacing: use {steps - 1} or "
            f"{steps + 1}."
        )


def check_schedule(name: str, steps: int, base: Any, option: str) -> None:
    """Raises ConfigError where the solver ``name`` has no such ``steps`` on the noise schedule of ``base``."""
    scheduler = build_scheduler(name, base)
    scheduler.set_timesteps(steps)
    check_timesteps(scheduler, steps, option)
