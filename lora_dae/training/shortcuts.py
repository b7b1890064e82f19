"""Ways to train faster that change what is learned; off by default, measured in experiments/training_shortcuts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

Batch = dict[str, Tensor]


def at_half_size(batch: Batch) -> Batch:
    """The batch with latents, source and mask averaged over 2 x 2 places: a quarter of the network's work.

    Photos of half the size have nearly these latents. Four independent draws of a latent average to half the
    standard deviation. SDXL is told the smaller target size (the last two of ``size_ids``).
    """
    half = dict(batch)
    for name in ("latent_mean", "source", "mask"):
        if name in batch:
            half[name] = avg_pool2d(batch[name], 2)
    half["latent_std"] = avg_pool2d(batch["latent_std"].square(), 2).div(4).sqrt()
    if "size_ids" in batch:
        half["size_ids"] = torch.cat([batch["size_ids"][:, :4], batch["size_ids"][:, 4:] / 2], dim=1)
    return half


class FewerKeys:
    """An attention processor that lets self-attention see a random share of the tokens while gradients are taken.

    Which ones is drawn from the global generator, anew in each layer and step, the same for all samples of the batch.
    """

    def __init__(self, processor: Any, share: float) -> None:
        self.processor, self.share = processor, share

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any
    ) -> Tensor:
        if encoder_hidden_states is None and self.share < 1 and torch.is_grad_enabled():
            tokens = hidden_states.shape[1]
            seen = torch.randperm(tokens)[: max(1, round(self.share * tokens))]
            encoder_hidden_states = hidden_states[:, seen.to(hidden_states.device)]
        return self.processor(attn, hidden_states, encoder_hidden_states, *args, **kw)  # type: ignore[no-any-return]


def see_keys(unet: Any, share: float) -> None:
    """Let the self-attention layers of ``unet`` see that share of the tokens; 1 is all of them, as always."""
    processors = dict(unet.attn_processors)
    for name, processor in processors.items():
        if isinstance(processor, FewerKeys):
            processor.share = share
        elif share < 1 and name.endswith("attn1.processor"):
            processors[name] = FewerKeys(processor, share)
    unet.set_attn_processor(processors)
