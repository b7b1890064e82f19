"""PSNR and SSIM against torchmetrics and closed forms, on whole pictures and inside a mask."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure

from lora_dae.evaluation.metrics.reference import MAX_PSNR, psnr, ssim


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 32, 32, generator=generator)
    return (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1), target


def test_constant_offset_has_the_psnr_of_the_closed_form() -> None:
    target = torch.full((2, 3, 16, 16), 0.25)
    for offset in (0.1, 0.5):
        expected = -20 * math.log10(offset)
        assert psnr(target + offset, target).tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_offset_inside_the_mask_only_counts_inside() -> None:
    target = torch.full((1, 3, 16, 16), 0.25)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:8] = 1
    images = target + 0.1 * mask[:, None]
    assert psnr(images, target, mask).item() == pytest.approx(20, rel=1e-5)
    assert psnr(images, target, 1 - mask).item() == MAX_PSNR
    assert psnr(images, target).item() == pytest.approx(20 + 10 * math.log10(4), rel=1e-5)


def test_equal_torchmetrics_per_image(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, target = pair
    expected = peak_signal_noise_ratio(images, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(images, target), expected, rtol=1e-5)
    metric = StructuralSimilarityIndexMeasure(sigma=1.5, data_range=1.0)
    for image in range(3):
        alone = slice(image, image + 1)
        assert ssim(images, target)[image].item() == pytest.approx(
            metric(images[alone], target[alone]).item(), abs=1e-5
        )


def test_full_mask_is_no_mask(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    full = torch.ones(3, 32, 32)
    assert torch.allclose(psnr(*pair, full), psnr(*pair))
    assert torch.allclose(ssim(*pair, full), ssim(*pair))


def test_ssim_of_constants_is_its_luminance_term() -> None:
    a, b, c1 = 0.3, 0.7, 0.01**2
    got = ssim(torch.full((1, 3, 24, 24), a), torch.full((1, 3, 24, 24), b)).item()
    assert got == pytest.approx(
        (2 * a * b + c1) / (a * a + b * b + c1), rel=1e-3
    )  # float32: a flat variance is rounding


def test_damage_outside_the_mask_leaves_masked_ssim_alone(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, target = pair
    mask = torch.zeros(3, 32, 32)
    mask[:, :, :10] = 1
    damaged = target.clone()
    damaged[..., 16:] = 0  # more than half a window (5 pixels) away from the mask
    assert torch.allclose(ssim(damaged, target, mask), torch.ones(3), atol=1e-5)
    assert (ssim(damaged, target) < 0.9).all()


def test_empty_mask_is_not_a_number() -> None:
    image = torch.rand(1, 3, 16, 16)
    assert psnr(image, image, torch.zeros(1, 16, 16)).isnan().all()
