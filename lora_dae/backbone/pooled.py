"""SDXL's second condition: the pooled text travels as the last row of the text embedding.

SDXL's UNet takes, beside the text (N, L, D), ``added_cond_kwargs``: pooled text (N, P) and six sizes. Packed as one
more row of the text, padded with zeros, the pooled text goes through the cache, caption dropout, guidance and
batches like everything else, and no caller differs between families. A hook in front of the UNet unpacks it.

``time_ids`` are (original height, width, crop top, left, target height, width), all that SDXL's training told it of
a photo (Podell et al. 2023, section 2.2). Training puts those of each photo beside the pooled text (``with_sizes``);
where there are none, original and target size are the image's own and the crop begins at the corner, as SDXL's pipeline
draws by default.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

_SIZES = 6


def pack(text: Tensor, pooled: Tensor) -> Tensor:
    """(N, L, D) and (N, P) with P <= D to (N, L + 1, D)."""
    row = functional.pad(pooled, (0, text.shape[2] - pooled.shape[1]))
    return torch.cat([text, row[:, None]], dim=1)


def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(N, L + 1, D) to text (N, L, D) and pooled (N, width)."""
    return packed[:, :-1], packed[:, -1, :width]


def with_sizes(packed: Tensor, sizes: Tensor, width: int) -> Tensor:
    """(N, L + 1, D) with ``sizes`` (N, 6) beside the pooled text of ``width`` in the last row; D >= width + 6."""
    packed = packed.clone()
    packed[:, -1, width : width + _SIZES] = sizes.to(packed)
    return packed


def pooled_width(config: Any) -> int:
    """P of a UNet's config; 0 for families without a pooled text."""
    if config.get("addition_embed_type") != "text_time":
        return 0
    return int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])


def hook_into(unet: UNet2DConditionModel, vae_scale_factor: int) -> None:
    """Let an SDXL UNet take the packed text alone; calls with ``added_cond_kwargs`` stay as they are."""
    if pooled_width(unet.config):
        unet.register_forward_pre_hook(partial(_add, scale=vae_scale_factor), with_kwargs=True)


def _add(
    unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any], scale: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if kwargs.get("added_cond_kwargs") is not None:
        return None
    sample = args[0] if args else kwargs["sample"]
    packed = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
    text, pooled = unpack(packed, pooled_width(unet.config))
    height, width = (side * scale for side in sample.shape[2:])
    own = torch.tensor([[height, width, 0, 0, height, width]], dtype=pooled.dtype, device=pooled.device)
    given = packed[:, -1, pooled.shape[1] : pooled.shape[1] + _SIZES]
    sizes = torch.where(given.any(dim=1, keepdim=True), given, own) if given.shape[1] == _SIZES else own
    added = {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
    if len(args) > 2:
        return (*args[:2], text, *args[3:]), {**kwargs, "added_cond_kwargs": added}
    return args, {**kwargs, "encoder_hidden_states": text, "added_cond_kwargs": added}
