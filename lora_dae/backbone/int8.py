"""Frozen weights in int8, one scale per output channel; W is formed again wherever it is used.

    W[o] ~ values[o] * scale[o]        scale[o] = max |W[o]| / 127        |error| <= scale[o] / 2

Half the memory of bfloat16, and no matter to the maths around it: a layer's ``weight`` is an ordinary float32 tensor,
so autocast, PEFT and fused LoRA layers (adapter/fused.py) see a frozen layer like any other. No backward keeps a W
that was formed in the forward: that would be the whole model once more.

torchao and bitsandbytes hold linear layers only, and half of a UNet of Stable Diffusion are convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")  # what lies outside is small, and sensitive


def to_int8(unet: nn.Module) -> int:
    """Hold the weights of all linear layers and convolutions in the UNet's blocks in int8, in place; returns how many.

    They are frozen for good: nothing can be merged into them. One layer at a time, so no second copy is made.
    """
    layers: list[Any] = [module for name, module in unet.named_modules() if name.startswith(_BLOCKS)]
    count = 0
    for layer in layers:
        if type(layer) is nn.Linear:
            kind: type[Int8Linear | Int8Conv2d] = Int8Linear
        elif type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            kind = Int8Conv2d
        else:
            continue
        values, scale = quantized(layer._parameters.pop("weight").detach())
        layer.__class__ = kind
        # Parameters and no buffers: processes that train together send buffers around in every step.
        layer.values = nn.Parameter(values, requires_grad=False)
        layer.scale = nn.Parameter(scale, requires_grad=False)
        count += 1
    return count


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) of a weight (out, ...): int8 of its shape and memory format, float32 (out, 1, ...)."""
    rows = weight.float()
    scale = rows.abs().amax(dim=tuple(range(1, rows.ndim)), keepdim=True) / 127
    return (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale


def is_int8(layer: nn.Module) -> bool:
    """Whether the layer's weight is held in int8."""
    return isinstance(layer, Int8Linear | Int8Conv2d)


class _Held:
    """What both kinds of layers share."""

    values: Tensor
    scale: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain layer where one is constructed: PEFT makes LoRA's A and B of their base's type, and they train."""
        plain = cls.__mro__[2]
        return plain(*args, **kwargs) if args or kwargs else super().__new__(cls)  # without: a copy

    @property
    def weight(self) -> Tensor:
        """W, float32, formed anew."""
        return self.values * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """In x's type, or the one that autocast asks for."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Product.apply(x, self, dtype)


class Int8Linear(_Held, nn.Linear):  # type: ignore[override]  # its weight is made, not kept
    """A frozen nn.Linear."""


class Int8Conv2d(_Held, nn.Conv2d):  # type: ignore[override]
    """A frozen nn.Conv2d without groups."""


class _Product(torch.autograd.Function):
    """W x + b of an int8 layer; the gradient of x forms W again."""

    @staticmethod
    def forward(ctx, x, layer, dtype):  # type: ignore[no-untyped-def]
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, dtype
        with torch.autocast(x.device.type, enabled=False):
            bias = None if layer.bias is None else layer.bias.to(dtype)
            weight = layer.weight.to(dtype)
            if isinstance(layer, nn.Linear):
                return F.linear(x.to(dtype), weight, bias)
            return F.conv2d(x.to(dtype), weight, bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        layer, weight = ctx.layer, ctx.layer.weight.to(ctx.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            if isinstance(layer, nn.Linear):
                return grad @ weight, None, None
            geometry = (layer.stride, layer.padding, layer.dilation)
            return torch.nn.grad.conv2d_input(ctx.shape, weight, grad, *geometry), None, None
