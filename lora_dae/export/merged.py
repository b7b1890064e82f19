"""A whole model with the adapter inside: a diffusers folder, or one file for ComfyUI, A1111 and Forge."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from lora_dae.adapter.atomic import atomic, save_tensors
from lora_dae.adapter.files import merge_in_place
from lora_dae.adapter.source_input import get_source_input
from lora_dae.adapter.weights import DTYPES
from lora_dae.backbone.single_file import to_single_file
from lora_dae.config import ConfigError
from lora_dae.sampling.load import LoadedRun

FOLDER, FILE = "merged", "merged.safetensors"


def write_merged_folder(run: LoadedRun, folder: Path, dtype: str) -> Path:
    """``merged/``: the backbone's pipeline folder with the UNet replaced. Merges ``run``'s UNet in place.

    With a source input the UNet takes twice the channels, as InstructPix2Pix' does, and the index names that
    pipeline.
    """
    backbone = run.backbone
    has_source = get_source_input(backbone.unet) is not None
    merge_in_place(backbone.unet)
    target = folder / FOLDER
    with atomic(target) as partial:
        partial.mkdir()
        for part, model in (("unet", backbone.unet), ("vae", backbone.vae), ("text_encoder", backbone.text_encoder)):
            _cast(model, dtype).save_pretrained(partial / part)  # type: ignore[operator]
        backbone.tokenizer.save_pretrained(partial / "tokenizer")
        backbone.scheduler.save_pretrained(partial / "scheduler")
        pipeline = "StableDiffusionInstructPix2PixPipeline" if has_source else "StableDiffusionPipeline"
        index = {
            "_class_name": pipeline,
            "feature_extractor": [None, None],
            "safety_checker": [None, None],
            "requires_safety_checker": False,
            "scheduler": ["diffusers", type(backbone.scheduler).__name__],
            "text_encoder": ["transformers", type(backbone.text_encoder).__name__],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", type(backbone.vae).__name__],
        }
        (partial / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return target


def write_merged_file(run: LoadedRun, folder: Path, dtype: str, family: str) -> Path:
    """``merged.safetensors`` in the CompVis/SGM layout. Merges ``run``'s UNet in place.

    Raises ConfigError for an AutoencoderTiny, which that layout has no place for.
    """
    backbone = run.backbone
    if type(backbone.vae).__name__ != "AutoencoderKL":
        raise ConfigError(
            f"a single file has no place for the {type(backbone.vae).__name__} of this backbone: use format=merged."
        )
    merge_in_place(backbone.unet)
    tensors = to_single_file(backbone.unet, backbone.vae, backbone.text_encoder, None, family)
    tensors = {
        name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    return save_tensors(tensors, folder / FILE, {"format": "pt"})


def _cast(model: nn.Module, dtype: str) -> nn.Module:
    return model.to(DTYPES[dtype], memory_format=torch.contiguous_format)  # type: ignore[call-overload]
