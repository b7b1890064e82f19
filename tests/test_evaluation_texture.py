"""Band power: flat for white noise, falls with blur, sees the masked region only, has units per pixel."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics import texture


def _noise(n: int = 8, size: int = 128, scale: float = 0.1, seed: int = 0) -> torch.Tensor:
    gray = torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed)) * scale + 0.5
    return gray.expand(-1, 3, -1, -1)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    x = torch.arange(-8, 9).float()
    line = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(images, [8] * 4, mode="reflect")
    return F.conv2d(padded, kernel.expand(3, 1, 17, 17), groups=3)


def _grating(cycles: float, amplitude: float, size: int = 128) -> torch.Tensor:
    wave = amplitude * torch.cos(2 * math.pi * cycles * (torch.arange(size) + 0.5) / size)
    return (0.5 + wave).expand(1, 3, size, size)


@pytest.mark.parametrize("size", [128, 64, 96])
def test_white_noise_has_its_variance_in_every_band(size: int) -> None:
    spectrum = texture.band_power(_noise(n=24, size=size)).spectrum()
    assert spectrum.tolist() == pytest.approx([0.01] * len(texture.BAND_LABELS), rel=0.25)
    assert spectrum[3:].tolist() == pytest.approx([0.01] * 5, rel=0.08)  # high bands average over more places


def test_bands_add_up_to_the_power_of_a_grating() -> None:
    """A wave of amplitude a has variance a^2 / 2: the band-passed pictures split it without loss."""
    for cycles in (10, 16, 20, 40):  # also on the edge between two bands
        maps = texture.band_maps(_grating(cycles, 0.2))
        share = torch.stack([_mean_response(band) for band in range(len(texture.BAND_LABELS))])
        power = (maps.square().mean(dim=(0, 2, 3)) * share).sum().item()
        assert power == pytest.approx(0.02, rel=0.05), cycles


def _mean_response(band: int) -> torch.Tensor:
    """|h_b|^2 of the un-normalized filter, read off the response's own maximum."""
    return 1 / texture._responses(256, 256)[band].max().square()


def test_a_grating_is_found_in_its_own_band() -> None:
    for cycles, band in ((5, 0), (10, 2), (20, 4), (28, 5), (40, 6), (56, 7)):
        assert texture.band_power(_grating(cycles, 0.2)).spectrum().argmax().item() == band


def test_same_images_have_ratio_one_and_no_log_spectral_distance() -> None:
    power = texture.band_power(_noise())
    assert texture.band_power_ratio(power, power) == {"low": 1.0, "mid": 1.0, "high": 1.0}
    assert texture.lsd(power, power) == 0


def test_blur_lowers_high_bands_first_and_more_blur_more() -> None:
    sharp = _noise()
    real = texture.band_power(sharp)
    ratios, gaps = [], []
    for sigma in (0.5, 0.8, 1.2):
        power = texture.band_power(_blur(sharp, sigma))
        ratio = texture.band_power_ratio(power, real)
        assert ratio["high"] < ratio["mid"] < ratio["low"] <= 1.0
        ratios.append(ratio["high"])
        gaps.append(texture.lsd(power, real))
    assert ratios == sorted(ratios, reverse=True)
    assert gaps == sorted(gaps)


def test_amplitude_scales_power_by_its_square_and_lsd_by_twice_its_log() -> None:
    real = texture.band_power(_noise())
    double = texture.band_power((_noise() - 0.5) * 2 + 0.5)
    assert texture.band_power_ratio(double, real)["mid"] == pytest.approx(4, rel=1e-3)
    assert texture.lsd(double, real) == pytest.approx(math.log(4), rel=1e-3)


def test_bands_are_per_pixel_at_any_resolution() -> None:
    """The same weave, cut from a larger picture, keeps its spectrum."""
    large = _grating(80, 0.2, size=256)
    small = _grating(40, 0.2, size=128)
    assert torch.allclose(
        texture.band_power(large).spectrum(), texture.band_power(small).spectrum(), rtol=0.05, atol=1e-5
    )


def test_only_the_masked_region_counts() -> None:
    mask = torch.zeros(8, 128, 128)
    mask[:, 32:96, 32:96] = 1
    plain = torch.full((8, 3, 128, 128), 0.5)
    outside = torch.where(mask[:, None].bool(), plain, _noise())
    inside = torch.where(mask[:, None].bool(), _noise(), plain)
    reference = texture.band_power(_noise(), mask)
    assert texture.band_power_ratio(texture.band_power(inside, mask), reference)["high"] > 0.97
    assert texture.band_power_ratio(texture.band_power(outside, mask), reference)["high"] < 0.05


def test_weights_count_images() -> None:
    power = texture.band_power(_noise(n=3))
    weights = torch.tensor([[2.0, 0.0, 1.0]])
    chosen = texture.band_power(_noise(n=3)[[0, 0, 2]]).spectrum()
    assert torch.allclose(power.spectrum(weights)[0], chosen)


def test_empty_masks_are_told() -> None:
    with pytest.raises(ConfigError, match="no garment mask holds a pixel"):
        texture.band_power(_noise(n=2), torch.zeros(2, 128, 128))
