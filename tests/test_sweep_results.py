"""Statistics of comparisons against scipy's: training seeds, images, both."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from lora_dae.evaluation.statistics.bootstrap import wilson_interval
from lora_dae.sweep.numbers import Measured, difference, standard_error, summary


def test_seeds_alone_are_students_paired_test() -> None:
    """Without variation over images: scipy's paired t test and interval."""
    a, b = [3.1, 2.9, 3.4, 3.0], [3.6, 3.3, 3.5, 3.9]
    still = tuple(torch.zeros(50) for _ in a)
    change, low, high, p = difference(Measured(tuple(a), still, "lower"), Measured(tuple(b), still, "lower"))
    expected = stats.ttest_rel(a, b)
    assert p == pytest.approx(expected.pvalue) and change == pytest.approx(np.mean(a) - np.mean(b))
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval()))
    found = summary(Measured(tuple(a), still, "lower"))
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_1samp(a, 0).confidence_interval()))


def test_images_alone_are_a_normal_test() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=generator, dtype=torch.float64)
    one, other = Measured((2.0,), (2.0 + 0.5 * noise,), "higher"), Measured((1.0,), (1.0 + 0.1 * noise,), "higher")
    change, _, _, p = difference(one, other)
    spread = float((0.4 * noise).std())  # paired: what both share takes no part
    assert change == 1.0 and p == pytest.approx(2 * stats.t.sf(1.0 / spread, 3999))
    assert standard_error([1.0, 1.0], [0.5 * noise, 0.5 * noise])[0] == pytest.approx(float((0.5 * noise).std()))
    apart, _ = standard_error([1.0, 1.0], [0.5 * noise, 0.5 * noise], own_pairs=True)  # as of twice the images
    assert apart == pytest.approx(float((0.5 * noise).std()) / 2**0.5)


def test_what_caught_no_image_does_not_count_and_few_groups_say_it_less_surely() -> None:
    groups = torch.linspace(-1, 1, 20, dtype=torch.float64)
    with_gap = torch.cat([groups, torch.tensor([math.nan], dtype=torch.float64)])
    error, freedom = standard_error([1.0], [with_gap])
    assert error == pytest.approx(float(groups.std())) and freedom == pytest.approx(19)
    found = summary(Measured((1.0,), (with_gap,), "lower"), "fd_effnet")
    assert found.high == pytest.approx(1 + stats.t.ppf(0.975, 19) * error)
    assert math.isfinite(difference(Measured((1.0,), (with_gap,), "lower"), Measured((0.0,), (groups * 0,), "lower")).p)


def test_a_seeds_own_interval_is_that_of_its_images() -> None:
    """Wilson's of 64 of 64, which a bootstrap takes for certain; with more seeds it is not narrower by side."""
    low, high = wilson_interval(64, 64)
    one = Measured((1.0,), (torch.ones(200),), "higher", halves=((1.0 - low, high - 1.0),))
    found = summary(one, "attr_color")
    assert (found.low, found.high) == pytest.approx((low, 1.0))
    more = replace(one, values=(1.0, 1.0), replicates=one.replicates * 2, halves=one.halves * 2)
    assert summary(more, "attr_color").low == pytest.approx(low)
    assert summary(replace(more, own_pairs=True), "attr_color").low == pytest.approx(1 - (1 - low) / 2**0.5, abs=1e-3)


def test_no_interval_leaves_what_the_metric_can_be() -> None:
    wide = (torch.linspace(-9, 9, 200, dtype=torch.float64),)
    for name, least, most in (("lsd_garment", 0, math.inf), ("is_effnet", 1, math.inf), ("ssim", 0, 1)):
        found = summary(Measured((1.0,), wide, "higher"), name)
        assert found.low == least and (found.high == most or (most == math.inf and found.high > 9))
    assert summary(Measured((0.01,), wide, "lower"), "kd_effnet").low < -9  # unbiased: may be negative


def test_one_seed_without_bootstrap_tells_nothing() -> None:
    one, other = Measured((2.0,), (), "higher"), Measured((1.0,), (), "higher")
    assert difference(one, other) == (1.0, None, None, 1.0)
    assert summary(one).low is None


def test_power_is_best_at_one() -> None:
    """1.25 and 0.8 are as far from it; 1.1 is nearer than 0.7."""
    still = (torch.ones(10),)
    assert difference(Measured((1.25,), still, None), Measured((0.8,), still, None))[0] == pytest.approx(0, abs=1e-12)
    assert difference(Measured((1.1,), still, None), Measured((0.7,), still, None))[0] < 0
