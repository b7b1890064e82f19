"""Color difference: CIEDE2000 between the mean colors of a garment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# sRGB (IEC 61966-2-1), D65 white of the 2-degree observer.
_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_WHITE = (0.95047, 1.0, 1.08883)


def srgb_to_lab(colors: Tensor) -> Tensor:
    """sRGB in [0, 1], (..., 3), to CIE L*a*b* (D65), (..., 3) float64."""
    c = colors.double()
    linear = torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ torch.tensor(_TO_XYZ, dtype=torch.float64).T / torch.tensor(_WHITE, dtype=torch.float64)
    epsilon, kappa = 216 / 24389, 24389 / 27
    f = torch.where(xyz > epsilon, xyz.clamp(min=0) ** (1 / 3), (kappa * xyz + 16) / 116)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def ciede2000(lab1: Tensor, lab2: Tensor) -> Tensor:
    """CIEDE2000 color difference of L*a*b* colors (..., 3), (...,); about 1 is just noticeable, k_L = k_C = k_H = 1.

    Source: Sharma, Wu and Dalal 2005, equations 2 to 22 (their handling of hues and of gray).
    """
    l1, a1, b1 = lab1.double().unbind(-1)
    l2, a2, b2 = lab2.double().unbind(-1)
    mean_c = (torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2
    g = (1 - (mean_c**7 / (mean_c**7 + 25.0**7)).sqrt()) / 2
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = torch.hypot(a1, b1), torch.hypot(a2, b2)
    h1, h2 = torch.atan2(b1, a1) % (2 * math.pi), torch.atan2(b2, a2) % (2 * math.pi)
    gray = c1 * c2 == 0
    dh = h2 - h1
    dh = dh - 2 * math.pi * (dh > math.pi) + 2 * math.pi * (dh < -math.pi)
    dh = torch.where(gray, 0.0, dh)
    delta_h = 2 * (c1 * c2).sqrt() * torch.sin(dh / 2)
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    total = h1 + h2
    far = (h1 - h2).abs() > math.pi
    mean_h = torch.where(far, (total + 2 * math.pi * torch.where(total < 2 * math.pi, 1.0, -1.0)) / 2, total / 2)
    mean_h = torch.where(gray, total, mean_h)
    t = (
        1
        - 0.17 * torch.cos(mean_h - math.radians(30))
        + 0.24 * torch.cos(2 * mean_h)
        + 0.32 * torch.cos(3 * mean_h + math.radians(6))
        - 0.20 * torch.cos(4 * mean_h - math.radians(63))
    )
    theta = math.radians(30) * torch.exp(-(((torch.rad2deg(mean_h) - 275) / 25) ** 2))
    s_l = 1 + 0.015 * (mean_l - 50) ** 2 / (20 + (mean_l - 50) ** 2).sqrt()
    s_c, s_h = 1 + 0.045 * mean_c, 1 + 0.015 * mean_c * t
    r_t = -torch.sin(2 * theta) * 2 * (mean_c**7 / (mean_c**7 + 25.0**7)).sqrt()
    x, y, z = (l2 - l1) / s_l, (c2 - c1) / s_c, delta_h / s_h
    return (x**2 + y**2 + z**2 + r_t * y * z).clamp(min=0).sqrt()


def color_difference(images: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """CIEDE2000 between the mean L*a*b* colors inside the mask, per image, (N,) float32; NaN for an empty mask.

    Float NCHW in [0, 1], ``masks`` (N, H, W) of 0 and 1. The mean color, not pixel against pixel: a pattern that is
    shifted by a thread has the same color. It does not see a wrong pattern of the right mean.
    """
    return difference_to(images, _mean_lab(target, masks), masks)


def difference_to(images: Tensor, expected: Tensor, masks: Tensor) -> Tensor:
    """``color_difference`` to known colors: ``expected`` (N, 3) L*a*b*, e.g. of the source photo's garment."""
    return ciede2000(_mean_lab(images, masks), expected).float()


def _mean_lab(images: Tensor, masks: Tensor) -> Tensor:
    inside = masks.double()[..., None]
    lab = srgb_to_lab(images.permute(0, 2, 3, 1))
    return (lab * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2))  # 0 / 0 = NaN
