"""The enhancement for samplers that hand over denoised latents rather than a network's output (ComfyUI)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_dae.enhancement.gates import WINDOW
from lora_dae.enhancement.module import EnhancementModule


@torch.no_grad()
def enhance_denoised(
    module: EnhancementModule,
    denoised: Tensor,
    conditional: Tensor | None,
    sample: Tensor,
    sigma: float,
    next_sigma: float,
    strength: float = 1.0,
    first_order: float = 1.0,
    source: Tensor | None = None,
    trust: Tensor | None = None,
) -> Tensor:
    """The edited prediction of the clean latents, shape and dtype of ``denoised``.

    ``denoised`` (guided), ``conditional`` (or None) and ``sample`` = x0 + sigma * noise are (B, C, H, W), scaled as
    the UNet sees latents; ``sigma`` is the present noise level, ``next_sigma`` the one that the step leads to.
    ``first_order``: 1 for DDIM and Euler, 0 for solvers of higher order or with fresh noise. At strength 0, and at
    noise levels where the module is off, the very same tensor comes back. ``source``: latents of the source photo,
    scaled likewise, for a module with source texture; ``trust`` in it, as ``module.trust`` gives it.
    """
    if strength == 0 or sigma < 1e-3 or -math.log(sigma) <= WINDOW[0]:
        return denoised
    if module.device != denoised.device:
        module.to(denoised.device)
    step = math.inf if next_sigma <= 0 else max(0.0, math.log(sigma / next_sigma))  # in lambda = -log(sigma)
    x0 = denoised.float()
    x0_conditional = x0 if conditional is None else conditional.float()
    delta = module(x0, x0_conditional, sample.float(), 1.0, sigma, step, first_order, source=source, trust=trust)
    return (x0 + strength * delta).to(denoised.dtype)
