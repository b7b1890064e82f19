"""Where each place of an image is found in its source: soft patch matching, coarse to fine, without labels.

The first scale compares every place with every other one, the following ones only within a small window around
what the scale before found. A match's score is the squared distance of projected features, with a penalty for
distance in space; the found place is the mean over the window under the softmax of the scores (as in
differentiable stereo: Kendall et al. 2017, 1703.04309, equation 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_RADIUS = 2  # of the local windows, places of that scale
_MANY = 2**24  # numbers; eight images of 512 pixels have 25 M
_PIECE = 2**24  # numbers that are held at once where nothing is trained: of scores, and of windows' distances


class Match(NamedTuple):
    """flow (B, 2, H, W): (x, y) displacement into the source, in places; confidence (B, 1, H, W) in (0, 1]."""

    flow: Tensor
    confidence: Tensor


class Matcher(nn.Module):
    """Matches features of ``channels`` channels at the scales ``factors`` (places per cell, coarse first)."""

    def __init__(self, channels: int, width: int = 12, factors: tuple[int, ...] = (4, 1)) -> None:
        super().__init__()
        self.factors = factors
        self.project = nn.Parameter(torch.randn(width, channels) * channels**-0.5)
        self.log_sharpness = nn.Parameter(torch.full((len(factors),), 1.0))
        self.log_locality = nn.Parameter(torch.tensor([2.0] + [0.0] * (len(factors) - 1)))

    def forward(self, target: Tensor, source: Tensor) -> Match:
        """Match (B, C, H, W) with (B, C, H, W)."""
        # Not standardized: backgrounds differ, and would move the garment's features apart.
        target, source = (torch.einsum("kc,bchw->bkhw", self.project, x) for x in (target, source))
        flow = torch.zeros_like(target[:, :2])
        confidence = torch.ones_like(target[:, :1])
        for k, factor in enumerate(self.factors):
            t, s = (_reduce(x, factor) for x in (target, source))
            sharpness, locality = self.log_sharpness[k].exp(), self.log_locality[k].exp()
            if k == 0:
                found, sure = _global(t, s, sharpness, locality)
            else:
                before = _reduce(flow, factor) / factor
                rest, sure = _local(t, warp(s, before), sharpness, locality)
                found = before + _smooth(rest, sure)
            flow, confidence = (_enlarge(x, flow) for x in (found * factor, sure))
        return Match(flow, confidence)


def warp(x: Tensor, flow: Tensor, between: str = "bilinear") -> Tensor:
    """``x`` (B, C, H, W) read at each place + ``flow``, linear (or ``bicubic``) between places, borders repeated."""
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    columns = torch.arange(width, device=x.device, dtype=flow.dtype)[None, :] + flow[:, 0]
    grid = torch.stack([columns / max(width - 1, 1), rows / max(height - 1, 1)], dim=-1) * 2 - 1
    return functional.grid_sample(x, grid, between, "border", align_corners=True)


def _global(target: Tensor, source: Tensor, sharpness: Tensor, locality: Tensor) -> tuple[Tensor, Tensor]:
    """Every place against every place; the penalty grows with the square of the distance in image sides."""
    b, _, height, width = target.shape
    t, s = target.flatten(2).transpose(1, 2), source.flatten(2).transpose(1, 2)
    places = _places(height, width, t)
    count = len(places) if torch.is_grad_enabled() else max(1, _PIECE // (b * len(places)))
    parts = []
    for some, at in zip(t.split(count, dim=1), places.split(count), strict=True):  # each place's scores are its own
        away = torch.cdist(at, places).square() / (max(height, width) ** 2)
        scores = -sharpness * torch.cdist(some, s).square() - 16 * locality * away
        weights = scores.softmax(-1)
        parts.append((weights @ places - at, weights.amax(-1)))
    found, sure = (torch.cat(of, dim=1) for of in zip(*parts, strict=True))
    return found.transpose(1, 2).reshape(b, 2, height, width), sure.view(b, 1, height, width)


def _local(target: Tensor, source: Tensor, sharpness: Tensor, locality: Tensor) -> tuple[Tensor, Tensor]:
    """A window of 5x5 places around each; of large images in strips, which changes nothing."""
    height, width = target.shape[2:]
    rows = max(1, _PIECE // (target.numel() // height * (2 * _RADIUS + 1) ** 2 // target.shape[1]))
    if torch.is_grad_enabled() or rows >= height:
        return _windows(target, source, sharpness, locality)
    strips, beyond = [], _RADIUS + 1  # what a window reads beyond a strip, and the mean over windows
    for first in range(0, height, rows):
        last, top = min(first + rows, height), max(first - beyond, 0)
        seen = slice(top, min(last + beyond, height))
        found = _windows(target[:, :, seen], source[:, :, seen], sharpness, locality)
        strips.append([one[:, :, first - top : last - top] for one in found])
    rest, sure = (torch.cat(of, dim=2) for of in zip(*strips, strict=True))
    return rest, sure


def _windows(target: Tensor, source: Tensor, sharpness: Tensor, locality: Tensor) -> tuple[Tensor, Tensor]:
    height, width = target.shape[2:]
    padded = functional.pad(source, (_RADIUS,) * 4, mode="replicate")
    offsets = [(dy, dx) for dy in range(2 * _RADIUS + 1) for dx in range(2 * _RADIUS + 1)]
    if torch.is_grad_enabled() and target.numel() > _MANY:  # else all 25 differences are kept for the way back
        distances = checkpoint(_distances, target, padded, offsets, use_reentrant=False)
    else:
        distances = _distances(target, padded, offsets)
    steps = torch.tensor(offsets, dtype=target.dtype, device=target.device) - _RADIUS
    penalty = locality * steps.square().sum(1)
    # A window of distances around each place says more than one place alone.
    cost = _blur(distances)
    weights = (-sharpness * cost - penalty[None, :, None, None]).softmax(1)
    rest = torch.einsum("bohw,oc->bchw", weights, steps.flip(1))
    return rest, weights.amax(1, keepdim=True)


def _distances(target: Tensor, padded: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
    """(B, offsets, H, W), one offset at a time: all windows at once would need 25 times the memory."""
    height, width = target.shape[2:]
    shifted = (padded[:, :, dy : dy + height, dx : dx + width] for dy, dx in offsets)
    if target.requires_grad or padded.requires_grad:
        return torch.stack([(target - x).square().sum(1) for x in shifted], dim=1)
    found = target.new_empty(len(target), len(offsets), height, width)
    difference = torch.empty_like(target)
    for k, x in enumerate(shifted):  # the same to the bit, in one buffer
        torch.sub(target, x, out=difference)
        torch.sum(difference.square_(), 1, out=found[:, k])
    return found


def _smooth(flow: Tensor, confidence: Tensor) -> Tensor:
    """Neighbors move alike; sure ones count more."""
    return _blur(flow * confidence) / _blur(confidence)


def _blur(x: Tensor) -> Tensor:
    # Means of 3 x 3 places, in two directions: on a CPU seven times as fast as avg_pool2d.
    x = functional.pad(x, (1, 1, 1, 1), mode="replicate")
    x = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    return (x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]) / 9


def _reduce(x: Tensor, factor: int) -> Tensor:
    return x if factor == 1 else functional.avg_pool2d(x, factor, ceil_mode=True)


def _enlarge(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[2:] == like.shape[2:]:
        return x
    return functional.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 2): x and y of every place."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1).to(like)
