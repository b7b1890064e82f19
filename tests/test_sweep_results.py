"""Statistics of comparisons against scipy's: training seeds, images, both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lora_dae.sweep.results import Measured, difference, standard_error, summary


def test_seeds_alone_are_students_paired_test() -> None:
    """Without variation over images: scipy's paired t test and interval."""
    a, b = [3.1, 2.9, 3.4, 3.0], [3.6, 3.3, 3.5, 3.9]
    still = tuple(torch.zeros(50) for _ in a)
    change, p = difference(Measured(tuple(a), still, "lower"), Measured(tuple(b), still, "lower"))
    expected = stats.ttest_rel(a, b)
    assert p == pytest.approx(expected.pvalue) and change == pytest.approx(np.mean(a) - np.mean(b))
    found = summary(Measured(tuple(a), still, "lower"))
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_1samp(a, 0).confidence_interval()))


def test_images_alone_are_a_normal_test() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=generator, dtype=torch.float64)
    one, other = Measured((2.0,), (2.0 + 0.5 * noise,), "higher"), Measured((1.0,), (1.0 + 0.1 * noise,), "higher")
    change, p = difference(one, other)
    spread = float((0.4 * noise).std())  # paired: what both share takes no part
    assert change == 1.0 and p == pytest.approx(math.erfc(1.0 / spread / math.sqrt(2)))
    assert standard_error([1.0, 1.0], [0.5 * noise, 0.5 * noise])[0] == pytest.approx(float((0.5 * noise).std()))
    apart, _ = standard_error([1.0, 1.0], [0.5 * noise, 0.5 * noise], own_pairs=True)  # as of twice the images
    assert apart == pytest.approx(float((0.5 * noise).std()) / 2**0.5)


def test_one_seed_without_bootstrap_tells_nothing() -> None:
    one, other = Measured((2.0,), (), "higher"), Measured((1.0,), (), "higher")
    assert difference(one, other) == (1.0, 1.0)
    assert summary(one).low is None


def test_power_is_best_at_one() -> None:
    """1.25 and 0.8 are as far from it; 1.1 is nearer than 0.7."""
    still = (torch.ones(10),)
    assert difference(Measured((1.25,), still, None), Measured((0.8,), still, None))[0] == pytest.approx(0, abs=1e-12)
    assert difference(Measured((1.1,), still, None), Measured((0.7,), still, None))[0] < 0
