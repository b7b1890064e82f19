"""Which Stable Diffusion a model is, from the shapes of its weights: a file's name says nothing.

sd1   transformer blocks enter through a 1x1 convolution (``proj_in`` has four dimensions)
sd2   they enter through a linear layer (two dimensions)
sdxl  as sd2, and an embedding of pooled text and sizes is added (``add_embedding``, SGM's ``label_emb``)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError

FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_TEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
Shapes = Mapping[str, Sequence[int]]


def unet_family(shapes: Shapes) -> str:
    """sd1, sd2 or sdxl, by the shapes of a UNet's weights in diffusers' or the SGM layout.

    Raises ConfigError for weights without transformer blocks.
    """
    if any(name.startswith("add_embedding.") or "label_emb." in name for name in shapes):
        return "sdxl"
    for name, shape in shapes.items():
        if name.endswith("proj_in.weight"):
            return "sd1" if len(shape) == 4 else "sd2"
    raise ConfigError("these weights are no Stable Diffusion UNet: they have no transformer blocks.")


def family_of_width(text_features: int) -> str:
    """For messages: the family whose UNet attends to so many text features, in words."""
    family = _TEXT_WIDTHS.get(text_features)
    return f"{text_features} text features" + ("" if family is None else f", as {FAMILIES[family]} does")


def read_shapes(file: Path) -> dict[str, list[int]]:
    """{tensor: shape} from a safetensors header; reads no weights.

    Raises ConfigError if the file is truncated or is not safetensors.
    """
    return {name: list(entry["shape"]) for name, entry in _header(file).items() if name != "__metadata__"}


def _header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = stream.read(length) if length <= min(size - 8, 100_000_000) else b""
    try:
        header = json.loads(text)
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a readable safetensors file: get it anew.") from error
    if 8 + length + end != size:
        raise ConfigError(
            f"{file} has {size} bytes but its header promises {8 + length + end}: it is cut off, get it anew."
        )
    return dict(header)
