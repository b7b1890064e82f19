"""Gradient checkpointing: which activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from functools import partial

from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint


def recompute(unet: UNet2DConditionModel, which: bool | str, preserve_rng_state: bool = True) -> None:
    """``backbone.gradient_checkpointing``: False, True (all blocks) or "attention"; gradients are the same.

    "attention" means the transformer blocks alone, attention and feed-forward: they keep more for each operation than
    convolutions do, so two thirds of what True saves cost half to two thirds of its extra time (selective
    recomputation, Korthikanti et al. 2022, 2205.05198). ``preserve_rng_state``: for dropout; fake tensors have none.
    """
    if not which:
        return
    # Not reentrant: LoRA's inputs need no gradient of their own.
    unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=preserve_rng_state))
    for block in unet.modules():
        if which == "attention" and getattr(block, "gradient_checkpointing", False):
            block.gradient_checkpointing = isinstance(block, Transformer2DModel)  # type: ignore[assignment]
