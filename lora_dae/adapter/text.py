"""LoRA on the text encoders: the target group ``text_encoder``.

It means what kohya's sd-scripts trains (``CLIPAttention`` and ``CLIPMLP``): q, k, v, out, fc1 and fc2 of every layer,
at the network's rank. In files the layers' names begin with ``text_model.``, as all tools write them; transformers 5
dropped that from CLIPTextModel, so it goes and comes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from lora_dae.adapter.fused import fuse
from lora_dae.config import AdapterConfig, ConfigError

ADAPTER_NAME = "default"
COMPONENTS = ("text_encoder", "text_encoder_2")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_PREFIX = "text_model."


def text_layers(encoder: Any) -> list[str]:
    """Names of the linears that ``text_encoder`` means, in the encoder's order; on a plain or injected encoder."""
    return [
        name
        for name, module in encoder.named_modules()
        if name.split(".")[-1] in _PROJECTIONS and isinstance(getattr(module, "base_layer", module), nn.Linear)
    ]


def inject_text(encoders: Mapping[str, Any], cfg: AdapterConfig) -> None:
    """Add float32 LoRA layers to each encoder (by component); what they add trains, the rest stays frozen.

    SDXL reads the last but one layer of its first encoder, so the last one's adapter has no effect: it is there, as in
    kohya's files, and stays frozen at zero. Raises ConfigError for a rank above the width.
    """
    for component, encoder in encoders.items():
        layers = text_layers(encoder)
        width = min(min(encoder.get_submodule(name).weight.shape) for name in layers)
        if cfg.rank > width:
            raise ConfigError(
                f"adapter.rank is {cfg.rank}, but the {component} is only {width} wide: set adapter.rank to at most "
                f"{width} or remove 'text_encoder' from adapter.targets."
            )
        alpha = float(cfg.rank if cfg.alpha is None else cfg.alpha)
        config = LoraConfig(
            r=cfg.rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            target_modules=layers,
            lora_dropout=cfg.dropout,
            init_lora_weights={"kaiming": True, "gaussian": "gaussian"}[cfg.init],  # type: ignore[arg-type]
            use_dora=cfg.use_dora,
            use_rslora=cfg.use_rslora,
        )
        inject_adapter_in_model(config, encoder, ADAPTER_NAME)
        idle = _idle_layer(encoder) if len(encoders) > 1 and component == "text_encoder" else None
        encoder.requires_grad_(False)
        for name, parameter in encoder.named_parameters():
            if ".lora_" in name and (idle is None or idle not in name):
                parameter.data = parameter.data.to(torch.float32)
                parameter.requires_grad_(True)
        if cfg.kernel == "fused":
            fuse(encoder)
        encoder.train()


def has_adapter(encoder: Any) -> bool:
    """Whether the encoder carries our adapter."""
    return ADAPTER_NAME in getattr(encoder, "peft_config", {})


def text_state(encoders: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, PEFT's configuration) of every injected encoder, named as in files."""
    tensors: dict[str, Tensor] = {}
    configuration: dict[str, Any] = {}
    for component, encoder in encoders.items():
        if not has_adapter(encoder):
            continue
        state = get_peft_model_state_dict(encoder, adapter_name=ADAPTER_NAME)
        tensors |= {f"{component}.{file_name(key)}": value for key, value in state.items()}
        values = encoder.peft_config[ADAPTER_NAME].to_dict()
        # Without "text_model.", names are found at the end of those of older transformers as well.
        values["target_modules"] = sorted({model_name(key).split(".lora_")[0] for key in state})
        values["lora_dropout"] = 0.0
        configuration |= {f"{component}.{k}": sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    return tensors, configuration


def load_text(encoder: Any, weights: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> None:
    """Put weights named as in files (without component) into a plain encoder; everything is frozen afterwards."""
    inject_adapter_in_model(LoraConfig(**configuration), encoder, ADAPTER_NAME)
    own = {own_name(encoder, key): value for key, value in weights.items()}
    result: Any = set_peft_model_state_dict(encoder, own, ADAPTER_NAME)
    assert not result.unexpected_keys, result.unexpected_keys  # checked by the caller
    fuse(encoder)
    encoder.requires_grad_(False)


def merge_text(encoder: Any) -> None:
    """Add the adapter into the encoder's weights, in place. Raises ValueError (PEFT) if one is not finite."""
    if not has_adapter(encoder):
        return
    for module in list(encoder.modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
    recurse_remove_peft_layers(encoder)
    del encoder.peft_config


def file_name(name: str) -> str:
    """A module's or tensor's name as files have it.

    PEFT leaves ``.weight`` off DoRA's magnitudes and takes them with it too; transformers 5 finds them only so.
    """
    name = f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name
    return name if name.startswith((_PREFIX, "text_projection")) else _PREFIX + name


def model_name(name: str) -> str:
    """Without ``text_model.``: the same for every version of transformers."""
    return name.removeprefix(_PREFIX)


def own_name(encoder: Any, name: str) -> str:
    """A file's name as this encoder has it."""
    return file_name(name) if hasattr(encoder, "text_model") else model_name(name)


def _idle_layer(encoder: Any) -> str:
    """What is in the names of the last layer's parameters."""
    return f"encoder.layers.{encoder.config.num_hidden_layers - 1}."
