"""Edges: how steep the garment's gradients are, and whether its border lies where it should."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_dae.evaluation.metrics.texture import shrink

QUANTILES = 256
_LUMA = (0.299, 0.587, 0.114)
LOW, HIGH = 50, 100  # Canny's hysteresis thresholds on 8-bit luma, after a 3 x 3 Gaussian


def gradient_magnitude(images: Tensor) -> Tensor:
    """Length of luma's gradient by central differences, (N, H, W); float NCHW in [0, 1], border repeated."""
    luma = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(_LUMA))[:, None]
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return torch.hypot(dx, dy)[:, 0]


def gradient_distance(images: Tensor, target: Tensor, masks: Tensor | None = None) -> Tensor:
    """1-Wasserstein distance between the distributions of gradient magnitudes, per image, (N,) float32.

    Inside the masks (shrunk, so that the outline does not count), by 256 quantiles; NaN for an empty mask; in luma per
    pixel, 0 when both hold the same gradients, wherever they lie. Blurring and over-sharpening both raise it.
    """
    where = torch.ones(len(images), *images.shape[2:]) if masks is None else shrink(masks)
    levels = (torch.arange(QUANTILES) + 0.5) / QUANTILES
    distances = []
    for a, b, inside in zip(gradient_magnitude(images), gradient_magnitude(target), where, strict=True):
        keep = inside > 0.5
        if not keep.any():
            distances.append(torch.tensor(torch.nan))
            continue
        distances.append((torch.quantile(a[keep], levels) - torch.quantile(b[keep], levels)).abs().mean())
    return torch.stack(distances)


def edge_f1(images: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """F1 of Canny edges in a band around the garment's border, per image, (N,) float32 in [0, 1].

    Precision: share of the image's edge pixels within H / 128 pixels (at least 1) of one of the target's; recall the
    other way round. The band reaches H / 32 pixels to each side of the mask's outline. NaN where neither has an edge
    there, 0 where only one has. Float NCHW in [0, 1], ``masks`` (N, H, W) of 0 and 1.
    """
    height = images.shape[2]
    reach, near = max(2, height // 32), max(1, height // 128)
    values = []
    for a, b, mask in zip(_edges(images), _edges(target), masks.numpy().astype(np.uint8), strict=True):
        band = (cv2.dilate(mask, _disk(reach)) - cv2.erode(mask, _disk(reach), borderValue=1)) > 0
        a, b = a & band, b & band
        if not a.any() and not b.any():
            values.append(np.nan)
            continue
        if not a.any() or not b.any():
            values.append(0.0)
            continue
        precision = cv2.dilate(b.astype(np.uint8), _disk(near))[a].mean()
        recall = cv2.dilate(a.astype(np.uint8), _disk(near))[b].mean()
        values.append(2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0)
    return torch.tensor(values, dtype=torch.float32)


def _edges(images: Tensor) -> list[np.ndarray]:
    luma = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(_LUMA))
    gray = (luma * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return [cv2.Canny(cv2.GaussianBlur(g, (3, 3), 0), LOW, HIGH, L2gradient=True) > 0 for g in gray]


def _disk(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
