"""Methods inside the network: FreeU, and two that guide away from a prediction with worse self-attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from lora_dae.config import ConfigError
from lora_dae.sampling.loop import Conditions, Guidance, branch_predictions
from lora_dae.sampling.method import Method, Step


class FreeU(Method):
    """Si et al. 2023 (arXiv 2309.11497), diffusers' own: ``b1``, ``b2`` amplify the decoder's features, ``s1``, ``s2``
    weaken the low frequencies of its skip connections; 1 everywhere is the network as it is. diffusers scales the
    features by ``b`` in all places, as the paper's first version does; the settings are its own for SD 1.5."""

    def __init__(self, s1: float, s2: float, b1: float, b2: float) -> None:
        self.scales = {"s1": s1, "s2": s2, "b1": b1, "b2": b2}

    @contextmanager
    def around(self, unet: Any) -> Iterator[None]:
        if all(scale == 1 for scale in self.scales.values()):
            yield  # diffusers would take the skips through a Fourier transform and back
            return
        unet.enable_freeu(**self.scales)
        try:
            yield
        finally:
            unet.disable_freeu()


class IdentityAttention:
    """A processor whose attention map is the identity: every place sees itself alone."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


class PerturbedAttention(Method):
    """Perturbed-attention guidance, Ahn et al. 2024 (arXiv 2403.17377): ``scale`` times the difference to the
    conditional prediction with identity maps in the middle block's self-attention. One more network call a step."""

    extra_calls = 1

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def guide(self, step: Step) -> Tensor:
        layers = middle_self_attention(step.unet)
        processors = [layer.processor for layer in layers]
        try:
            for layer in layers:
                layer.processor = IdentityAttention()
            perturbed = _again(step, step.sample, "full")
        finally:
            for layer, processor in zip(layers, processors, strict=True):
                layer.processor = processor
        return super().guide(step) + self.scale * (step.conditional - perturbed)


class SelfAttention(Method):
    """Self-attention guidance, Hong et al. 2022 (arXiv 2210.00939): ``scale`` times the difference to the prediction
    for a sample that is blurred where the middle block attends most. One more network call a step."""

    extra_calls = 1

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self._map: Tensor | None = None

    @contextmanager
    def around(self, unet: nn.Module) -> Iterator[None]:
        hook = middle_self_attention(unet)[0].register_forward_pre_hook(self._remember, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def guide(self, step: Step) -> Tensor:
        assert self._map is not None
        attended = self._map[: len(step.sample)]  # of the least conditioned branch, which comes first
        x0, (alpha, sigma) = step.x0(step.unconditional), step.level
        noise = (step.sample - alpha * x0) / max(sigma, 1e-6)
        worse = alpha * blur_where(x0, attended) + sigma * noise
        degraded = _again(step, worse, next(iter(step.predictions)))
        return super().guide(step) + self.scale * (step.unconditional - degraded)

    def _remember(self, attn: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        query, key = (attn.head_to_batch_dim(project(states)) for project in (attn.to_q, attn.to_k))
        scores = attn.get_attention_scores(query, key)
        self._map = scores.unflatten(0, (len(states), -1)).mean(1).sum(1).float()  # (B, places)


def middle_self_attention(unet: Any) -> list[Attention]:
    """The self-attention layers of the UNet's middle block. Raises ConfigError where there are none."""
    middle = getattr(unet, "mid_block", None)
    found = [m for m in (middle.modules() if middle is not None else ()) if isinstance(m, Attention)]
    layers = [layer for layer in found if not layer.is_cross_attention]
    if not layers:
        raise ConfigError(
            "sampling.method=sag and pag need self-attention in the UNet's middle block, which this backbone does not "
            "have: use another method."
        )
    return layers


def blur_where(x0: Tensor, attended: Tensor) -> Tensor:
    """Latents (B, C, h, w), blurred (9 x 9, sigma 1) where ``attended`` (B, places of a coarser grid) exceeds 1."""
    height, width = x0.shape[-2:]
    factor = math.sqrt(height * width / attended.shape[1])
    grid = attended.view(len(x0), 1, round(height / factor), round(width / factor))
    mask = F.interpolate((grid > 1).to(x0.dtype), (height, width))
    return x0 + mask * (_blur(x0) - x0)


def _blur(x: Tensor) -> Tensor:
    taps = torch.arange(-4, 5, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * taps**2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 9)
    x = F.conv2d(F.pad(x, (4, 4, 0, 0), mode="reflect"), kernel[:, :, None], groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, 4, 4), mode="reflect"), kernel[:, :, :, None], groups=x.shape[1])


def _again(step: Step, sample: Tensor, branch: str) -> Tensor:
    """The network's output for one branch of the guidance, at another sample of the same level."""
    shown = step.scheduler.scale_model_input(sample, step.timestep)
    if branch == "full":
        return branch_predictions(step.unet, shown, step.timestep, step.conditions, Guidance())["full"]
    given = step.conditions
    source = None if given.source is None else torch.zeros_like(given.source) if branch == "none" else given.source
    alone = Conditions(given.null_text.expand_as(given.text), given.null_text, source)
    return branch_predictions(step.unet, shown, step.timestep, alone, Guidance())["full"]
