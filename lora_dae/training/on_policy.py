"""How the gain learns: on the states that the sampler itself visits.

One training step runs one whole sampling chain (random guidance, number of steps and solver) with the module
in it. Every state that a step leads to is compared, as a distribution of local band energies, with real images
noised to the same level: an identity of the forward process, so nothing is asked for that should not be there.
(Asking it of the predicted x0 instead would be wrong: a posterior mean lacks energy by right. Comparing x0 with
teacher-forced x0 is right but too weak: it cannot see what the coming step will lose.) A chain that lost texture
lies below; where nothing is missing the module learns to do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dae.config import LOSSES, EnhancementConfig
from lora_dae.diffusion import add_noise, current_level, is_sigma_space, next_level, x0_delta_to_output_delta
from lora_dae.enhancement.gates import WINDOW
from lora_dae.enhancement.hook import gate_inputs
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.objective import OnPolicyLoss, on_policy_loss
from lora_dae.enhancement.registration import Encode
from lora_dae.sampling.loop import Conditions, Guidance, predict
from lora_dae.sampling.schedulers import build_scheduler
from lora_dae.training.objective import Photos, photos_of

SOLVERS = ("ddim", "euler", "dpm++", "unipc")  # half of them of first order: only there the u part learns
SOURCE_GUIDANCE = (1.0, 3.0)
WITHOUT_SOURCE = 0.15  # share of the chains from captions alone, where there are sources


@dataclass(frozen=True)
class Chain:
    """The random setting of one chain."""

    solver: str
    num_inference_steps: int
    guidance: Guidance
    alone: bool  # from captions alone, whatever the batch has
    noise: Tensor  # (B, C, h, w), where the chain starts
    reference_noise: Tensor  # (B, C, h, w), of the really noised images


def draw_chain(
    batch: dict[str, Tensor],
    cfg: EnhancementConfig,
    shared: torch.Generator,
    generators: Sequence[torch.Generator],
) -> Chain:
    """Settings from ``shared``, which all processes have to give alike; noises from one generator per sample."""
    shape, device = batch["latent_mean"].shape[1:], batch["latent_mean"].device
    solver = SOLVERS[int(torch.randint(len(SOLVERS), (), generator=shared))]
    low, high = cfg.steps_range
    # As many chains between 8 and 20 steps as between 20 and 50: what there is to repair is in the long steps.
    steps = min(high, int(low * ((high + 1) / low) ** float(torch.rand((), generator=shared))))
    alone = float(torch.rand((), generator=shared)) < WITHOUT_SOURCE
    guidance = draw_guidance(cfg, shared, "source" in batch and not alone)
    noises = torch.stack([torch.randn(2, *shape, generator=own) for own in generators]).to(device)
    return Chain(solver, steps, guidance, alone, noises[:, 0], noises[:, 1])


def draw_guidance(cfg: EnhancementConfig, shared: torch.Generator, has_source: bool) -> Guidance:
    """Of ``cfg.guidance_range`` for text; with a source half of the time one scale for both, within its range.

    One scale for both costs two network calls instead of three.
    """
    low, high = cfg.guidance_range
    same, chances = float(torch.rand((), generator=shared)) < 0.5, torch.rand(2, generator=shared).tolist()
    if not has_source:
        text = low + (high - low) * chances[0]
        return Guidance(text, text)
    least, most = (max(low, SOURCE_GUIDANCE[0]), min(high, SOURCE_GUIDANCE[1])) if same else SOURCE_GUIDANCE
    source = least + (max(most, least) - least) * chances[1]
    return Guidance(source if same else low + (high - low) * chances[0], source)


def chain_loss(
    unet: nn.Module,
    base_scheduler: Any,
    module: EnhancementModule,
    batch: dict[str, Tensor],
    null_text: Tensor,
    chain: Chain,
    gather: Callable[[Tensor], Tensor] = lambda own: own,
    losses: Collection[str] = LOSSES,
    placement: str = "prediction",
    photos: Photos | None = None,
    encode: Encode | None = None,
) -> tuple[Tensor, OnPolicyLoss]:
    """Mean loss along one chain (with gradient into the module only), and its parts at the last state.

    ``placement=direction``: the chain is DDIM's, and its direction term is edited, as in drawing.

    ``gather`` makes what the loss compares, statistics of a batch, those of all processes' batches. ``losses``: as
    ``on_policy_loss``. A module that registers sources needs ``photos`` of samples by number, and ``encode``.
    """
    direction = placement == "direction"
    scheduler = build_scheduler("ddim" if direction else chain.solver, base_scheduler)
    scheduler.set_timesteps(chain.num_inference_steps, device=chain.noise.device)
    source = batch.get("source")
    # To the network zeros are no source, and with one scale for both the guidance is that of captions alone.
    shown = torch.zeros_like(source) if source is not None and chain.alone else source
    placed = None
    if module.preview is not None and source is not None and not chain.alone:
        assert photos is not None and encode is not None
        given = photos_of(batch, photos)[1]
        assert given is not None
        placed = module.registering(given, source, encode)
    conditions = Conditions(batch["text"], null_text, shown)
    prediction_type, sigma_space = base_scheduler.config.prediction_type, is_sigma_space(scheduler)
    sample = chain.noise * scheduler.init_noise_sigma
    real, reference_noise = gather(batch["latent_mean"]), gather(chain.reference_noise)
    of_steps: list[Tensor] = []
    parts: OnPolicyLoss | None = None
    for t in scheduler.timesteps:
        with torch.no_grad():
            guided, conditional = predict(unet, scheduler.scale_model_input(sample, t), t, conditions, chain.guidance)
        alpha, sigma = current_level(scheduler, t)
        reached = next_level(scheduler, t)
        inputs = gate_inputs(scheduler, guided, t, sample, conditional)
        acts = alpha > sigma * math.exp(WINDOW[0])  # elsewhere the module is off
        seen, trust = None if chain.alone else source, None
        if placed is not None:
            seen, trust = (placed.at(inputs.x0, sigma / alpha), placed.trusted(None)) if acts else (None, None)
        change = module.evaluate(*inputs, direction=direction, source=seen, trust=trust)
        assert change.log_gain is not None
        if direction:
            sample = scheduler.step(guided, t, sample).prev_sample + change.delta * reached[1]
        else:
            edit = x0_delta_to_output_delta(change.delta, alpha, sigma, prediction_type, sigma_space)
            sample = scheduler.step(guided + edit, t, sample).prev_sample
        if acts:
            there = add_noise(real, reference_noise, *reached)
            parts = on_policy_loss(gather(sample), there, gather(change.log_gain), losses=losses)
            of_steps.append(parts.total)
        sample = sample.detach()
        if hasattr(scheduler, "model_outputs"):  # a multistep solver's memory: each state is judged on its own
            scheduler.model_outputs = [None if o is None else o.detach() for o in scheduler.model_outputs]
        if getattr(scheduler, "last_sample", None) is not None:  # UniPC's
            scheduler.last_sample = scheduler.last_sample.detach()
    assert parts is not None  # every schedule ends at low noise
    return torch.stack(of_steps).mean(), parts
