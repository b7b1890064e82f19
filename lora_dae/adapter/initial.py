"""Start from somebody's LoRA: a kohya, A1111, ComfyUI or diffusers file put into freshly injected layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table

from lora_dae.adapter.atomic import load_tensors
from lora_dae.adapter.inject import ADAPTER_NAME
from lora_dae.adapter.kohya import from_kohya, known_names
from lora_dae.adapter.peft_layout import from_peft, is_peft
from lora_dae.adapter.targets import base_layer, group_layers
from lora_dae.adapter.text import own_name
from lora_dae.adapter.weights import LoraWeights, check_finite
from lora_dae.backbone.family import family_of_width, unet_family
from lora_dae.config import TARGET_GROUPS, ConfigError


def check_file(path: str | Path) -> Path:
    """The file, before any weight loads. Raises ConfigError if it is missing or a pickle."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"adapter.init_from={path} does not exist: give a LoRA file (.safetensors).")
    if file.suffix != ".safetensors":
        raise ConfigError(
            f"adapter.init_from={path} may be a pickle, which can run code when it is loaded: convert it to "
            "safetensors where it came from."
        )
    return file


def read_lora(
    path: str | Path, unet: UNet2DConditionModel, encoders: Mapping[str, Any] | None = None
) -> dict[str, LoraWeights]:
    """Layers by ``<component>.<module>``, as the models name them, of a LoRA file in kohya's or diffusers' layout.

    Names that the UNet and the text ``encoders`` do not have stay as the file has them. Raises ConfigError if the
    file is damaged, holds no LoRA, another kind of adapter, PEFT's own layout, or values that are not finite.
    """
    file = check_file(path)
    tensors, header = load_tensors(file, "it is damaged, get it anew")
    if not any("lora" in key for key in tensors):
        raise ConfigError(f"{file} holds no LoRA weights.")
    if is_peft(list(tensors)):
        layers = from_peft(tensors, header, str(file))
    else:
        bare = next((key for key in tensors if ".lora_A." in key), None)  # kohya's is lora_down
        if bare is not None:
            raise ConfigError(
                f"{file} is in PEFT's own layout ({bare} first, with no unet. or text_encoder. in front): save it with "
                "save_lora_weights of a diffusers pipeline."
            )
        family = unet_family({name: p.shape for name, p in unet.named_parameters()})
        layers = from_kohya(tensors, known_names({"unet": unet, **(encoders or {})}, family), str(file))
    check_finite(layers, str(file))
    for component, encoder in (encoders or {}).items():
        prefix = f"{component}."
        layers = {
            prefix + own_name(encoder, name.removeprefix(prefix)) if name.startswith(prefix) else name: layer
            for name, layer in layers.items()
        }
    return layers


@torch.no_grad()
def initialize(
    unet: UNet2DConditionModel,
    path: str | Path,
    allow_partial: bool = False,
    encoders: Mapping[str, Any] | None = None,
) -> str:
    """Copy a LoRA file into the injected layers of UNet and text ``encoders``; returns the table of what matched.

    The injected models then draw what the file draws: scales are worked into ``up``, and a file of lower rank
    fills the first rows, the others staying fresh. Raises ConfigError for a LoRA of another family, a rank
    above the injected one, DoRA on one side only, and (unless ``allow_partial``) for any layer of the file
    that is not trained here.
    """
    layers = read_lora(path, unet, encoders)
    models = {"unet": unet, **(encoders or {})}
    targets = {
        f"{component}.{name}": module
        for component, model in models.items()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.r
    }
    _check_family(unet, {name.removeprefix("unet."): layer for name, layer in layers.items()}, path)
    used = {name: layer for name, layer in layers.items() if name in targets}
    unused = [name for name in layers if name not in used]
    if not used:
        raise ConfigError(f"no layer of {path} is one that trains here ({unused[0]} first): change adapter.targets.")
    groups = {f"unet.{name}": group for name, group in group_layers(unet)}
    if unused and not allow_partial:
        raise ConfigError(_left_out(unused, len(layers), groups, path))
    for name, layer in used.items():
        _check_shape(targets[name], layer, name, path)
        _fill(targets[name], layer, name, path)
    return _table({name: groups.get(name, "text_encoder") for name in targets}, used, len(unused), path)


def _left_out(unused: list[str], count: int, groups: Mapping[str, str], path: str | Path) -> str:
    """What to do about the ``unused`` of a file's ``count`` layers; ``groups``: of the UNet's layers that have one."""
    said = f"{len(unused)} of {count} layers in {path} do not train here ({unused[0]} first)"
    # kohya's LoRAs train proj_in and proj_out as well
    alone = [name for name in unused if name not in groups and not name.startswith(("text_encoder", "lora_te"))]
    if not alone:
        return f"{said}: add their group to adapter.targets, or leave them out with adapter.allow_partial=true."
    kinds = sorted({name.rpartition(".")[2] for name in alone})
    named = ", ".join(kinds[:4] + ["..."] * (len(kinds) > 4))
    others = "" if len(alone) == len(unused) else "add the groups of the others to adapter.targets, and "
    return (
        f"{said}, and {len(alone)} of them ({named}) are in no group of adapter.targets: {others}leave these out with "
        "adapter.allow_partial=true."
    )


def _fill(target: Any, layer: LoraWeights, name: str, path: str | Path) -> None:
    down, up = target.lora_A[ADAPTER_NAME].weight, target.lora_B[ADAPTER_NAME].weight
    rank = down.shape[0]
    if layer.rank > rank:
        key = "conv_rank" if layer.is_conv else "rank"
        raise ConfigError(
            f"{path} has rank {layer.rank} at {name}, this run {rank}: set adapter.{key}={layer.rank}, or make the "
            "file smaller first."
        )
    magnitudes = getattr(target, "lora_magnitude_vector", {})
    if (layer.magnitude is not None) != (ADAPTER_NAME in magnitudes):
        says = "true" if layer.magnitude is not None else "false"
        raise ConfigError(f"{path} and this run disagree about DoRA at {name}: set adapter.use_dora={says}.")
    down[: layer.rank] = layer.down.to(down)
    up.zero_()
    up[:, : layer.rank] = layer.up.to(up) * (layer.scale / target.scaling[ADAPTER_NAME])
    if layer.magnitude is not None:
        weight = magnitudes[ADAPTER_NAME].weight
        weight.copy_(layer.magnitude.reshape(weight.shape))


def _check_family(unet: UNet2DConditionModel, layers: Mapping[str, LoraWeights], path: str | Path) -> None:
    modules = dict(unet.named_modules())
    for name, layer in layers.items():
        width = layer.down.shape[1]
        known = modules.get(name)
        attends = name.endswith(("attn2_to_k", "attn2.to_k"))
        if known is None and not attends:
            continue
        if attends and width != unet.config["cross_attention_dim"]:
            raise ConfigError(
                f"{path} is a LoRA of another family: it attends to {family_of_width(width)}, this backbone to "
                f"{family_of_width(unet.config['cross_attention_dim'])}."
            )
        if known is not None:
            _check_shape(known, layer, name, path)


def _check_shape(target: Any, layer: LoraWeights, name: str, path: str | Path) -> None:
    weight = base_layer(target).weight
    assert isinstance(weight, torch.Tensor)
    if layer.down.shape[1:] != weight.shape[1:] or layer.up.shape[0] != weight.shape[0]:
        raise ConfigError(
            f"{path} does not fit {name} of this backbone (weight {tuple(weight.shape)}, adapter "
            f"{tuple(layer.up.shape)} x {tuple(layer.down.shape)}): it is of another model."
        )


def _table(group_of: Mapping[str, str], used: Mapping[str, LoraWeights], unused: int, path: str | Path) -> str:
    """``group_of``: every layer that trains here."""
    table = Table(title=f"Starting from {Path(path).name}")
    for column in ("group", "from the file", "fresh", "rank in the file"):
        table.add_column(column, justify="left" if column == "group" else "right")
    for group in TARGET_GROUPS:
        mine = [name for name, own in group_of.items() if own == group]
        if mine:
            found = [used[name] for name in mine if name in used]
            ranks = "/".join(str(rank) for rank in sorted({layer.rank for layer in found})) or "-"
            table.add_row(group, str(len(found)), str(len(mine) - len(found)), ranks)
    table.add_section()
    table.add_row("left out", str(unused), "", "")
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
