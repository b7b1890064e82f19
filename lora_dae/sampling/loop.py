"""The reverse process: from noise to latents, guided by the caption and by the source photo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_dae.diffusion import current_level, is_sigma_space, next_level, predict_x0, x0_delta_to_output_delta
from lora_dae.sampling.keep import Kept
from lora_dae.sampling.method import Method, Step
from lora_dae.sampling.noised import Noised
from lora_dae.sampling.schedulers import check_timesteps

FRESH_NOISE = ("DDPMScheduler", "EulerAncestralDiscreteScheduler")


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

    def largest(self, has_source: bool) -> float:
        """The scale of methods that know one alone."""
        return max(self.text, self.source) if has_source else self.text

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
    _texts: dict[tuple[str, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def texts(self, branches: tuple[str, ...]) -> Tensor:
        """(branches * B, L, D); the same tensor in every step, by which merged layers know what they have computed."""
        if branches not in self._texts:
            null = self.null_text.expand_as(self.text)
            self._texts[branches] = torch.cat([self.text if branch == "full" else null for branch in branches])
        return self._texts[branches]


def initial_noise(seed: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """One standard normal (C, h, w) per image, drawn from (seed, index) alone: batches do not matter."""
    draws = [torch.randn(shape, generator=noise_generator(seed, i)) for i in indices]
    return torch.stack(draws)


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The generator of one image's noise."""
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def branch_predictions(
    unet: nn.Module, model_input: Tensor, timestep: Tensor | float, conditions: Conditions, guidance: Guidance
) -> dict[str, Tensor]:
    """The network's outputs at one timestep, or one for each of the B images, by branch of the guidance; float32.

    One batched call.
    """
    source = conditions.source
    branches = guidance.branches(source is not None)
    inputs = []
    for branch in branches:
        if source is None:
            inputs.append(model_input)
        else:
            shown = torch.zeros_like(source) if branch == "none" else source
            inputs.append(torch.cat([model_input, shown.to(model_input.dtype)], dim=1))
    if isinstance(timestep, Tensor) and timestep.ndim == 1 and len(timestep) > 1:
        timestep = timestep.repeat(len(branches))
    batch = torch.cat(inputs).contiguous(memory_format=torch.channels_last)
    outputs = unet(batch, timestep, encoder_hidden_states=conditions.texts(branches), return_dict=False)[0].float()
    return dict(zip(branches, outputs.chunk(len(branches)), strict=True))


def predict(
    unet: nn.Module, model_input: Tensor, timestep: Tensor | float, conditions: Conditions, guidance: Guidance
) -> tuple[Tensor, Tensor]:
    """(guided, conditional) network outputs at one timestep, float32, in one batched call."""
    predictions = branch_predictions(unet, model_input, timestep, conditions, guidance)
    return guidance.mix(predictions), predictions["full"]


@torch.no_grad()
def sample_latents(
    unet: nn.Module,
    scheduler: Any,
    noise: Tensor,
    conditions: Conditions,
    guidance: Guidance,
    num_inference_steps: int,
    method: Method | None = None,
    generators: Sequence[torch.Generator] = (),
    kept: Kept | None = None,
    start: Noised | None = None,
) -> Tensor:
    """Run ``scheduler`` from standard normal ``noise`` (B, C, h, w) to clean latents, float32.

    An enhanced scheduler (``enhancement.hook``) is given the conditional prediction of every step. Call it
    under autocast for bf16. ``generators``, one per image, feed the solvers that draw fresh noise. ``kept``: photos
    of which the rest stays; ``start``: photos that the last steps draw again.
    """
    method = method or Method()
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    check_timesteps(scheduler, num_inference_steps)
    first, sample = 0, noise * scheduler.init_noise_sigma
    if start is not None:
        first, sample = start.begin(scheduler, noise, num_inference_steps)
    stochastic = str(scheduler.config.get("algorithm_type")).startswith("sde")
    fresh = len(generators) > 0 and (stochastic or type(scheduler).__name__ in FRESH_NOISE)
    extra = {"generator": list(generators)} if fresh else {}
    # Solvers that evaluate the network twice at a noise level have its timestep twice. Read once, not in every step.
    _, places = torch.unique_consecutive(scheduler.timesteps, return_inverse=True)
    positions: list[int] = places.tolist()
    scale, levels = guidance.largest(conditions.source is not None), max(positions[-1], 1)
    with method.around(unet):
        for k, t in enumerate(scheduler.timesteps[first:], first):
            told = method.seen_level(scheduler, t, positions[k] / levels, scale)
            model_input = scheduler.scale_model_input(sample, t)
            if told is None:
                predictions = branch_predictions(unet, model_input, t, conditions, guidance)
            else:
                predictions = _predictions_at(told, unet, scheduler, sample, t, conditions, guidance)
            step = Step(unet, scheduler, t, current_level(scheduler, t), sample, conditions, guidance, predictions)
            guided = method.guide(step)
            if hasattr(scheduler, "set_conditional"):
                scheduler.set_conditional(step.conditional)
            level = next_level(scheduler, t)
            reached = scheduler.step(guided, t, sample, **extra).prev_sample
            sample = method.after(step, guided, reached, level)
            if kept is not None:
                sample = kept.at(sample, noise, level if k + 1 < len(scheduler.timesteps) else None)
    return sample


def _predictions_at(
    told: tuple[float, float],
    unet: nn.Module,
    scheduler: Any,
    sample: Tensor,
    timestep: Tensor,
    conditions: Conditions,
    guidance: Guidance,
) -> dict[str, Tensor]:
    """Outputs that imply, at the sample's true level, the x0 that the network finds when it is told another one."""
    true, sigma_space = current_level(scheduler, timestep), is_sigma_space(scheduler)
    alpha, sigma = told
    ratios = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log().cpu().numpy()
    time = torch.tensor(float(np.interp(math.log(sigma / alpha), ratios, np.arange(len(ratios)))), device=sample.device)
    shown = sample / true[0] * alpha
    kind = scheduler.config.prediction_type
    found = branch_predictions(unet, shown, time, conditions, guidance)
    for branch, output in found.items():
        change = predict_x0(output, shown, alpha, sigma, kind) - predict_x0(output, sample, *true, kind, sigma_space)
        found[branch] = output + x0_delta_to_output_delta(change, *true, kind, sigma_space)
    return found
