"""Module names of the UNet in the original CompVis/SGM layout, from those of diffusers.

Single-file checkpoints and kohya's SDXL files use it. With L = layers_per_block, block i and layer j:

    down_blocks.i.resnets.j         input_blocks.(1 + (L+1) i + j).0
    down_blocks.i.attentions.j      input_blocks.(1 + (L+1) i + j).1
    down_blocks.i.downsamplers.0    input_blocks.((L+1) (i+1)).0
    mid_block.resnets.j             middle_block.(0 or 2),  mid_block.attentions.0   middle_block.1
    up_blocks.i.resnets.j           output_blocks.((L+1) i + j).0
    up_blocks.i.attentions.j        output_blocks.((L+1) i + j).1
    up_blocks.i.upsamplers.0        output_blocks.((L+1) i + L).(2 after an attention, else 1)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_INSIDE_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down_blocks\.(\d+)|mid_block|up_blocks\.(\d+))\.(\w+?)\.(\d+)(?:\.(.*))?$")


def sgm_name(name: str, config: Mapping[str, Any]) -> str:
    """The SGM name of a diffusers UNet module: ``down_blocks.0.resnets.0.conv1`` is ``input_blocks.1.0.in_layers.2``.

    ``config`` is the UNet's: ``layers_per_block`` (an integer) and ``up_block_types`` count. Raises ValueError
    for a module that Stable Diffusion's layout does not have.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _BLOCK.match(name)
    if match is None:
        raise ValueError(f"{name} has no place in the CompVis layout")
    place, down, up, kind, layer, rest = match.groups()
    stride = int(config["layers_per_block"]) + 1
    inside = rest or ""
    if kind == "resnets":
        child, _, tail = inside.partition(".")
        inside = ".".join(part for part in (_INSIDE_RESNET.get(child, child), tail) if part)
    if down is not None:
        if kind == "downsamplers":
            base, inside = f"input_blocks.{stride * (int(down) + 1)}.0", inside.replace("conv", "op", 1)
        else:
            base = f"input_blocks.{1 + stride * int(down) + int(layer)}.{int(kind == 'attentions')}"
    elif up is not None:
        if kind == "upsamplers":
            attends = "Attn" in config["up_block_types"][int(up)]
            base = f"output_blocks.{stride * int(up) + stride - 1}.{2 if attends else 1}"
        else:
            base = f"output_blocks.{stride * int(up) + int(layer)}.{int(kind == 'attentions')}"
    else:
        assert place == "mid_block"
        base = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}"
    return f"{base}.{inside}" if inside else base
