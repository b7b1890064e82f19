"""Put LoRA layers into the UNet (by PEFT) and decide what trains.

    y = W x + (alpha / rank) * B A x        (Hu et al. 2021, equation 3; rsLoRA divides by sqrt(rank) instead)

W is frozen. B is zero at first, so the injected UNet draws exactly what the backbone draws.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_dae.adapter.fused import fuse
from lora_dae.adapter.source_input import get_source_input
from lora_dae.adapter.targets import is_spatial_conv, largest_rank, select
from lora_dae.config import AdapterConfig, ConfigError

ADAPTER_NAME = "default"
PREFIXES = ("lora_", "hada_", "lokr_")  # of an adapter's parameters in its layers, by kind
_OTHER: dict[str, type[LoHaConfig] | type[LoKrConfig]] = {"loha": LoHaConfig, "lokr": LoKrConfig}
_INITS: dict[str, bool | str] = {
    "kaiming": True,
    "gaussian": "gaussian",
}  # our word -> PEFT's init_lora_weights


def inject(unet: UNet2DConditionModel, cfg: AdapterConfig) -> None:
    """Add trainable float32 LoRA (or LoHa, LoKr) layers to those that ``cfg.targets`` means; freeze everything else.

    A source input (attach_source_input) keeps training. Its layers are left in train mode, as
    dropout needs it, and the rest of the UNet, which has none, in eval mode.
    LoRA's A is random: seed before calling. For channels_last convert the UNet before injecting: PEFT's DoRA
    on convolutions needs its own weights contiguous. Raises ConfigError for whatever does not fit
    (lora_config).
    """
    if is_injected(unet):
        raise ConfigError("The UNet already carries an adapter; load the backbone anew before injecting another.")
    if cfg.kind != "textual_inversion":  # words.py: nothing in the UNet
        unet.add_adapter(adapter_config(unet, cfg), adapter_name=ADAPTER_NAME)
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if adapted_layer(name) is not None:
            _train(parameter)
    if cfg.kind == "lora" and cfg.kernel == "fused":
        fuse(unet)
    source_input = get_source_input(unet)
    if source_input is not None:
        for parameter in source_input.parameters():
            _train(parameter)
    set_mode(unet, True)


def set_mode(unet: nn.Module, training: bool) -> None:
    """The adapter's layers in train mode or not, for their dropout; the rest of the UNet in eval mode.

    In train mode diffusers copies what enters a shortcut into another memory format.
    """
    unet.eval()
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            cast(nn.Module, module).train(training)


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """A block after which every layer is in train or eval mode as before."""
    modes = {layer: layer.training for layer in module.modules()}
    try:
        yield
    finally:
        for layer, training in modes.items():
            layer.training = training


def adapted_layer(parameter: str) -> str | None:
    """The layer that a parameter of an adapter belongs to, by the parameter's name; None for other parameters."""
    for prefix in PREFIXES:
        layer, found, _ = parameter.partition(f".{prefix}")
        if found:
            return layer
    return None


def make_full_finetune(unet: UNet2DConditionModel) -> None:
    """Train every weight of the UNet (a source input included) in float32, without an adapter."""
    for parameter in unet.parameters():
        _train(parameter)
    unet.train()


def is_injected(unet: UNet2DConditionModel) -> bool:
    """True if the UNet carries our adapter."""
    return ADAPTER_NAME in getattr(unet, "peft_config", {})


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Everything that trains, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def layer_ranks(unet: UNet2DConditionModel, cfg: AdapterConfig) -> dict[str, tuple[int, float]]:
    """(rank, alpha) of every selected layer, by module name.

    Convolutions larger than 1x1 use conv_rank and conv_alpha, everything else rank and alpha. Raises
    ConfigError if a rank is below 1 or above what the layer's weight matrix can have.
    """
    conv_rank = cfg.rank if cfg.conv_rank is None else cfg.conv_rank
    for key, rank in (("rank", cfg.rank), ("conv_rank", conv_rank)):
        if rank < 1:
            raise ConfigError(f"adapter.{key} is {rank}; set it to 1 or more.")
    alpha = float(cfg.rank if cfg.alpha is None else cfg.alpha)
    conv_alpha = float(conv_rank if cfg.conv_alpha is None else cfg.conv_alpha)

    ranks = {}
    for name, group in select(unet, cfg.targets).items():
        layer = unet.get_submodule(name)
        is_conv = is_spatial_conv(layer)
        rank, limit = (conv_rank if is_conv else cfg.rank), largest_rank(layer)
        if rank > limit:
            key = "conv_rank" if is_conv else "rank"
            raise ConfigError(
                f"adapter.{key} is {rank}, but {name} has full rank {limit} already; set adapter.{key} to at "
                f"most {limit} or remove {group!r} from adapter.targets."
            )
        ranks[name] = (rank, conv_alpha if is_conv else alpha)
    return ranks


def adapter_config(unet: UNet2DConditionModel, cfg: AdapterConfig) -> PeftConfig:
    """PEFT's configuration of ``cfg`` on this UNet, of its kind; ConfigError as lora_config.

    LoHa (Hyeon-Woo et al. 2022, FedPara) and LoKr (Yeh et al. 2023, LyCORIS) change W by a Hadamard or a Kronecker
    product of small matrices.
    """
    if cfg.kind == "lora":
        return lora_config(unet, cfg)
    ranks = layer_ranks(unet, cfg)
    alpha = cfg.rank if cfg.alpha is None else cfg.alpha
    exact = {name: f"^{re.escape(name)}" for name in ranks}
    return _OTHER[cfg.kind](
        r=cfg.rank,
        alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(ranks),
        rank_pattern={exact[name]: r for name, (r, _) in ranks.items() if r != cfg.rank},
        alpha_pattern={exact[name]: a for name, (_, a) in ranks.items() if a != alpha},
    )


def lora_config(unet: UNet2DConditionModel, cfg: AdapterConfig) -> LoraConfig:
    """PEFT's configuration of ``cfg`` on this UNet, with exact module names.

    Raises ConfigError for an unknown group, init or rank (see select and layer_ranks).
    """
    if cfg.init not in _INITS:
        raise ConfigError(f"adapter.init is {cfg.init!r}; choose from {', '.join(_INITS)}.")
    ranks = layer_ranks(unet, cfg)
    alpha = float(cfg.rank if cfg.alpha is None else cfg.alpha)
    # PEFT matches pattern keys as a regex at the end of module names: "^" and escaped dots make them exact.
    exact = {name: f"^{re.escape(name)}" for name in ranks}
    return LoraConfig(
        r=cfg.rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=list(ranks),
        rank_pattern={exact[name]: r for name, (r, _) in ranks.items() if r != cfg.rank},
        alpha_pattern={exact[name]: a for name, (_, a) in ranks.items() if a != alpha},
        lora_dropout=cfg.dropout,
        init_lora_weights=_INITS[cfg.init],  # type: ignore[arg-type]
        use_dora=cfg.use_dora,
        use_rslora=cfg.use_rslora,
    )


def _train(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.to(torch.float32)
    parameter.requires_grad_(True)
