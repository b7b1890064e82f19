"""Tiny random backbones of every family, as diffusers folders and as single files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from adapter_models import FAMILIES
from conftest import TOKEN_LENGTH, write_tokenizer
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.single_file import to_single_file
from lora_dae.config import BackboneConfig

WIDTHS = {"sd15": (16,), "sd21": (16,), "sdxl": (8, 16)}  # of the text encoders
PROJECTION = 16  # of SDXL's pooled text
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def write_backbone(path: Path, family: str, prediction_type: str = "epsilon") -> Path:
    """32x32 images, 4 latent channels of 16x16; SD 1.5 with PNDM, SD 2.1 with DDIM, SDXL with Euler, as published."""
    torch.manual_seed(0)
    path.mkdir(parents=True)
    for number, width in enumerate(WIDTHS[family]):
        suffix = "" if number == 0 else "_2"
        write_tokenizer(path / f"tokenizer{suffix}")
        tokenizer = CLIPTokenizer.from_pretrained(path / f"tokenizer{suffix}")
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKEN_LENGTH,
            projection_dim=PROJECTION,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = CLIPTextModelWithProjection if suffix else CLIPTextModel
        model(config).save_pretrained(path / f"text_encoder{suffix}")
    AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    ).save_pretrained(path / "vae")
    text = {"cross_attention_dim": sum(WIDTHS[family])}
    if family == "sdxl":
        text["projection_class_embeddings_input_dim"] = 6 * 8 + PROJECTION
    UNet2DConditionModel(**{**FAMILIES[family], **text}).save_pretrained(path / "unet")
    scheduler = {
        "sd15": PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type),
        "sd21": DDIMScheduler(**_BETAS, clip_sample=False, steps_offset=1, prediction_type=prediction_type),
        "sdxl": EulerDiscreteScheduler(**_BETAS, steps_offset=1, prediction_type=prediction_type),
    }[family]
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_diffusers_version": diffusers.__version__,
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if family == "sdxl":
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,  # type: ignore[dict-item]
        }
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}  # type: ignore[dict-item]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def write_single_file(file: Path, folder: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """The same weights in the CompVis/SGM layout."""
    backbone = load_backbone(BackboneConfig(path=str(folder)))
    tensors = to_single_file(
        backbone.unet, backbone.vae, backbone.text_encoder, backbone.text_encoder_2, backbone.folder.family
    )
    save_file({k: v.contiguous() for k, v in tensors.items()} | (extra or {}), file)
    return file


ENCODERS = ("text_encoder", "text_encoder_2")


def pipeline(folder: Path) -> Any:
    """Plain diffusers' pipeline of a folder that ``write_backbone`` wrote."""
    cls = StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encoders(pipe: Any) -> dict[str, Any]:
    """Its text encoders by name."""
    return {name: getattr(pipe, name) for name in ENCODERS if getattr(pipe, name, None) is not None}
