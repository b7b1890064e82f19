"""A whole model with the adapter inside: a diffusers folder, or one file for ComfyUI, A1111 and Forge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lora_dae.adapter.atomic import atomic, save_tensors
from lora_dae.adapter.files import merge_in_place
from lora_dae.adapter.source_input import get_source_input
from lora_dae.adapter.text import file_name
from lora_dae.adapter.weights import DTYPES
from lora_dae.backbone.load import Backbone
from lora_dae.backbone.single_file import to_single_file
from lora_dae.config import ConfigError
from lora_dae.sampling.load import LoadedRun

FOLDER, FILE = "merged", "merged.safetensors"


def write_merged_folder(run: LoadedRun, folder: Path, dtype: str) -> Path:
    """``merged/``: the backbone's pipeline folder with the adapter in its weights. Merges ``run``'s models in place.

    With a source input the UNet takes twice the channels, as InstructPix2Pix' does, and the index names that
    pipeline. It shows the source's latents as the VAE gives them; ours are scaled, so the scale goes into the weights.
    """
    backbone = run.backbone
    # Full fine-tuning has the channels in the UNet itself.
    doubled = backbone.unet.config["in_channels"] == 2 * backbone.latent_channels
    has_source = doubled or get_source_input(backbone.unet) is not None
    merge_in_place(backbone.unet, backbone.text_encoders)
    if has_source:
        with torch.no_grad():
            scale = float(backbone.vae.config["scaling_factor"])
            backbone.unet.conv_in.weight[:, backbone.latent_channels :].mul_(scale)
    parts: dict[str, Any] = {
        "unet": backbone.unet,
        "vae": backbone.vae,
        "text_encoder": backbone.text_encoder,
        "text_encoder_2": backbone.text_encoder_2,
        "tokenizer": backbone.tokenizer,
        "tokenizer_2": backbone.tokenizer_2,
        "scheduler": _scheduler(backbone),
    }
    name = "StableDiffusionXL" if backbone.text_encoder_2 is not None else "StableDiffusion"
    index: dict[str, Any] = {
        "_class_name": f"{name}{'InstructPix2Pix' if has_source else ''}Pipeline",
        "_diffusers_version": diffusers.__version__,
    }
    if backbone.text_encoder_2 is None:
        index |= {"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
    else:
        index["force_zeros_for_empty_prompt"] = backbone.folder.zeros_for_empty
    target = folder / FOLDER
    with atomic(target) as partial:
        partial.mkdir()
        for part, value in parts.items():
            if value is None:
                continue
            if isinstance(value, nn.Module):
                value = value.to(DTYPES[dtype], memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            named: dict[str, Any] = {}
            if part == "text_encoder":  # transformers 5 writes the names that others read only if it has read such ones
                named["state_dict"] = {file_name(name): tensor for name, tensor in value.state_dict().items()}
            value.save_pretrained(partial / part, **named)
            if part.startswith("tokenizer"):  # transformers 4 needs vocab.json and merges.txt, which 5 does not write
                value.backend_tokenizer.model.save(str(partial / part))
            index[part] = [type(value).__module__.split(".")[0], type(value).__name__]
        (partial / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return target


def _scheduler(backbone: Backbone) -> Any:
    """The backbone's own, so that the folder draws as it; the one of training where that was told other numbers."""
    folder, trained = backbone.folder, backbone.scheduler.config
    own = getattr(diffusers, folder.scheduler_class).from_pretrained(folder.path / "scheduler")
    zero_snr = bool(own.config.get("rescale_betas_zero_snr")) == bool(trained.get("rescale_betas_zero_snr"))
    return own if zero_snr and own.config.prediction_type == trained.prediction_type else backbone.scheduler


def write_merged_file(run: LoadedRun, folder: Path, dtype: str, family: str) -> Path:
    """``merged.safetensors`` in the CompVis/SGM layout. Merges ``run``'s models in place.

    Empty tensors ``v_pred`` and ``ztsnr`` tell ComfyUI, Forge and us of a model that predicts v, as such files have it.

    Raises ConfigError for an AutoencoderTiny, which that layout has no place for.
    """
    backbone = run.backbone
    if type(backbone.vae).__name__ != "AutoencoderKL":
        raise ConfigError(
            f"a single file has no place for the {type(backbone.vae).__name__} of this backbone: use format=merged."
        )
    merge_in_place(backbone.unet, backbone.text_encoders)
    tensors = to_single_file(backbone.unet, backbone.vae, backbone.text_encoder, backbone.text_encoder_2, family)
    if backbone.prediction_type == "v_prediction":
        tensors["v_pred"] = torch.zeros(0)
        if backbone.scheduler.config.get("rescale_betas_zero_snr"):
            tensors["ztsnr"] = torch.zeros(0)
    tensors = {
        name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    return save_tensors(tensors, folder / FILE, {"format": "pt"})
