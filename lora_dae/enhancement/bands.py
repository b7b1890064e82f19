"""Undecimated frequency bands of latents: the a-trous B3-spline pyramid (Starck & Murtagh).

Level j smooths with [1, 4, 6, 4, 1] / 16 at dilation 2^(j-1) in both directions; band j is what that level
removed. Borders continue by half-sample symmetry (flip, edge sample repeated): only then is the smoothing
doubly stochastic, so that every band has zero mean per channel and DC (color) cannot change.

The smoothing is applied as two products of small matrices, all levels at once. At latent sizes that is several times
faster on CPU than dilated depthwise convolutions, needs no padding, and matrix products stay in full fp32 on GPU
(cuDNN convolutions default to TF32).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_KERNEL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
_BOX = 5  # side of the local window, latents
_FLOOR = 1e-4  # of local energies in units of white noise: about -40 dB, keeps the log finite in flat places


def split_bands(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Split ``x`` (..., H, W) into its bands (levels, ..., H, W), finest first, and the low-pass rest, shaped as ``x``.

    float32 whatever comes in; the bands and the rest sum to ``x`` up to rounding. Any size and any number of
    leading dimensions.
    """
    x = x.float()
    vertical = _cumulative_smoothing(x.shape[-2], levels, x.device)
    lows = _separable(x, vertical, _cumulative_smoothing(x.shape[-1], levels, x.device))
    if lows.requires_grad:
        return torch.cat([x[None], lows[:-1]]) - lows, lows[-1]
    bands = torch.empty_like(lows)  # the same to the bit without a copy of all, which took most of the time
    torch.sub(x, lows[0], out=bands[0])
    torch.sub(lows[:-1], lows[1:], out=bands[1:])
    return bands, lows[-1]


def local_log_energy(*bands: Tensor) -> Tensor:
    """Log of the local energy per band: (levels, B, C, H, W) -> (B, levels, H, W), natural log; several one by one.

    Energy is averaged over channels (so that any number of them gives the same features) and over a 5x5
    window; 0 is what unit white noise has in that band, and log(1e-4) the floor.
    """
    mean = torch.cat([one.square().mean(2) for one in bands], dim=1)
    energy = (mean / _variances(len(mean), mean.device)).transpose(0, 1)
    height, width = energy.shape[-2:]
    local = _separable(energy, _box(height, energy.device), _box(width, energy.device))[0]
    return (local + _FLOOR).log()


@lru_cache
def noise_variances(levels: int) -> tuple[float, ...]:
    """Variance of each band of unit white noise away from borders: .794, .040, .007 for three levels."""
    size = 8 * 2**levels  # wide enough that the middle row does not see the border
    rows = [torch.eye(size, dtype=torch.float64)[size // 2]]
    rows += [matrix[size // 2] for matrix in _cumulative_smoothing(size, levels, torch.device("cpu")).double()]
    kernels = [torch.outer(row, row) for row in rows]
    return tuple(float((fine - coarse).square().sum()) for fine, coarse in zip(kernels, kernels[1:], strict=False))


@lru_cache
def _variances(levels: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(noise_variances(levels), device=device).view(levels, 1, 1, 1)


def _separable(x: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """``vertical[j] @ x @ horizontal[j].T`` for each of J pairs, as (J, ..., H, W) float32."""
    count, (height, width) = len(vertical), x.shape[-2:]
    images = x.reshape(-1, height, width).transpose(0, 1).reshape(height, -1)  # side by side: one product for all
    with torch.autocast(device_type=x.device.type, enabled=False):  # bf16 would break sum and zero mean
        rows = torch.bmm(vertical, images.expand(count, -1, -1)).view(count, -1, width)
        smooth = torch.bmm(rows, horizontal.mT).view(count, height, -1, width)
    return smooth.transpose(1, 2).reshape(count, *x.shape)


@lru_cache(maxsize=64)
def _cumulative_smoothing(size: int, levels: int, device: torch.device) -> Tensor:
    """(levels, size, size): smoothing by levels 1..j as one matrix; dyadic, hence exact in float32."""
    with torch.inference_mode(False):  # a cached inference tensor could not be used in training later
        total = torch.eye(size, dtype=torch.float64)
        matrices = []
        for level in range(levels):
            total = _stencil(size, _KERNEL, 2**level) @ total
            matrices.append(total)
        return torch.stack(matrices).float().to(device)


@lru_cache(maxsize=64)
def _box(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _stencil(size, (1 / _BOX,) * _BOX, 1)[None].float().to(device)


def _stencil(size: int, kernel: tuple[float, ...], dilation: int) -> Tensor:
    """(size, size) float64 matrix of a symmetric 1-D kernel with half-sample symmetric borders."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    places = torch.arange(size)
    for tap, weight in enumerate(kernel):
        source = (places + (tap - len(kernel) // 2) * dilation) % (2 * size)
        source = torch.where(source < size, source, 2 * size - 1 - source)
        matrix[places, source] += weight
    return matrix
