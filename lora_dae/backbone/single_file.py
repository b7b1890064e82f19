"""A whole Stable Diffusion in one file, in the layout of CompVis (SD 1.x, 2.x) and SGM (SDXL).

diffusers reads such files (``from_single_file``); this is the way there, for ComfyUI, A1111 and Forge.

    model.diffusion_model.*         UNet (names.py)
    first_stage_model.*             VAE
    cond_stage_model.*              SD 1.x: CLIP as transformers has it; SD 2.x: OpenCLIP, with q, k, v in one matrix
    conditioner.embedders.0, .1     SDXL: one of each
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_dae.backbone.names import sgm_name

_CLIP = {"sd1": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
_OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
_OPEN_CLIP_NAMES = (
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", "transformer.resblocks."),
    (".self_attn.", ".attn."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_VAE_NAMES = (
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def to_single_file(
    unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, text_encoder_2: nn.Module | None, family: str
) -> dict[str, Tensor]:
    """Every tensor by its name in the single file; ``family`` is sd1, sd2 or sdxl (family.py).

    Tensors are those of the models (no copies, except where OpenCLIP's q, k, v are joined).
    """
    tensors = unet_tensors(unet.state_dict(), unet.config)  # type: ignore[arg-type]
    tensors |= vae_tensors(vae.state_dict())
    if family == "sd2":
        return tensors | open_clip_tensors(text_encoder.state_dict(), _OPEN_CLIP[family])
    tensors |= clip_tensors(text_encoder.state_dict(), _CLIP[family])
    if text_encoder_2 is not None:
        tensors |= open_clip_tensors(text_encoder_2.state_dict(), _OPEN_CLIP[family])
    return tensors


def unet_tensors(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """``model.diffusion_model.*`` of a UNet's state dict."""
    out = {}
    for key, tensor in state.items():
        module, _, parameter = key.rpartition(".")
        out[f"model.diffusion_model.{sgm_name(module, config)}.{parameter}"] = tensor
    return out


def vae_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``first_stage_model.*`` of an AutoencoderKL's state dict; its decoder's blocks count from the other end."""
    last = max(int(m.group(1)) for key in state if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", key)))
    out = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _VAE_NAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(
            r"\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.",
            lambda m: f".up.{last - int(m.group(1))}.{'block' if m.group(2) == 'resnets' else 'upsample'}.",
            name,
        )
        is_projection = ".mid.attn_1." in name and tensor.ndim == 2
        out[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_projection else tensor
    return out


def clip_tensors(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIPTextModel's state dict under the file's prefix."""
    return {prefix + key.removeprefix("text_model."): value for key, value in state.items()}


def open_clip_tensors(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A CLIP text model's state dict as OpenCLIP names it: q, k and v joined, the projection transposed."""
    out: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name = key.removeprefix("text_model.")
        if name == "text_projection.weight":
            out[prefix + "text_projection"] = tensor.T
            continue
        projection = re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)$", name)
        if projection is not None:
            layer, which, parameter = projection.groups()
            joined.setdefault(f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{parameter}", {})[which] = tensor
            continue
        for old, new in _OPEN_CLIP_NAMES:
            name = name.replace(old, new)
        out[prefix + name] = tensor
    return out | {name: torch.cat([parts[which] for which in "qkv"]) for name, parts in joined.items()}
