"""LoRA layers that cost little more than the frozen layer below them.

PEFT computes W x + s B A x as three products and a sum, each with its own backward. Here it is one function
(products.py): by the whole weight W + s B A, formed once per call, or where few positions pass through a large
layer (a time embedding, small latents) in PEFT's order, which is the cheaper one there. Parameters, names and
files stay PEFT's, and so does every case that PEFT treats apart (dropout, DoRA, several adapters, merged).

A weight that is held in int8 (backbone/int8.py) is merged again in the backward pass, instead of being kept for it.

While a model only samples, ``merged_once`` keeps each W + s B A (or DoRA's rescaled one) from its first call on. The
frozen weights are not touched, so leaving it is exact. Not those in int8, which are there to save that memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn

from lora_dae.adapter.products import (
    Frozen,
    MergedConv,
    MergedLinear,
    PackedConv,
    SplitConv,
    SplitLinear,
    merge,
    merging_pays,
)
from lora_dae.backbone.int8 import is_int8

_OF_TEXT = ("attn2.to_k", "attn2.to_v")  # diffusers' cross-attention


def fuse(model: nn.Module) -> int:
    """Let every plain LoRA layer (Linear, Conv2d) of ``model`` compute this way; returns how many."""
    count = 0
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear
        elif type(module) is Conv2d and _is_plain(module.base_layer):
            module.__class__ = FusedConv2d
        else:
            continue
        count += 1
    return count


@contextmanager
def merged_once(model: nn.Module) -> Iterator[None]:
    """A block in which the adapter does not change and no gradient is needed: fused layers merge once, not every call.

    And what they make of a text that stays the same tensor from step to step, keys and values of cross-attention, is
    kept too. Costs one more copy of the adapted weights in the precision of the calls. May be nested.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FusedLinear | FusedConv2d) and m.kept is None}
    for name, layer in layers.items():
        layer.kept, layer.reads_text = {}, name.endswith(_OF_TEXT)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.kept = None


class _Kept:
    """How a layer computes one kind of call by its whole weight, and the last text with what became of it."""

    def __init__(self, compute: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        self.compute, self.dtype = compute, dtype
        self.text: tuple[Tensor, int] | None = None
        self.product: tuple[Tensor, int] | None = None

    def reused(self, text: Tensor) -> Tensor | None:
        """The product of this very tensor, unless somebody has written into one of them since."""
        if self.text is None or self.product is None or self.text[0] is not text:
            return None
        return self.product[0] if all(t._version == version for t, version in (self.text, self.product)) else None


def _from_kept(layer: Any, x: Tensor) -> Tensor | None:
    """The layer's output by the whole weight, kept since an earlier call; None where PEFT or the product is asked."""
    if torch.is_grad_enabled():
        return None
    dtype, active = _compute_dtype(x), layer.active_adapters
    # All that a pipeline or a callback may change between two calls.
    key = (*active, *layer.scaling.values(), layer.disable_adapters, layer.merged, layer.training, dtype, x.device)
    if key not in layer.kept:
        layer.kept[key] = _keep_merged(layer, dtype, x.shape)
    kept: _Kept | None = layer.kept[key]
    if kept is None:
        return None
    if not layer.reads_text or x.is_inference():  # which has no version
        return kept.compute(x.to(kept.dtype))
    product = kept.reused(x)
    if product is None:
        product = kept.compute(x.to(kept.dtype))
        kept.text, kept.product = (x, x._version), (product, product._version)
    return product


def _keep_merged(layer: Any, dtype: torch.dtype, shape: torch.Size) -> _Kept | None:
    """W + s B A (or DoRA's rescaled one) for inputs of about ``shape``; None for what is computed another way."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or layer.training or is_int8(layer.base_layer):
        return None
    if len(active) != 1 or layer.lora_bias[active[0]]:
        return None
    name, base, bias = active[0], layer.base_layer, layer.base_layer.bias
    with torch.autocast(base.weight.device.type, enabled=False):
        if name in layer.lora_variant:  # DoRA
            whole = layer.lora_variant[name].merge_safe(layer, name, base.weight.detach()).to(dtype)
            layer._caches.clear()  # what PEFT would need to undo it
        else:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            whole = merge(base.weight, a, b, layer.scaling[name], dtype)
    bias = None if bias is None else bias.to(dtype)
    if not isinstance(base, nn.Conv2d):
        return _Kept(partial(F.linear, weight=whole, bias=bias), dtype)
    if dtype == torch.float32 and PackedConv.suits(whole.device, dtype):
        return _Kept(partial(PackedConv(whole, base.stride, base.padding, shape), bias=bias), dtype)
    return _Kept(partial(F.conv2d, weight=whole, bias=bias, stride=base.stride, padding=base.padding), dtype)


def _is_plain(conv: nn.Module) -> bool:
    assert isinstance(conv, nn.Conv2d)
    return conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


def _plain_adapter(layer: Linear | Conv2d, extra: bool) -> str | None:
    """The name of the one adapter whose output is exactly W x + s B A x; None if PEFT has to decide."""
    if extra or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias[active[0]]:
        return None
    dropout = layer.lora_dropout[active[0]]
    return None if layer.training and not isinstance(dropout, nn.Identity) else active[0]


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _leaves_split_to_peft(base: nn.Module) -> bool:
    """Where no rounded copy is kept: of int8 weights, to save memory, and on a GPU, where rounding costs little."""
    return is_int8(base) or base.weight.device.type != "cpu"  # type: ignore[union-attr, return-value]


def _frozen(layer: Any, dtype: torch.dtype, shape: torch.Size) -> Frozen:
    """The layer's frozen weight as the split order uses it, made in the first call."""
    if layer.frozen is None or not layer.frozen.fits(layer.base_layer, dtype):
        layer.frozen = Frozen(layer.base_layer, dtype, shape)
    return layer.frozen  # type: ignore[no-any-return]


class FusedLinear(Linear):
    """PEFT's LoRA Linear in one product."""

    kept: dict[Any, _Kept | None] | None = None  # see merged_once
    frozen: Frozen | None = None  # of the split order
    reads_text = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kept is not None and not (args or kwargs):
            output = _from_kept(self, x)
            if output is not None:
                return output
        name, base = _plain_adapter(self, bool(args or kwargs)), self.base_layer
        assert isinstance(base, nn.Linear)
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b, dtype = self.lora_A[name].weight, self.lora_B[name].weight, _compute_dtype(x)
        if merging_pays(x.numel() // x.shape[-1], base.in_features, base.out_features):
            return MergedLinear.apply(x, base, a, b, self.scaling[name], dtype)
        if _leaves_split_to_peft(base):
            return super().forward(x)
        return SplitLinear.apply(x, _frozen(self, dtype, x.shape), a, b, self.scaling[name])


class FusedConv2d(Conv2d):
    """PEFT's LoRA Conv2d (A has the kernel, stride and padding, B is 1x1) in one convolution."""

    kept: dict[Any, _Kept | None] | None = None
    frozen: Frozen | None = None
    reads_text = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kept is not None and not (args or kwargs):
            output = _from_kept(self, x)
            if output is not None:
                return output
        name, base = _plain_adapter(self, bool(args or kwargs)), self.base_layer
        assert isinstance(base, nn.Conv2d)
        positions = x.shape[0] * x.shape[2] * x.shape[3] // (base.stride[0] * base.stride[1])
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b, dtype = self.lora_A[name].weight, self.lora_B[name].weight, _compute_dtype(x)
        if merging_pays(positions, base.in_channels * math.prod(base.kernel_size), base.out_channels):
            return MergedConv.apply(x, base, a, b, self.scaling[name], dtype)
        if _leaves_split_to_peft(base):
            return super().forward(x)
        return SplitConv.apply(x, _frozen(self, dtype, x.shape), a, b, self.scaling[name])
