"""The reverse process: from noise to latents, guided by the caption and by the source photo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Guidance:
    """How strongly caption and source steer; 1 is the plain conditional prediction.

    Without a source: Ho & Salimans 2022. With one, the two scales of InstructPix2Pix (Brooks et al. 2023,
    equation 3). Fewer network calls where the formula allows it: see ``branches``.
    """

    text: float = 1.0
    source: float = 1.0

    def branches(self, has_source: bool) -> tuple[str, ...]:
        """The predictions that one step needs, the conditional one last.

        ``full`` = caption and source (or caption alone where there is none), ``source`` = source only,
        ``none`` = neither.
        """
        if not has_source:
            return ("full",) if self.text == 1 else ("none", "full")
        if self.text == self.source:  # the source-only prediction cancels
            return ("full",) if self.text == 1 else ("none", "full")
        if self.source == 1:
            return ("source", "full")
        return ("none", "source", "full")

    def mix(self, predictions: dict[str, Tensor]) -> Tensor:
        """The guided prediction; ``predictions`` by branch, each (B, C, h, w)."""
        full = predictions["full"]
        if len(predictions) == 1:
            return full
        if "source" not in predictions:
            return predictions["none"] + self.text * (full - predictions["none"])
        steered = predictions["source"] + self.text * (full - predictions["source"])
        if "none" not in predictions:
            return steered
        return steered + (self.source - 1) * (predictions["source"] - predictions["none"])


@dataclass(frozen=True)
class Conditions:
    """What a batch is steered by: text (B, L, D), null_text (L, D), source latents (B, C, h, w) or None."""

    text: Tensor
    null_text: Tensor
    source: Tensor | None = None


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """One standard normal (C, h, w) per image, drawn from (seed, index) alone: batches do not matter."""
    draws = [torch.randn(shape, generator=_generator(seed, i)) for i in indices]
    return torch.stack(draws)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def predict(
    unet: nn.Module, model_input: Tensor, timestep: Tensor | int, conditions: Conditions, guidance: Guidance
) -> tuple[Tensor, Tensor]:
    """(guided, conditional) network outputs at one timestep, or one for each of the B images, float32, in one call."""
    source = conditions.source
    branches = guidance.branches(source is not None)
    null = conditions.null_text.expand_as(conditions.text)
    inputs, texts = [], []
    for branch in branches:
        texts.append(conditions.text if branch == "full" else null)
        if source is None:
            inputs.append(model_input)
        else:
            shown = torch.zeros_like(source) if branch == "none" else source
            inputs.append(torch.cat([model_input, shown.to(model_input.dtype)], dim=1))
    if isinstance(timestep, Tensor) and timestep.ndim == 1 and len(timestep) > 1:
        timestep = timestep.repeat(len(branches))
    batch = torch.cat(inputs).contiguous(memory_format=torch.channels_last)
    outputs = unet(batch, timestep, encoder_hidden_states=torch.cat(texts), return_dict=False)[0].float()
    predictions = dict(zip(branches, outputs.chunk(len(branches)), strict=True))
    return guidance.mix(predictions), predictions["full"]


@torch.no_grad()
def sample_latents(
    unet: nn.Module,
    scheduler: Any,
    noise: Tensor,
    conditions: Conditions,
    guidance: Guidance,
    num_inference_steps: int,
    on_step: Callable[[int, Tensor], None] | None = None,
    noise_seed: int = 0,
) -> Tensor:
    """Run ``scheduler`` from standard normal ``noise`` (B, C, h, w) to clean latents, float32.

    An enhanced scheduler (``enhancement.hook``) is given the conditional prediction of every step. Call it
    under autocast for bf16. ``noise_seed`` feeds the solvers that draw fresh noise.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    generator = torch.Generator(noise.device).manual_seed(noise_seed)
    extra = {"generator": generator} if type(scheduler).__name__ in ("DDPMScheduler",) else {}
    for k, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(latents, t)
        guided, conditional = predict(unet, model_input, t, conditions, guidance)
        if hasattr(scheduler, "set_conditional"):
            scheduler.set_conditional(conditional)
        latents = scheduler.step(guided, t, latents, **extra).prev_sample
        if on_step is not None:
            on_step(k, latents)
    return latents
