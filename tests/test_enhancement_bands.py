"""The pyramid splits without loss, leaves DC alone, and knows its noise."""

from __future__ import annotations

import pytest
import torch

from lora_dae.enhancement.bands import local_log_energy, noise_variances, split_bands


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 8), (32, 32), (40, 64)])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_bands_sum_to_the_input_and_have_zero_mean(size, levels):
    x = torch.randn(2, 4, *size) + 3
    bands, low = split_bands(x, levels)
    assert len(bands) == levels
    torch.testing.assert_close(sum(bands) + low, x, rtol=0, atol=2e-6)
    assert max(float(band.mean((2, 3)).abs().max()) for band in bands) < 1e-6


def test_smoothing_is_the_b3_spline_with_flipped_borders():
    x = torch.randn(1, 1, 16, 16)
    padded = torch.cat([x[..., :4].flip(-1), x, x[..., -4:].flip(-1)], -1)
    padded = torch.cat([padded[..., :4, :].flip(-2), padded, padded[..., -4:, :].flip(-2)], -2)
    row = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.outer(row, row)[None, None]
    once = torch.nn.functional.conv2d(padded[..., 2:-2, 2:-2], kernel)
    torch.testing.assert_close(split_bands(x, 1)[1], once)
    # The flip of a smoothed image is the smoothed flip, so level 2 continues by flipping again.
    again = torch.cat([once[..., :4].flip(-1), once, once[..., -4:].flip(-1)], -1)
    again = torch.cat([again[..., :4, :].flip(-2), again, again[..., -4:, :].flip(-2)], -2)
    torch.testing.assert_close(split_bands(x, 2)[1], torch.nn.functional.conv2d(again, kernel, dilation=2))


def test_white_noise_variances_are_the_published_ones():
    published = (0.890796, 0.200664, 0.085508, 0.041219)  # std, Starck & Murtagh 2002, table of B3 in 2-D
    assert noise_variances(4) == pytest.approx([std**2 for std in published], rel=1e-3)
    noise = torch.randn(1, 8, 256, 256, generator=torch.Generator().manual_seed(0))
    measured = [float(band.var()) for band in split_bands(noise, 3)[0]]
    assert measured == pytest.approx(noise_variances(3), rel=0.05)


def test_local_log_energy_is_relative_to_noise_and_blind_to_channel_count():
    noise = torch.randn(1, 512, 32, 32, generator=torch.Generator().manual_seed(0))
    energy = local_log_energy(split_bands(noise, 3)[0])
    assert energy.shape == (1, 3, 32, 32)
    assert float(energy[..., 8:-8, 8:-8].mean().abs()) < 0.02
    doubled = local_log_energy(split_bands(torch.cat([noise, noise], 1), 3)[0])
    torch.testing.assert_close(doubled, energy, rtol=1e-4, atol=1e-4)
    louder = local_log_energy(split_bands(10 * noise, 3)[0])
    torch.testing.assert_close(louder - energy, torch.full_like(energy, 100.0).log(), rtol=1e-3, atol=1e-2)


def test_flat_input_has_finite_energy_and_autocast_does_not_lower_precision():
    flat = split_bands(torch.full((1, 4, 16, 16), 7.0), 3)[0]
    assert torch.isfinite(local_log_energy(flat)).all()
    x = torch.randn(1, 4, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bands, low = split_bands(x, 3)
    torch.testing.assert_close(sum(bands) + low, x, rtol=0, atol=2e-6)


def test_bands_first_made_under_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        split_bands(torch.randn(1, 1, 23, 29), 2)
    x = torch.randn(1, 1, 23, 29, requires_grad=True)
    split_bands(x, 2)[0][0].square().sum().backward()
    assert float(x.grad.abs().sum()) > 0
