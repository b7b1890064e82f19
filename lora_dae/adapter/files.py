"""Adapter files: save, load, merge.

The file is PEFT's raw state dict (``unet.<layer>.lora_A.weight``, ``text_encoder.text_model.<layer>.lora_A.weight``)
with the adapter's configuration in the safetensors header, which plain ``pipe.load_lora_weights(folder)`` of diffusers
reads. Two roads that look shorter lose weights silently: ``convert_state_dict_to_diffusers`` renames attention layers
only, after which the loader (it looks at the first key alone) drops either them or the convolutions; and without the
header alpha falls back to the rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from lora_dae.adapter.atomic import atomic, load_tensors, save_tensors
from lora_dae.adapter.fused import fuse
from lora_dae.adapter.inject import ADAPTER_NAME, is_injected
from lora_dae.adapter.kohya import KOHYA_FILE
from lora_dae.adapter.peft_layout import read_configuration, written_configuration
from lora_dae.adapter.source_input import SourceInput, detach_source_input
from lora_dae.adapter.targets import base_layer
from lora_dae.adapter.text import COMPONENTS, load_text, merge_text, own_name, text_state
from lora_dae.backbone.family import family_of_width
from lora_dae.backbone.int8 import is_int8
from lora_dae.config import ConfigError

FILE_NAME = LORA_WEIGHT_NAME_SAFE  # pytorch_lora_weights.safetensors: what diffusers looks for in a folder
_PREFIX = "unet."


def trained_megabytes(folder: str | Path) -> float:
    """All that was trained, 10^6 bytes, as it lies in the adapter's ``folder``.

    Not kohya's file, a copy of the LoRA, nor what a killed process left half written (names that begin with a dot).
    """
    files = [file for file in Path(folder).rglob("*.safetensors") if file.name != KOHYA_FILE]
    whole = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return sum(file.stat().st_size for file in whole) / 1e6


def save_adapter(
    unet: UNet2DConditionModel,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    encoders: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Write the LoRA weights to ``path`` (or FILE_NAME in it, if it is a folder); returns the file.

    Those of the UNet, and of such text ``encoders`` (by component) as carry an adapter. ``metadata`` goes into the
    header beside the adapter's configuration. Raises ConfigError if the UNet has no adapter.
    """
    if not is_injected(unet):
        raise ConfigError("The UNet carries no adapter to save; a fully fine-tuned UNet is saved by save_merged.")
    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME)
    text, text_configuration = text_state(encoders or {})
    header = {
        **(metadata or {}),
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: written_configuration({**_configuration(unet, state), **text_configuration}),
    }
    return save_tensors({**{_PREFIX + key: value for key, value in state.items()}, **text}, _file(path), header)


def load_adapter(
    unet: UNet2DConditionModel, path: str | Path, encoders: Mapping[str, nn.Module] | None = None
) -> dict[str, str]:
    """Load a file of save_adapter (or a folder with one) into plain models; returns its metadata.

    Everything is frozen afterwards. Raises ConfigError if the file is missing, is no LoRA file of this
    layout, has weights of a text encoder that is not among ``encoders``, or belongs to another backbone.
    """
    file = _file(path)
    if is_injected(unet):
        raise ConfigError(f"The UNet already carries an adapter; load {file} into a fresh backbone.")
    weights, header = _read(file)
    encoders = encoders or {}
    _check(unet, file, weights, encoders)
    configuration = _checked_configuration(file, weights, header)
    unet.load_lora_adapter(weights, prefix="unet", adapter_name=ADAPTER_NAME, metadata=configuration)
    if unet.dtype != torch.float32:  # diffusers rounds what it loads to the model's type: training does not
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.to(torch.float32)
        set_peft_model_state_dict(unet, _part(weights, "unet"), adapter_name=ADAPTER_NAME)
    fuse(unet)
    unet.requires_grad_(False)
    for component, encoder in encoders.items():
        own = _part(weights, component)
        if own:
            load_text(encoder, own, _part(configuration, component))
    return {key: value for key, value in header.items() if key not in ("format", LORA_ADAPTER_METADATA_KEY)}


def check_adapter(unet: UNet2DConditionModel, path: str | Path, encoders: Mapping[str, nn.Module]) -> None:
    """Raises ConfigError unless every weight of the file fits a layer of the models; loads nothing into them."""
    file = _file(path)
    weights, header = _read(file)
    _check(unet, file, weights, encoders)
    _checked_configuration(file, weights, header)


def merged_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain copy of the UNet with the adapter added into its weights; the UNet itself stays as it is.

    With a source input the copy's conv_in takes 2C channels ([x_t, source], as InstructPix2Pix' UNet does)
    and its ``config.in_channels`` says so. Raises ValueError (PEFT) if a merged weight is not finite.
    """
    merged = copy.deepcopy(unet)
    merge_in_place(merged)
    return merged


def merge_in_place(unet: UNet2DConditionModel, encoders: Mapping[str, nn.Module] | None = None) -> None:
    """What merged_unet does, without a second copy in memory; text ``encoders`` are merged alike.

    Raises ValueError for weights in int8, which have no room for what is added.
    """
    if any(is_int8(module) for module in unet.modules()):
        raise ValueError("the UNet's weights are in int8: load it with weights=fp32 to merge an adapter into it")
    for encoder in (encoders or {}).values():
        merge_text(encoder)
    source_input = detach_source_input(unet)
    if is_injected(unet):
        unet.fuse_lora(safe_fusing=True)
        unet.unload_lora()
    if source_input is not None:
        _widen_conv_in(unet, source_input)
    unet.requires_grad_(False)


def save_merged(unet: UNet2DConditionModel, folder: str | Path) -> Path:
    """Write merged_unet(unet) as a UNet folder of plain diffusers, atomically; saves a full fine-tuning too."""
    merged = merged_unet(unet)
    with atomic(folder) as partial:
        merged.save_pretrained(partial)
    return Path(folder)


def _widen_conv_in(unet: UNet2DConditionModel, source_input: SourceInput) -> None:
    conv_in = unet.conv_in
    source_weight = source_input.conv.weight.to(conv_in.weight.dtype)
    conv_in.weight = nn.Parameter(torch.cat([conv_in.weight, source_weight], dim=1))
    conv_in.in_channels = conv_in.weight.shape[1]
    unet.register_to_config(in_channels=conv_in.in_channels)


def _configuration(unet: UNet2DConditionModel, state: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's configuration under the UNet's prefix, as diffusers is to read it back."""
    values = unet.peft_config[ADAPTER_NAME].to_dict()
    values["target_modules"] = sorted({_layer_of(key) for key in state})  # PEFT may have shortened the names
    # diffusers never puts the layers that it adds into eval mode, so a plain pipeline would draw with dropout
    values["lora_dropout"] = 0.0
    return {_PREFIX + key: value for key, value in values.items()}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not file.is_file():
        raise ConfigError(f"There is no adapter at {file}; give a run's adapter folder or its {FILE_NAME}.")
    weights, header = load_tensors(file, f"give a run's {FILE_NAME}")
    if not any("lora" in key for key in weights):
        raise ConfigError(f"{file} holds no LoRA weights; give a run's {FILE_NAME}.")
    is_raw = all(key.split(".")[0] in ("unet", *COMPONENTS) and ".lora_" in key for key in weights)
    if not is_raw or LORA_ADAPTER_METADATA_KEY not in header:
        raise ConfigError(
            f"{file} is a LoRA file of another layout; this project reads its own, others load with "
            "pipe.load_lora_weights of diffusers."
        )
    return weights, header


def _check(
    unet: UNet2DConditionModel, file: Path, weights: dict[str, Tensor], encoders: Mapping[str, nn.Module]
) -> None:
    """Every weight must be finite, fit its layer and have its other half: diffusers would warn at most, and go on."""
    modules = {component: dict(model.named_modules()) for component, model in {"unet": unet, **encoders}.items()}
    for key, tensor in weights.items():
        component, _, rest = key.partition(".")
        name = _layer_of(rest)
        if component in encoders:
            name = own_name(encoders[component], name)
        if name not in modules.get(component, {}):
            where = name if component == "unet" else f"{name} of the {component}"
            raise ConfigError(
                f"The adapter in {file} adapts {where}, which this backbone does not have; load the backbone "
                "that it was trained on."
            )
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"The adapter in {file} is not finite at {name}: it is damaged, or training diverged.")
        weight = base_layer(modules[component][name]).weight
        assert isinstance(weight, Tensor)
        fits = True
        if ".lora_A." in key:
            fits = tensor.shape[1:] == weight.shape[1:]
        elif ".lora_B." in key:
            fits = tensor.shape[0] == weight.shape[0]
        if not fits and name.endswith("attn2.to_k") and ".lora_A." in key:
            raise ConfigError(
                f"The adapter in {file} does not fit this backbone: it attends to {family_of_width(tensor.shape[1])}, "
                f"the backbone to {family_of_width(weight.shape[1])}; load the backbone that it was trained on."
            )
        if not fits:
            raise ConfigError(
                f"The adapter in {file} does not fit {name} of this backbone (weight {tuple(weight.shape)}, "
                f"adapter {tuple(tensor.shape)}); load the backbone that it was trained on."
            )
        other = key.replace(".lora_A.", ".lora_B.") if ".lora_A." in key else key.replace(".lora_B.", ".lora_A.")
        if other not in weights:
            raise ConfigError(f"The adapter in {file} lacks {other}: it is incomplete, get it anew.")


def _checked_configuration(file: Path, weights: Mapping[str, Tensor], header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings in the header, which must describe a LoRA of the layers and ranks that the file has.

    Without those that this PEFT does not know and that are not in use: files once named all of their time's PEFT.
    """
    components = ("unet", *COMPONENTS)
    known = {f"{component}.{field.name}" for component in components for field in fields(LoraConfig)}
    configuration = {k: v for k, v in read_configuration(header, str(file)).items() if v or k in known}
    for component in components:
        own = _part(configuration, component)
        try:
            settings = LoraConfig(**own)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the header of {file} does not describe a LoRA ({error}): get it anew.") from error
        ranks = {_layer_of(k): len(t) for k, t in _part(weights, component).items() if ".lora_A." in k}
        named = own.get("target_modules")
        for name in named if isinstance(named, list) else []:  # PEFT takes a pattern too; we write none
            if name not in ranks and not any(layer.endswith(f".{name}") for layer in ranks):
                raise ConfigError(
                    f"The adapter in {file} holds nothing for {name} of the {component}, which its header names: it is "
                    "incomplete, get it anew."
                )
        pattern = own.get("rank_pattern") or {}
        for name, rank in ranks.items():
            told = pattern.get(get_pattern_key(list(pattern), name), settings.r)
            if rank != told:
                raise ConfigError(
                    f"The adapter in {file} has rank {rank} at {name} of the {component}, its header says {told}: get "
                    "it anew."
                )
    return configuration


def _part(values: Mapping[str, Any], component: str) -> dict[str, Any]:
    """What belongs to one component, without its prefix."""
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _layer_of(key: str) -> str:
    return key.split(".lora_")[0]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() or not path.suffix else path
