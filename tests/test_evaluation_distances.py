"""Distances agree with torchmetrics and closed forms; their bootstrap says what it claims."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics import distances
from lora_dae.evaluation.statistics.bootstrap import (
    bootstrap_interval,
    bootstrap_weights,
    weighted_means,
    wilson_interval,
)


class Flat(nn.Module):
    """Features = the picture's own numbers, so that torchmetrics sees exactly what the pure functions see."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator) * torch.linspace(0.5, 2, 12) + 0.3
    return x, torch.randn(30, 12, generator=generator)


def _images(features: Tensor) -> Tensor:
    return features.view(-1, 3, 2, 2)


def test_frechet_equals_torchmetrics(sets: tuple[Tensor, Tensor]) -> None:
    x, y = sets
    metric = FrechetInceptionDistance(feature=Flat(), normalize=True)
    metric.update(_images(x), real=False)
    metric.update(_images(y), real=True)
    assert distances.frechet_from_features(x, y) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_frechet_of_gaussians_with_diagonal_covariances_is_the_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    mean = torch.tensor([1.0, 2.0, 0.0])
    expected = 5.0 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    got = distances.frechet_distance(mean, torch.diag(a), torch.zeros(3), torch.diag(b))
    assert got == pytest.approx(expected, rel=1e-12)


def test_gram_matrix_and_covariances_give_the_same_frechet_distance() -> None:
    x, y = torch.randn(20, 50).double(), torch.randn(25, 50).double() * 1.3 + 0.2
    from_gram = distances.frechet_from_features(x, y)
    from_covariances = distances.frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert from_gram == pytest.approx(from_covariances, rel=1e-5)


def test_few_images_against_many_need_no_inner_products_of_the_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 against 3,000 with 64 features: the closed form, with another way to the root of the covariances' product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator).double() * 1.3 + 0.2
    y = torch.randn(3000, 64, generator=generator).double()
    a, b = torch.cov(x.T), torch.cov(y.T)
    roots = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt()
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * roots.sum()
    monkeypatch.delattr(distances, "gram")
    assert distances.frechet_from_features(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_weights_are_the_same_as_repeated_images() -> None:
    x, y = torch.randn(10, 30), torch.randn(8, 30)
    counts_x, counts_y = torch.tensor([2, 0, 1, 3, 0, 1, 1, 0, 1, 1]), torch.tensor([1, 1, 0, 2, 2, 0, 1, 1])
    inner = distances.gram(x, y)
    weighted = distances.frechet_replicates(inner, counts_x[None], counts_y[None])[0].item()
    repeated = distances.frechet_from_features(x.repeat_interleave(counts_x, 0), y.repeat_interleave(counts_y, 0))
    assert weighted == pytest.approx(repeated, rel=1e-9)


def test_same_images_have_no_frechet_distance(sets: tuple[Tensor, Tensor]) -> None:
    assert distances.frechet_from_features(sets[0], sets[0]) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_equals_torchmetrics_on_all_images(sets: tuple[Tensor, Tensor]) -> None:
    x, y = sets[0][:30], sets[1]
    metric = KernelInceptionDistance(feature=Flat(), normalize=True, subsets=2, subset_size=30)
    metric.update(_images(x), real=False)
    metric.update(_images(y), real=True)
    assert distances.kernel_distance(x, y) == pytest.approx(metric.compute()[0].item(), rel=1e-3)


def test_kernel_distance_is_unbiased() -> None:
    torch.manual_seed(0)
    values = torch.tensor([distances.kernel_distance(*torch.randn(2, 20, 8)) for _ in range(400)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert values.min() < 0 < values.max()


def test_kernel_replicates_leave_out_an_image_with_itself() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 8), torch.randn(60, 8) + 0.5
    inner = distances.gram(x, y)
    replicates = distances.kernel_replicates(inner, bootstrap_weights(60, 2000, 0), bootstrap_weights(60, 2000, 1))
    standard_error = replicates.std().item() / math.sqrt(2000)
    assert replicates.mean().item() == pytest.approx(distances.kernel_distance(x, y), abs=5 * standard_error)


def test_paired_kernel_distance_does_not_compare_an_image_with_its_own_copy() -> None:
    """Correlated pairs from one distribution: zero on average only if the pairs are left out."""
    torch.manual_seed(0)
    paired, naive = [], []
    for _ in range(300):
        x, y = torch.randn(2, 20, 8)
        y = 0.95 * x + math.sqrt(1 - 0.95**2) * y
        paired.append(distances.kernel_distance(x, y, paired=True))
        naive.append(distances.kernel_distance(x, y))
    values = torch.tensor(paired)
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert max(naive) < 0
    assert distances.kernel_distance(x, x, paired=True) == pytest.approx(0, abs=1e-12)


def test_inception_score_equals_torchmetrics() -> None:
    logits = torch.randn(53, 12)
    metric = InceptionScore(feature=Flat(), splits=5)
    metric.update(_images(logits))
    torch.manual_seed(7)  # torchmetrics shuffles by the global generator
    mean, std = (value.item() for value in metric.compute())
    assert distances.inception_score(logits.softmax(1), splits=5, seed=7) == pytest.approx(mean, rel=1e-5)
    assert distances.inception_score_std(logits.softmax(1), splits=5, seed=7) == pytest.approx(std, rel=1e-4)


def test_inception_score_is_the_number_of_classes_for_sure_and_even_predictions() -> None:
    assert distances.inception_score(torch.eye(10), splits=1) == pytest.approx(10)
    assert distances.inception_score(torch.full((10, 10), 0.1), splits=2) == pytest.approx(1)


def test_too_few_images_are_told() -> None:
    with pytest.raises(ConfigError, match="at least 2 images"):
        distances.kernel_distance(torch.randn(1, 4), torch.randn(5, 4))
    with pytest.raises(ConfigError, match="splits"):
        distances.inception_score(torch.eye(3), splits=4)


def test_interval_of_a_frechet_distance_covers_its_spread() -> None:
    """Over repeated draws the interval is as wide as the true spread says."""
    torch.manual_seed(1)
    scale = torch.arange(1, 61).double() ** -0.6

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randn(24, 60).double() * scale * 1.3 + 0.3 * scale, torch.randn(24, 60).double() * scale

    spread = torch.tensor([distances.frechet_from_features(*draw()) for _ in range(200)]).std().item()
    widths = []
    for trial in range(10):
        x, y = draw()
        value = distances.frechet_from_features(x, y)
        weights = bootstrap_weights(24, 150, trial), bootstrap_weights(24, 150, trial + 100)
        replicates = distances.frechet_replicates(distances.gram(x, y), *weights)
        assert replicates.mean() > value  # why percentiles would not do
        low, high = bootstrap_interval(value, replicates)
        widths.append((high - low) / (2 * 1.96))
    assert sum(widths) / 10 == pytest.approx(spread, rel=0.35)


def test_a_replicate_without_a_value_does_not_make_the_interval_nan() -> None:
    """A bootstrap sample that caught no image with a garment, say."""
    known = torch.tensor([0.9, 1.1, 1.0, 1.3])
    missing = torch.tensor([0.9, torch.nan, 1.1, 1.0, torch.nan, 1.3])
    low, high = bootstrap_interval(1.0, missing)
    assert low < 1.0 < high and (low, high) == bootstrap_interval(1.0, known)


def test_bootstrap_weights_resample_n_images_and_repeat_by_seed() -> None:
    weights = bootstrap_weights(30, 500, 3)
    assert torch.equal(weights.sum(1), torch.full((500,), 30.0).double())
    assert torch.equal(weights, bootstrap_weights(30, 500, 3))
    assert not torch.equal(weights, bootstrap_weights(30, 500, 4))
    assert (weights > 0).double().mean().item() == pytest.approx(1 - math.exp(-1), abs=0.01)


def test_wilson_interval_is_the_textbook_one() -> None:
    # Brown, Cai and DasGupta 2001: for x = n the upper end is 1 and the lower n / (n + z^2).
    low, high = wilson_interval(256, 256)
    assert (low, high) == (pytest.approx(256 / (256 + 1.959964**2)), 1.0)
    low, high = wilson_interval(5, 10)
    assert low + high == pytest.approx(1)
    assert low == pytest.approx(0.2366, abs=1e-4)


def test_weighted_means_leave_out_missing_values() -> None:
    values = torch.tensor([1.0, torch.nan, 4.0])
    weights = torch.tensor([[1.0, 1.0, 1.0], [2.0, 5.0, 1.0]])
    assert weighted_means(values, weights).tolist() == pytest.approx([2.5, 2.0])
