"""W x + s B A x for linear layers and convolutions, each in two orders, with gradients that never form dL/dW.

merged    (W + s B A) x     the whole weight is formed once per call, for the output and for the input's gradient
split     W x + s B (A x)   with the frozen W rounded to the precision of the call once, not in every call

In both the gradients of A and B are low-rank products (RunLoRA, Cherniuk et al. 2023, 2312.03415; the same here for
convolutions):

    H = A x        G = s B^T dL/dy        dL/dB = s dL/dy H^T        dL/dA = G x^T
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lora_dae.backbone.int8 import is_int8

# oneDNN reorders a convolution's weight in every call, on a CPU most of its time where latents are small. These do it
# once, and what comes out is the same to the bit; torch's compiler uses them on frozen networks.
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_PACK: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None) if _HAS_ONEDNN else None
_CONVOLVE: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if _HAS_ONEDNN else None
FEW = 64  # positions below which a large convolution takes less time than its weight's reordering


def merging_pays(positions: int, inputs: int, outputs: int) -> bool:
    """True if B A, rank x inputs x outputs products, costs less than B A x, rank x positions x (inputs + outputs)."""
    return positions * (inputs + outputs) > inputs * outputs


class PackedConv:
    """A convolution (groups 1, dilation 1) by a weight that is in oneDNN's order already, for inputs like ``shape``."""

    def __init__(self, weight: Tensor, stride: Any, padding: Any, shape: torch.Size) -> None:
        self.steps = list(padding), list(stride), [1, 1], 1
        self.weight = _PACK(weight.to_mkldnn(), *self.steps, list(shape))

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _CONVOLVE(x, self.weight, bias, *self.steps, "none", [], "")  # type: ignore[no-any-return]

    @staticmethod
    def suits(device: torch.device, dtype: torch.dtype) -> bool:
        """Whether there is such a thing here: in bfloat16 not on every processor that can do it in other ways."""
        if _PACK is None or _CONVOLVE is None or device.type != "cpu":
            return False
        return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _rows(weight: Tensor, channels_last: bool) -> Tensor:
    """A matrix of one row per output, in the order of channels_last memory or the usual one."""
    return weight.permute(0, 2, 3, 1).flatten(1) if channels_last else weight.flatten(1)


def _like(rows: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """``_rows`` the other way round, without a copy."""
    if not channels_last:
        return rows.view(shape)
    outputs, inputs, height, width = shape
    return rows.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


def _pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) as (N H W, C), a view of channels_last memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """(N H W, C) as (N, C, H, W), in channels_last."""
    n, _, height, width = like.shape
    return rows.view(n, height, width, -1).permute(0, 3, 1, 2)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + scale B A in the adapter's precision, then rounded once; it lies in memory as W does."""
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    delta = b.flatten(1) @ _rows(a, last)
    merged = torch.add(_rows(weight, last).to(a.dtype), delta, alpha=scale, out=delta)
    return _like(merged.to(dtype), weight.shape, last)


def _bias(base: Any, dtype: torch.dtype) -> Tensor | None:
    return None if base.bias is None else base.bias.to(dtype)


def _keep(ctx: Any, x: Tensor, base: Any, a: Tensor, b: Tensor, scale: float, merged: Tensor) -> None:
    """What the backward needs; the merged weight too, but where it can only be a copy of one that is held smaller."""
    ctx.base, ctx.scale = base, scale
    ctx.save_for_backward(x, a, b, *(() if is_int8(base) else (merged,)))


def _kept(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, a, b, merged)"""
    x, a, b, *merged = ctx.saved_tensors
    return x, a, b, merged[0] if merged else merge(ctx.base.weight, a, b, ctx.scale, x.dtype)


def _convolution_gradients(
    output: Tensor, x: Tensor, weight: Tensor, base: nn.Conv2d, which: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """(dL/dx, dL/dweight) of a convolution with ``base``'s stride and padding, those that are asked for."""
    found = torch.ops.aten.convolution_backward(
        output, x, weight, None, base.stride, base.padding, (1, 1), False, (0, 0), 1, (*which, False)
    )
    return found[0], found[1]


def _down(a: Tensor, x: Tensor) -> Tensor:
    """A convolution's A in x's precision and memory format."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return _like(_rows(a, last).to(x.dtype), a.shape, last)


def _of_b(h: Tensor, rows: Tensor, b: Tensor, scale: float) -> Tensor:
    """dL/dB; of a thin product the narrow factor comes first, and the scale enters where tensors are small."""
    return (h.T @ rows).to(b.dtype).mul_(scale).T.reshape(b.shape)


def _of_a(gradient: Tensor, a: Tensor) -> Tensor:
    """dL/dA of a convolution as A lies in memory, strides of single places included: DDP's buckets look at those."""
    return gradient.to(a.dtype).reshape(-1).view(a.shape)


class MergedLinear(torch.autograd.Function):
    """apply(x, base, a, b, scale, dtype)"""

    @staticmethod
    def forward(ctx, x, base, a, b, scale, dtype):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            x, merged = x.to(dtype), merge(base.weight, a, b, scale, dtype)
            _keep(ctx, x, base, a, b, scale, merged)
            return F.linear(x, merged, _bias(base, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with torch.autocast(grad.device.type, enabled=False):
            x, a, b, merged = _kept(ctx)
            dx = grad @ merged if ctx.needs_input_grad[0] else None
            rows, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            db = _of_b(x @ a.to(x.dtype).T, rows, b, ctx.scale)
            da = ((rows @ b.to(x.dtype)).T @ x).to(a.dtype).mul_(ctx.scale)
        return dx, None, da, db, None, None


class MergedConv(torch.autograd.Function):
    """apply(x, base, a, b, scale, dtype)"""

    @staticmethod
    def forward(ctx, x, base, a, b, scale, dtype):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            x, merged = x.to(dtype), merge(base.weight, a, b, scale, dtype)
            _keep(ctx, x, base, a, b, scale, merged)
            return F.conv2d(x, merged, _bias(base, dtype), base.stride, base.padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        base = ctx.base
        with torch.autocast(grad.device.type, enabled=False):
            x, a, b, merged = _kept(ctx)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = _convolution_gradients(grad, x, merged, base, (True, False))[0]
            low, rows = _down(a, x), _pixels(grad)
            db = _of_b(_pixels(F.conv2d(x, low, None, base.stride, base.padding)), rows, b, ctx.scale)
            g = _image(rows @ b.flatten(1).to(x.dtype), grad)
            da = _of_a(_convolution_gradients(g, x, low, base, (False, True))[1], a).mul_(ctx.scale)
        return dx, None, da, db, None, None


class Frozen:
    """A frozen layer's weight in the precision of the calls, made once; convolutions' on a CPU in oneDNN's order.

    It costs a copy of the weight where that is of another precision; one more for a convolution's backward where so
    few positions pass through it that this would be mostly reordering.
    """

    def __init__(self, base: Any, dtype: torch.dtype, shape: torch.Size) -> None:
        self.base, self.dtype, self._made_of = base, dtype, (base.weight, base.weight._version)
        self._there: PackedConv | None = None
        self._back: PackedConv | None = None
        self.bias = _bias(base, dtype)
        # A plan counts with fake tensors, which have no oneDNN order; the copy below is as large.
        packs = isinstance(base, nn.Conv2d) and dtype == torch.bfloat16 and not isinstance(base.weight, FakeTensor)
        if not packs or not PackedConv.suits(base.weight.device, dtype):
            self._weight = base.weight.detach().to(dtype)
            return
        self._weight, weight = base.weight, base.weight.detach().to(dtype)
        self._there = PackedConv(weight, base.stride, base.padding, shape)
        if base.stride == (1, 1) and shape[0] * shape[2] * shape[3] < FEW:
            # The input's gradient is a convolution with the mirrored weight: its order can be kept as well.
            mirrored = weight.flip(2, 3).transpose(0, 1).contiguous()
            kernel, padded = base.weight.shape[2:], tuple(int(p) for p in base.padding)
            sizes = [length + 2 * p - k + 1 for length, k, p in zip(shape[2:], kernel, padded, strict=True)]
            output = torch.Size([shape[0], base.out_channels, *sizes])
            padding = [k - 1 - p for k, p in zip(kernel, padded, strict=True)]
            self._back = PackedConv(mirrored, [1, 1], padding, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied layer makes its own."""

    def fits(self, base: Any, dtype: torch.dtype) -> bool:
        """False once the layer has other weights or is called in another precision."""
        return self.dtype == dtype and self._made_of[0] is base.weight and self._made_of[1] == base.weight._version

    def forward(self, x: Tensor) -> Tensor:
        """W x + bias"""
        if self._there is not None:
            return self._there(x, self.bias)
        if isinstance(self.base, nn.Conv2d):
            return F.conv2d(x, self._weight, self.bias, self.base.stride, self.base.padding)
        return F.linear(x, self._weight, self.bias)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """dL/dx from dL/dy"""
        if self._back is not None:
            return self._back(grad)
        if isinstance(self.base, nn.Conv2d):
            return _convolution_gradients(grad, x, self._weight.to(grad.dtype), self.base, (True, False))[0]
        return grad @ self._weight


class SplitLinear(torch.autograd.Function):
    """apply(x, frozen, a, b, scale)"""

    @staticmethod
    def forward(ctx, x, frozen, a, b, scale):  # type: ignore[no-untyped-def]
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(frozen.dtype)
            rows = x.reshape(-1, x.shape[-1])
            h, y = rows @ a.to(x.dtype).T, frozen.forward(x)
            y.view(-1, y.shape[-1]).addmm_(h, b.to(x.dtype).T, alpha=scale)
            ctx.frozen, ctx.scale = frozen, scale
            ctx.save_for_backward(x, a, b, h)
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, a, b, h = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            rows = grad.reshape(-1, grad.shape[-1])
            g = rows @ b.to(x.dtype)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = torch.addmm(ctx.frozen.backward(rows, x), g, a.to(x.dtype), alpha=ctx.scale).view(x.shape)
            db = _of_b(h, rows, b, ctx.scale)
            da = (g.T @ x.reshape(-1, x.shape[-1])).to(a.dtype).mul_(ctx.scale)
        return dx, None, da, db, None


class SplitConv(torch.autograd.Function):
    """apply(x, frozen, a, b, scale)"""

    @staticmethod
    def forward(ctx, x, frozen, a, b, scale):  # type: ignore[no-untyped-def]
        base = frozen.base
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(frozen.dtype)
            h = _pixels(F.conv2d(x, _down(a, x), None, base.stride, base.padding))
            y = frozen.forward(x).contiguous(memory_format=torch.channels_last)
            _pixels(y).addmm_(h, b.flatten(1).to(x.dtype).T, alpha=scale)
            ctx.frozen, ctx.scale = frozen, scale
            ctx.save_for_backward(x, a, b, h)
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, a, b, h = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            rows = _pixels(grad)
            g = _image(rows @ (b.flatten(1) * ctx.scale).to(x.dtype), grad)
            wanted = ctx.needs_input_grad[0], True
            dx, da = _convolution_gradients(g, x, _down(a, x), ctx.frozen.base, wanted)
            if wanted[0]:
                dx = dx + ctx.frozen.backward(grad, x)
            db = _of_b(h, rows, b, ctx.scale)
        return dx, None, _of_a(da, a), db, None
