"""LoRA layers that cost little more than the frozen layer below them.

PEFT computes W x + s B A x as three products and a sum, each with its own backward. Here the weight W + s B A is formed
once per call and used for the output and for the input's gradient; the gradients of A and B come from
low-rank products, so the full weight gradient never exists (RunLoRA, Cherniuk et al. 2023, 2312.03415, for linear
layers; the same for convolutions):

    H = A x        G = s B^T dL/dy        dL/dB = s dL/dy H^T        dL/dA = G x^T

Parameters, names and files stay PEFT's. Layers with few positions (a time embedding) keep PEFT's order, which
is the cheaper one there; so does every case that PEFT treats apart (dropout, DoRA, several adapters, merged).

A weight that is held in int8 (backbone/int8.py) is merged again in the backward pass, instead of being kept for it.

While a model only samples, ``merged_once`` keeps each W + s B A (or DoRA's rescaled one) from its first call on. The
frozen weights are not touched, so leaving it is exact. Not those in int8, which are there to save that memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_dae.backbone.int8 import is_int8

# oneDNN reorders a convolution's weight in every call, on a CPU most of its time where latents are small. These do it
# once, and what comes out is the same to the bit; torch's compiler uses them on frozen networks.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_PACK: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None) if _HAS_ONEDNN else None
_CONVOLVE: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if _HAS_ONEDNN else None
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
            whole = _merge(base.weight, a, b, layer.scaling[name], dtype)
    bias = None if bias is None else bias.to(dtype)
    if not isinstance(base, nn.Conv2d):
        return _Kept(partial(F.linear, weight=whole, bias=bias), dtype)
    if _PACK is not None and _CONVOLVE is not None and whole.device.type == "cpu" and dtype == torch.float32:
        steps = list(base.padding), list(base.stride), [1, 1], 1
        packed = _PACK(whole.to_mkldnn(), *steps, list(shape))
        return _Kept(lambda x: _CONVOLVE(x, packed, bias, *steps, "none", [], ""), dtype)
    return _Kept(partial(F.conv2d, weight=whole, bias=bias, stride=base.stride, padding=base.padding), dtype)


def _is_plain(conv: nn.Module) -> bool:
    assert isinstance(conv, nn.Conv2d)
    return conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"


def merging_pays(positions: int, inputs: int, outputs: int) -> bool:
    """True if B A, rank x inputs x outputs products, costs less than B A x, rank x positions x (inputs + outputs)."""
    return positions * (inputs + outputs) > inputs * outputs


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


class FusedLinear(Linear):
    """PEFT's LoRA Linear in one product."""

    kept: dict[Any, _Kept | None] | None = None  # see merged_once
    reads_text = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kept is not None and not (args or kwargs):
            output = _from_kept(self, x)
            if output is not None:
                return output
        name, base = _plain_adapter(self, bool(args or kwargs)), self.base_layer
        assert isinstance(base, nn.Linear)
        if name is None or not merging_pays(x.numel() // x.shape[-1], base.in_features, base.out_features):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _LinearProduct.apply(x, base, a, b, self.scaling[name], _compute_dtype(x))


class FusedConv2d(Conv2d):
    """PEFT's LoRA Conv2d (A has the kernel, stride and padding, B is 1x1) in one convolution."""

    kept: dict[Any, _Kept | None] | None = None
    reads_text = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kept is not None and not (args or kwargs):
            output = _from_kept(self, x)
            if output is not None:
                return output
        name, base = _plain_adapter(self, bool(args or kwargs)), self.base_layer
        assert isinstance(base, nn.Conv2d)
        positions = x.shape[0] * x.shape[2] * x.shape[3] // (base.stride[0] * base.stride[1])
        if name is None or not merging_pays(positions, base.weight[0].numel(), base.out_channels):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return _ConvProduct.apply(x, base, a, b, self.scaling[name], _compute_dtype(x))


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + scale B A in the adapter's precision, then rounded once."""
    delta = (b.flatten(1) @ a.flatten(1)).view(weight.shape)
    merged = torch.add(weight.to(a.dtype), delta, alpha=scale)
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        return merged.to(dtype, memory_format=torch.channels_last)
    return merged.to(dtype)


def _keep(ctx: Any, x: Tensor, base: Any, a: Tensor, b: Tensor, scale: float, merged: Tensor) -> None:
    """What the backward needs; the merged weight too, but where it can only be a copy of one that is held smaller."""
    ctx.base, ctx.scale = base, scale
    ctx.save_for_backward(x, a, b, *(() if is_int8(base) else (merged,)))


def _kept(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, a, b, merged)"""
    x, a, b, *merged = ctx.saved_tensors
    return x, a, b, merged[0] if merged else _merge(ctx.base.weight, a, b, ctx.scale, x.dtype)


def _bias(base: Any, dtype: torch.dtype) -> Tensor | None:
    return None if base.bias is None else base.bias.to(dtype)


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base, a, b, scale, dtype):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            x, merged = x.to(dtype), _merge(base.weight, a, b, scale, dtype)
            _keep(ctx, x, base, a, b, scale, merged)
            return F.linear(x, merged, _bias(base, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with torch.autocast(grad.device.type, enabled=False):
            x, a, b, merged = _kept(ctx)
            dx = grad @ merged if ctx.needs_input_grad[0] else None
            rows, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            # The scale enters where the tensors are smallest.
            db = (rows.T @ (x @ a.to(x.dtype).T)).to(b.dtype) * ctx.scale
            da = ((rows @ b.to(x.dtype)).T @ x).to(a.dtype) * ctx.scale
        return dx, None, da, db, None, None


class _ConvProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base, a, b, scale, dtype):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            x, merged = x.to(dtype), _merge(base.weight, a, b, scale, dtype)
            _keep(ctx, x, base, a, b, scale, merged)
            return F.conv2d(x, merged, _bias(base, dtype), base.stride, base.padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        stride, padding = ctx.base.stride, ctx.base.padding

        def gradients(weight: Tensor, output: Tensor, which: tuple[bool, bool, bool]) -> tuple[Tensor, ...]:
            return torch.ops.aten.convolution_backward(
                output, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, which
            )

        with torch.autocast(grad.device.type, enabled=False):
            x, a, b, merged = _kept(ctx)
            dx = gradients(merged, grad, (True, False, False))[0] if ctx.needs_input_grad[0] else None
            low = a.to(x.dtype)
            if x.is_contiguous(memory_format=torch.channels_last):
                low = low.contiguous(memory_format=torch.channels_last)
            up = b.flatten(1).to(x.dtype)
            rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
            h = F.conv2d(x, low, None, stride, padding).permute(0, 2, 3, 1).reshape(-1, up.shape[1])
            db = (rows.T @ h).to(b.dtype).view(b.shape) * ctx.scale
            n, _, height, width = grad.shape
            g = (rows @ up).view(n, height, width, -1).permute(0, 3, 1, 2)
            da = gradients(low, g, (False, True, False))[1].to(a.dtype) * ctx.scale
        return dx, None, da, db, None, None
