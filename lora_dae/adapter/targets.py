"""Which UNet layers a target group means.

========================  ==========================================================================
cross_attention           to_q, to_k, to_v, to_out.0 of the attention that reads the text (attn2)
self_attention            the same four of the attention that reads the image itself (attn1)
feed_forward              ff.net.0.proj and ff.net.2 of the transformer blocks
conv                      every convolution and linear inside ResNet, down- and up-sampling blocks
conv_in, conv_out         the UNet's first and last convolution
text_encoder              no layer of the UNet: see text.py
========================  ==========================================================================

``conv`` is kohya's definition (sd-scripts, ``networks/lora.py``: ``ResnetBlock2D``, ``Downsample2D`` and
``Upsample2D``), so that results compare: besides the 3x3 convolutions it takes the 1x1 ``conv_shortcut`` and
the linear ``time_emb_proj``. Also as there, only convolutions larger than 1x1 use the rank of convolutions
(``adapter.conv_rank``); 1x1 convolutions and linears use the network's rank (``adapter.rank``). ``proj_in`` and
``proj_out`` around transformer blocks, which kohya's default LoRA trains with all of these blocks, are in no group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from lora_dae.config import UNET_GROUPS, ConfigError


def select(unet: UNet2DConditionModel, groups: Iterable[str]) -> dict[str, str]:
    """Name every layer of the groups: {module name: group}, in the UNet's own order.

    Works on a plain UNet and on one that already carries an adapter. Raises ConfigError for an unknown group,
    for no group at all, and for a group that has no layer in this UNet.
    """
    wanted = [group for group in groups if group != "text_encoder"]
    valid = ", ".join(UNET_GROUPS)
    unknown = [group for group in wanted if group not in UNET_GROUPS]
    if unknown:
        raise ConfigError(f"adapter.targets names the unknown group {unknown[0]!r}; choose from {valid}.")
    if not wanted:
        raise ConfigError(f"adapter.targets is empty; name at least one of {valid}.")
    found = {name: group for name, group in group_layers(unet) if group in wanted}
    for group in wanted:
        if group not in found.values():
            raise ConfigError(
                f"adapter.targets names {group!r}, but this backbone's UNet has no such layer; "
                "remove it from adapter.targets."
            )
    return found


def base_layer(module: nn.Module) -> nn.Module:
    """The frozen layer below a PEFT layer, or the layer itself."""
    base = getattr(module, "base_layer", module)
    assert isinstance(base, nn.Module)
    return base


def is_spatial_conv(module: nn.Module) -> bool:
    """True for convolutions larger than 1x1: the layers that use ``conv_rank`` and ``conv_alpha``."""
    base = base_layer(module)
    return isinstance(base, nn.Conv2d) and base.kernel_size != (1, 1)


def largest_rank(module: nn.Module) -> int:
    """Rank of the layer's full weight matrix: min(in, out), for a convolution min(in * k * k, out)."""
    weight = base_layer(module).weight
    assert isinstance(weight, Tensor)
    return min(weight.shape[0], weight[0].numel())


def group_layers(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Every layer of this UNet that belongs to a group: (module name, group)."""
    for name, module in unet.named_modules():
        if name in ("conv_in", "conv_out"):
            yield name, name
        elif isinstance(module, BasicTransformerBlock):
            yield from _transformer_layers(name, module)
        elif isinstance(module, (ResnetBlock2D, Downsample2D, Upsample2D)):
            for child_name, child in module.named_children():
                if isinstance(base_layer(child), (nn.Conv2d, nn.Linear)):
                    yield f"{name}.{child_name}", "conv"


def _transformer_layers(name: str, block: BasicTransformerBlock) -> Iterator[tuple[str, str]]:
    for attention_name in ("attn1", "attn2"):
        attention = getattr(block, attention_name)
        if attention is None:
            continue
        group = "cross_attention" if attention.is_cross_attention else "self_attention"
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            yield f"{name}.{attention_name}.{projection}", group
    yield f"{name}.ff.net.0.proj", "feed_forward"
    yield f"{name}.ff.net.2", "feed_forward"
