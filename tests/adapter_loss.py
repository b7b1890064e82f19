"""The adapter's loss of each sample as a training step takes it, in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_dae.training.objective import Draws, denoise, weighted_error


def adapter_loss(
    unet: nn.Module,
    scheduler: Any,
    batch: dict[str, Tensor],
    null_text: Tensor,
    draws: Draws,
    min_snr_gamma: float,
    garment_weight: float = 1.0,
) -> Tensor:
    denoised = denoise(unet, scheduler, batch, null_text, draws)
    return weighted_error(denoised, batch, scheduler.config.prediction_type, min_snr_gamma, garment_weight)
