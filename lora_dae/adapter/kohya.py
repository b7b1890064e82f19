"""The LoRA file that kohya's sd-scripts, A1111, Forge and ComfyUI read.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight   (rank, in)
                                                                        .lora_up.weight     (out, rank)
                                                                        .alpha              ()
                                                                        .dora_scale         (out, 1)

Names are those that kohya writes: of the diffusers UNet for SD 1.x and 2.x, of the SGM UNet for SDXL
(``lora_unet_input_blocks_4_1_...``); text encoders are ``lora_te_`` there, ``lora_te1_`` and ``lora_te2_`` here.
Every layer has its own alpha, so ranks and scales may be mixed. ``dora_scale`` holds row norms (LyCORIS'
``wd_on_output``). LyCORIS divides it by the row norms of W + dW, as PEFT does and training did; ComfyUI and Forge,
which tell it by its shape, by those of W, and so scale each row by |W + dW| / |W|: DoRA goes to them merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from lora_dae.adapter.weights import LoraWeights
from lora_dae.backbone.names import sgm_name
from lora_dae.config import ConfigError

KOHYA_FILE = "adapter_kohya.safetensors"
_ARCHITECTURES = {
    "sd1": ("sd_v1", "stable-diffusion-v1"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}


def to_kohya(layers: Mapping[str, LoraWeights], family: str, unet_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by kohya's names; ``layers`` are keyed by ``<component>.<module>``, ``family`` is sd1, sd2 or sdxl."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        base = kohya_name(name, family, unet_config)
        tensors[f"{base}.lora_down.weight"] = layer.down
        tensors[f"{base}.lora_up.weight"] = layer.up
        tensors[f"{base}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
        if layer.magnitude is not None:
            tensors[f"{base}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    return tensors


def from_kohya(tensors: Mapping[str, Tensor], names: Mapping[str, str], where: str) -> dict[str, LoraWeights]:
    """Layers by ``<component>.<module>``; what ``names`` (known_names) does not list keeps kohya's name.

    Without an alpha tensor alpha is the rank, as kohya has it. Raises ConfigError for LoHa, LoKr, Tucker and
    other kinds, DoRA along the input axis, and incomplete layers.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        base, _, part = key.partition(".")
        parts.setdefault(base, {})[part] = tensor
    layers = {}
    for base, found in parts.items():
        strange = sorted(set(found) - {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"})
        if strange:
            raise ConfigError(
                f"{where} holds {base}.{strange[0]}: only LoRA and DoRA are read, no LoHa, LoKr or Tucker."
            )
        if "lora_down.weight" not in found or "lora_up.weight" not in found:
            raise ConfigError(f"{where} holds one half of {base} only: it is incomplete, get it anew.")
        down, up = found["lora_down.weight"], found["lora_up.weight"]
        magnitude = found.get("dora_scale")
        if magnitude is not None and (magnitude.numel() != up.shape[0] or magnitude.shape[0] != up.shape[0]):
            raise ConfigError(
                f"{where} has DoRA norms of columns in {base}: only norms of rows (wd_on_output) are read."
            )
        layers[names.get(base, base)] = LoraWeights(
            down,
            up,
            float(found["alpha"]) if "alpha" in found else float(down.shape[0]),
            None if magnitude is None else magnitude.flatten(),
        )
    return layers


def kohya_name(name: str, family: str, unet_config: Mapping[str, Any]) -> str:
    """Kohya's name of ``<component>.<module>``."""
    component, _, module = name.partition(".")
    if component == "unet":
        return "lora_unet_" + (sgm_name(module, unet_config) if family == "sdxl" else module).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if family == "sdxl" else "lora_te_", "text_encoder_2": "lora_te2_"}[component]
    if not module.startswith(("text_model.", "text_projection")):
        module = f"text_model.{module}"
    return prefix + module.replace(".", "_")


def known_names(models: Mapping[str, nn.Module], family: str) -> dict[str, str]:
    """{kohya's name: ``<component>.<module>``} of every linear and convolution; ``models`` by component.

    For SDXL both kohya's SGM names and the diffusers names that some tools write are known.
    """
    names = {}
    for component, model in models.items():
        config: Any = model.config
        for module, layer in model.named_modules():
            base = getattr(layer, "base_layer", layer)
            if ".base_layer" in module or ".lora_" in module or not isinstance(base, nn.Linear | nn.Conv2d):
                continue
            name = f"{component}.{module}"
            names[kohya_name(name, "sd1", {})] = name
            if family == "sdxl":
                try:
                    names[kohya_name(name, family, config)] = name
                except ValueError:  # outside of what single files hold, so kohya has no name for it
                    continue
    return names


def kohya_metadata(
    layers: Mapping[str, LoraWeights],
    family: str,
    *,
    title: str,
    resolution: int,
    prediction_type: str = "epsilon",
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Header: kohya's ``ss_*`` keys and Stability's modelspec (1.0.0)."""
    base_version, architecture = _ARCHITECTURES[family]
    v_prediction = prediction_type == "v_prediction"
    if family == "sd2" and v_prediction:
        architecture = "stable-diffusion-v2-768-v"
    convs = {k: v for k, v in layers.items() if v.is_conv}
    rest = {k: v for k, v in layers.items() if not v.is_conv} or convs
    arguments = {"conv_dim": _common("rank", convs), "conv_alpha": _common("alpha", convs)} if convs else {}
    if any(layer.magnitude is not None for layer in layers.values()):
        arguments |= {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    return {
        "format": "pt",
        "ss_network_module": "lycoris.kohya" if "dora_wd" in arguments else "networks.lora",
        "ss_network_dim": _common("rank", rest),
        "ss_network_alpha": _common("alpha", rest),
        "ss_network_args": json.dumps(arguments),
        "ss_base_model_version": base_version,
        "ss_v2": str(family == "sd2"),
        "ss_v_parameterization": str(v_prediction),
        "ss_output_name": title,
        "ss_resolution": f"({resolution}, {resolution})",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if v_prediction else "epsilon",
        **(extra or {}),
    }


def _common(what: str, layers: Mapping[str, LoraWeights]) -> str:
    """The one value that all layers share, or kohya's word for mixed ones."""
    values = {getattr(layer, what) for layer in layers.values()}
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"
