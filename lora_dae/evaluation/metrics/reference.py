"""Fidelity to a known image: PSNR and SSIM, on the whole picture and inside the garment mask.

Only for the paired (source) mode. The person and the background cannot be known from a garment photo, so the
garment numbers are the ones that say something.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

MAX_PSNR = 100.0  # dB, given to images that agree exactly
BATCH = 16


def psnr(images: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio per image in dB: -10 log10(MSE), RGB, data range 1, at most 100 dB.

    ``images``, ``target`` float NCHW in [0, 1]; ``mask`` (N, H, W) of 0 and 1 restricts the mean to its
    pixels. Returns (N,) float32; NaN where a mask is empty. (To be averaged: not the PSNR of a pooled MSE.)
    """
    error = (images.double() - target.double()).square().mean(1)
    return (-10 * _mean(error, mask).clamp(min=10 ** (-MAX_PSNR / 10)).log10()).float()


def ssim(images: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity per image: gaussian window of sigma 1.5 (11 x 11), data range 1, RGB mean.

    Shapes, mask and NaN as in ``psnr``. The map of torchmetrics (reflected at the border, as large as the
    picture) is averaged over all pixels, or over the mask's: windows at its rim look 5 pixels past it.
    Source: Wang et al. 2004, equation 13.
    """
    maps = [
        structural_similarity_index_measure(
            a, b, gaussian_kernel=True, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
        )[1].mean(1)
        for a, b in zip(images.split(BATCH), target.split(BATCH), strict=True)
    ]
    return _mean(torch.cat(maps).double(), mask).float()


def _mean(maps: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return maps.mean(dim=(1, 2))
    inside = mask.to(maps.dtype)
    area = inside.sum(dim=(1, 2))
    return torch.where(area > 0, (maps * inside).sum(dim=(1, 2)) / area, torch.nan)
