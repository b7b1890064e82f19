"""Texture: how much power each frequency band of the garment holds, against real photos.

One undecimated band-pass picture per band gives the power at every pixel, so that it can be averaged inside a
garment mask without the mask's own outline leaking into the spectrum.

    P_b = sum_i sum_p m_i(p) (h_b * y_i)(p)^2 / (sum_i sum_p m_i(p) * |h_b|^2)

y: luma, m: the mask (shrunk by H / 64 pixels, away from the outline), h_b: band b, |h_b|^2: the mean of its
squared frequency response, so that white noise of variance s^2 has P_b = s^2 in every band.

    band_power_ratio_b = P_b(generated) / P_b(real)          1 = as much texture as real photos
    lsd = mean over bands above 12 cycles of |ln band_power_ratio_b|     0 = the same spectrum; nats

Bands are bounded in cycles per pixel, at all resolutions alike; in words they are called by the cycles per
image at 128 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_dae.config import ConfigError

EDGES_CYCLES_128 = (4, 6, 8, 12, 16, 24, 32, 48, 64)  # cycles per image at 128 pixels; 64 = Nyquist
BAND_LABELS = tuple(f"{a}-{b}" for a, b in zip(EDGES_CYCLES_128, EDGES_CYCLES_128[1:], strict=False))
GROUPS = {"low": (0, 3), "mid": (3, 6), "high": (6, 8)}  # 4-12, 12-32, 32-64 cycles: slices of the bands
LSD_FIRST_BAND = 3  # 12 cycles
_CROSSOVER = 0.15  # octaves on each side of an edge: soft, so that a band does not ring past the mask
_LUMA = (0.299, 0.587, 0.114)


PIXELS = 2**21  # looked at at once: their bands are 40 numbers each on the way


@dataclass(frozen=True)
class BandPower:
    """Power of a set of images: per-image sums (N, bands) over ``area`` (N,) mask pixels. float64.

    ``spectrum()`` is P_b (bands,); ``spectrum(weights)`` of re-weighted sets (R, N) is (R, bands).
    """

    sums: Tensor
    area: Tensor

    def spectrum(self, weights: Tensor | None = None) -> Tensor:
        if weights is None:
            return self.sums.sum(0) / self.area.sum()
        weights = weights.double()
        return (weights @ self.sums) / (weights @ self.area)[:, None]


def band_power(
    images: Tensor, masks: Tensor | None = None, batch_size: int = 32, allow_empty: bool = False
) -> BandPower:
    """Power of every band, per image, inside the masks (or on the whole picture).

    ``images`` float NCHW in [0, 1]; ``masks`` (N, H, W) of 0 and 1. Raises ConfigError when all are empty, unless
    ``allow_empty`` (they are a part of a larger set). Of large pictures fewer are looked at at once.
    """
    batch_size = max(1, min(batch_size, PIXELS // (images.shape[2] * images.shape[3])))
    sums, areas = [], []
    for start in range(0, len(images), batch_size):
        piece = images[start : start + batch_size]
        if masks is None:
            inside = torch.ones(len(piece), *piece.shape[2:])
        else:
            inside = shrink(masks[start : start + batch_size])
        maps = band_maps(piece)
        sums.append((maps.square() * inside[:, None]).sum(dim=(2, 3)).double())
        areas.append(inside.sum(dim=(1, 2)).double())
    area = torch.cat(areas)
    if area.sum() == 0 and not allow_empty:
        raise ConfigError("no garment mask holds a pixel, so texture cannot be measured; uint8 masks are 0 and 255.")
    return BandPower(torch.cat(sums), area)


def band_maps(images: Tensor) -> Tensor:
    """Band-passed luma of float NCHW images, (N, bands, H, W); white noise keeps its variance."""
    height, width = images.shape[2:]
    luma = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(_LUMA))
    # Mirrored to twice the size: top and bottom do not meet, and that jump would count as texture.
    luma = torch.cat([luma, luma.flip(1)], dim=1)
    luma = torch.cat([luma, luma.flip(2)], dim=2)
    responses = _responses(2 * height, 2 * width)
    spectrum = torch.fft.rfft2(luma)
    return torch.fft.irfft2(spectrum[:, None] * responses, s=luma.shape[1:])[..., :height, :width]


def shrink(masks: Tensor) -> Tensor:
    """Masks (N, H, W) of 0 and 1 without their outermost H / 64 pixels, as float32."""
    radius = max(1, masks.shape[1] // 64)
    outside = 1 - masks.float()[:, None]
    return 1 - F.max_pool2d(outside, 2 * radius + 1, stride=1, padding=radius)[:, 0]


def band_power_ratio(generated: BandPower, real: BandPower) -> dict[str, float]:
    """Generated over real power in the groups low (4-12), mid (12-32), high (32-64 cycles at 128 pixels)."""
    ratios = group_ratios(generated.spectrum()[None], real.spectrum()[None])
    return {name: ratio.item() for name, ratio in ratios.items()}


def group_ratios(generated: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Geometric mean over each group's bands of the ratio of two spectra (R, bands); each (R,)."""
    log_ratio = _log_ratio(generated, real)
    return {name: log_ratio[:, slice(*bands)].mean(1).exp() for name, bands in GROUPS.items()}


def lsd(generated: BandPower, real: BandPower) -> float:
    """Log-spectral distance: mean |ln (generated / real power)| over the bands above 12 cycles, in nats."""
    return log_spectral_distance(generated.spectrum()[None], real.spectrum()[None]).item()


def log_spectral_distance(generated: Tensor, real: Tensor) -> Tensor:
    """``lsd`` of spectra (R, bands), returns (R,)."""
    return _log_ratio(generated, real)[:, LSD_FIRST_BAND:].abs().mean(1)


def _log_ratio(generated: Tensor, real: Tensor) -> Tensor:
    floor = 1e-12  # a black picture has no power at all; 8-bit rounding noise is 1e-6
    return (generated.clamp(min=floor) / real.clamp(min=floor)).log()


@lru_cache(maxsize=4)
def _responses(height: int, width: int) -> Tensor:
    """Frequency responses (bands, height, width // 2 + 1) whose squares add to 1 inside the outer edges."""
    fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    octave = (fy.square() + fx.square()).sqrt().clamp(min=1e-9).log2()
    edges = torch.tensor(EDGES_CYCLES_128, dtype=torch.float32).div(128).log2()
    above = [((octave - edge) / (2 * _CROSSOVER) + 0.5).clamp(0, 1) for edge in edges]
    above = [a * a * (3 - 2 * a) for a in above]  # smoothstep
    power = torch.stack([low - high for low, high in zip(above, above[1:], strict=False)]).clamp(min=0)
    full_plane = torch.ones(width // 2 + 1).mul(2)
    full_plane[0] = 1  # rfft keeps one half; its first and last column stand for themselves
    full_plane[-1] = 1 if width % 2 == 0 else 2
    mean_power = (power * full_plane).sum(dim=(1, 2)) / (height * width)
    return (power / mean_power[:, None, None]).sqrt()
