"""Between LoraWeights and the layout of diffusers: PEFT's state dict with its configuration in the header.

Keys are ``<component>.<module>.lora_A.weight`` with ``unet``, ``text_encoder`` or ``text_encoder_2`` as the
component. Files of others are read too: ``.lora.down.weight`` names, and no configuration (alpha = rank).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key
from torch import Tensor

from lora_dae.adapter.text import model_name
from lora_dae.adapter.weights import LoraWeights
from lora_dae.config import ConfigError

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
# Of PEFT's settings those that say what a layer computes. diffusers hands LoraConfig all that a header has, and a PEFT
# that is older than the file refuses names that it does not know.
SETTINGS = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "lora_dropout", "use_dora", "use_rslora",
)  # fmt: skip


def from_peft(tensors: Mapping[str, Tensor], header: Mapping[str, str], where: str) -> dict[str, LoraWeights]:
    """Layers by ``<component>.<module>``; ConfigError if a key is not of this layout or a layer is incomplete."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, part = _split(key, where)
        parts.setdefault(layer, {})[part] = tensor
    settings: dict[str, dict[str, Any]] = {}  # a component that the header does not know has alpha = rank
    for key, value in read_configuration(header, where).items():
        component, _, name = key.partition(".")
        settings.setdefault(component, {})[name] = value
    layers = {}
    for name, found in parts.items():
        if "down" not in found or "up" not in found:
            raise ConfigError(f"{where} holds one half of {name} only: it is incomplete, get it anew.")
        component, _, module = name.partition(".")
        magnitude = found.get("magnitude")
        layers[name] = LoraWeights(
            found["down"],
            found["up"],
            _alpha(settings.get(component), module, found["down"].shape[0]),
            None if magnitude is None else magnitude.flatten(),
        )
    return layers


def to_peft(layers: Mapping[str, LoraWeights]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) that ``load_lora_weights`` of diffusers reads at the right scale."""
    tensors: dict[str, Tensor] = {}
    configuration: dict[str, Any] = {}
    for component in COMPONENTS:
        own = {name.removeprefix(f"{component}."): v for name, v in layers.items() if name.startswith(f"{component}.")}
        if not own:
            continue
        for module, layer in own.items():
            tensors[f"{component}.{module}.lora_A.weight"] = layer.down
            tensors[f"{component}.{module}.lora_B.weight"] = layer.up
            if layer.magnitude is not None:
                shape = (1, -1, 1, 1) if layer.down.ndim == 4 else (-1,)
                end = "lora_magnitude_vector" + ("" if component == "unet" else ".weight")  # see text.file_name
                tensors[f"{component}.{module}.{end}"] = layer.magnitude.reshape(shape)
        start = "^" if component == "unet" else ""
        configuration |= {f"{component}.{key}": value for key, value in _configuration(own, start).items()}
    return tensors, {"format": "pt", LORA_ADAPTER_METADATA_KEY: written_configuration(configuration)}


def written_configuration(configuration: Mapping[str, Any]) -> str:
    """What a header says of PEFT's settings, given all of them by ``<component>.<setting>``."""
    kept = {key: value for key, value in configuration.items() if key.partition(".")[2] in SETTINGS}
    return json.dumps(kept, sort_keys=True)


def is_peft(keys: list[str]) -> bool:
    """Whether the file's keys are of this layout (diffusers), as opposed to kohya's."""
    return bool(keys) and all(key.split(".")[0] in COMPONENTS for key in keys)


def _configuration(layers: Mapping[str, LoraWeights], start: str) -> dict[str, Any]:
    """PEFT's for these layers. A text encoder's names lose ``text_model.``: their ends (patterns without ``start``) are
    what the encoders of transformers 4 and 5 have in common.
    """
    layers = {model_name(name): layer for name, layer in layers.items()}
    dora = {layer.magnitude is not None for layer in layers.values()}
    if len(dora) > 1:
        raise ConfigError("some layers have a DoRA magnitude and others have none, which PEFT cannot express.")
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    exact = {name: start + re.escape(name) for name in layers}  # PEFT matches patterns at the end of names
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "rank_pattern": {exact[name]: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {exact[name]: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "lora_dropout": 0.0,
        "use_dora": dora == {True},
        "use_rslora": False,  # LoraWeights' alpha has its square root in it
    }


def read_configuration(header: Mapping[str, str], where: str) -> dict[str, Any]:
    """PEFT's settings in the header, {} without any; ConfigError if they are damaged."""
    try:
        return dict(json.loads(header.get(LORA_ADAPTER_METADATA_KEY, "{}")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the header of {where} is damaged: get it anew, or export it again.") from error


def _alpha(settings: dict[str, Any] | None, module: str, rank: int) -> float:
    if settings is None:
        return float(rank)
    pattern = settings.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), module)) or settings.get("lora_alpha", rank))
    return alpha * rank**0.5 if settings.get("use_rslora") else alpha  # alpha / sqrt(r) = (alpha * sqrt(r)) / r


def _split(key: str, where: str) -> tuple[str, str]:
    """(``<component>.<module>``, down | up | magnitude) of a key."""
    for end in (".lora_magnitude_vector", ".lora_magnitude_vector.weight"):
        if key.endswith(end):
            return key.removesuffix(end), "magnitude"
    for end, part in (
        (".lora_A.weight", "down"), (".lora_B.weight", "up"), (".lora.down.weight", "down"),
        (".lora.up.weight", "up"), (".lora_linear_layer.down.weight", "down"), (".lora_linear_layer.up.weight", "up"),
    ):  # fmt: skip
        if key.endswith(end):
            return key.removesuffix(end), part
    old = re.match(r"(.+?)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$", key)
    if old is not None:
        layer, projection, part = old.groups()
        return f"{layer}.{'to_out.0' if projection == 'to_out' else projection}", part
    raise ConfigError(f"{where} holds {key}, which is no LoRA weight that this program knows.")
