"""GroupNorm of few channels to a group, on a CPU in bfloat16, channels_last.

PyTorch's kernel for that layout walks each group by itself. Where a group is narrower than a vector register (2 to 10
channels in small networks and in SD 1.5's first blocks) its backward is up to 30 times slower than the same sums taken
channel by channel, which this module takes, in float32. Anything else stays PyTorch's.

    y = rstd (x - mean) w + b       dL/dx = rstd w g + p x + q,  per group of n elements:
    p = rstd^3 (mean Sum(w g) - Sum(w g x)) / n                  q = -p mean - rstd Sum(w g) / n
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NARROW = 16  # channels to a group below which PyTorch's backward is the slower one
LARGE = 1024  # pixels from which PyTorch's forward takes another, quick way


def quicken_group_norms(model: nn.Module) -> None:
    """Let GroupNorms of ``model`` whose own parameters are frozen compute this way."""
    for module in model.modules():
        if type(module) is nn.GroupNorm and module.affine and module.num_channels < NARROW * module.num_groups:
            module.__class__ = NarrowGroupNorm


class NarrowGroupNorm(nn.GroupNorm):
    """nn.GroupNorm; what it computes differs from PyTorch's by float32 rounding before the result is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        quick = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.ndim == 4
        if trains or not quick or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return _Normalize.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def _flat(x: Tensor) -> Tensor:
    """channels_last (N, C, H, W) as (N, H W, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _unflat(values: Tensor, like: Tensor) -> Tensor:
    """The other way round."""
    n, channels, height, width = like.shape
    return values.view(n, height, width, channels).permute(0, 3, 1, 2)


def _total(x: Tensor) -> Tensor:
    """(N, P, C) -> (N, 1, C). A sum takes one core for each sample; of few samples a product is the quicker way."""
    return x.sum(1, keepdim=True) if len(x) > 3 else x.new_ones(1, x.shape[1]) @ x


def _moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation, (N, groups, 1), of x (N, P, C)."""
    n, pixels, channels = x.shape
    sums = torch.stack([_total(x), _total(x * x)]).view(2, n, groups, -1).sum(-1, keepdim=True)
    mean, square = sums / (pixels * channels // groups)
    return mean, (square - mean * mean).clamp_min_(0).add_(eps).rsqrt_()


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
        n, channels, height, width = x.shape
        ctx.groups = groups
        if height * width >= LARGE:
            y, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, height * width, groups, eps)
            ctx.save_for_backward(x, weight, mean.float().unsqueeze(-1), rstd.float().unsqueeze(-1))
            return y
        w, b = weight.float().view(groups, -1), bias.float().view(groups, -1)
        with torch.autocast("cpu", enabled=False):
            values = _flat(x).float()
            mean, rstd = _moments(values, groups, eps)
            scale = rstd * w
            values.mul_(_spread(scale)).add_(_spread(b - mean * scale))
        ctx.save_for_backward(x, weight, mean, rstd)
        return _unflat(values.to(x.dtype), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, mean, rstd = ctx.saved_tensors
        w = weight.float().view(ctx.groups, -1)
        grad = grad.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", enabled=False):
            values, g = _flat(x).float(), _flat(grad).float()
            count = values.shape[1] * w.shape[1]
            products = (_total(g * values).view(-1, *w.shape) * w).sum(-1, keepdim=True)
            total = (_total(g).view(-1, *w.shape) * w).sum(-1, keepdim=True)
            slope = rstd**3 * (mean * total - products) / count
            offset = -slope * mean - rstd * total / count
            values.mul_(_spread(slope.expand(-1, *w.shape))).add_(_spread(offset.expand(-1, *w.shape)))
            values.addcmul_(g, _spread(rstd * w))
        return _unflat(values.to(grad.dtype), x), None, None, None, None


def _spread(values: Tensor) -> Tensor:
    """(N, groups, C / groups) -> (N, 1, C)"""
    return values.flatten(1).unsqueeze(1)
