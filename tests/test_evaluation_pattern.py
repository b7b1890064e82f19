"""Local pattern fidelity: patches of the garment against those of the source, wherever these lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_dae.evaluation.controls import blurred, over_sharpened
from lora_dae.evaluation.metrics.color import ciede2000, srgb_to_lab
from lora_dae.evaluation.metrics.features import EffnetFeatures, stack_images
from lora_dae.evaluation.metrics.pattern import CELLS, PatternDistance, _statistics, pattern_distance

SIDE = 128


@pytest.fixture(scope="module")
def distance() -> PatternDistance:
    found = pattern_distance(EffnetFeatures())
    assert found is not None
    return found


def _cloth(kind: str, left: int, top: int, phase: float = 0.0) -> np.ndarray:
    """A 64-pixel square of cloth on gray, uint8 (128, 128, 3)."""
    y, x = np.mgrid[:64, :64]
    wave = {
        "plaid": np.sin(x * 0.8 + phase) + np.sin(y * 0.8 + phase),
        "stripes": 2 * np.sin(x * 0.5 + phase),
        "dots": 4 * ((np.sin(x * 0.6 + phase) * np.sin(y * 0.6 + phase)) > 0.4) - 2,
    }[kind]
    rng = np.random.default_rng(left + top)
    picture = np.full((SIDE, SIDE, 3), 128.0)
    color = 128 + 40 * wave[..., None] * np.array([1.0, 0.3, -0.6])
    picture[top : top + 64, left : left + 64] = color
    return np.clip(picture + rng.normal(0, 3, picture.shape), 0, 255).astype(np.uint8)


def _batch(*pictures: np.ndarray) -> Tensor:
    return stack_images(pictures).float() / 255


def _mask(left: int, top: int) -> Tensor:
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, top : top + 64, left : left + 64] = 1
    return mask


@pytest.mark.parametrize("kind", ["plaid", "stripes", "dots"])
def test_the_same_cloth_elsewhere_is_near_and_every_damage_is_farther(distance: PatternDistance, kind: str) -> None:
    source, real = _cloth(kind, 20, 30), _cloth(kind, 44, 36, phase=0.9)
    other = _cloth("stripes" if kind == "plaid" else "plaid", 44, 36)
    mask = _mask(44, 36)
    values = {
        name: distance(_batch(made), _batch(real), _batch(source), mask).item()
        for name, made in (
            ("real", real), ("redrawn", _cloth(kind, 44, 36, phase=2.1)), ("blurred", blurred(real)),
            ("sharpened", over_sharpened(real)), ("other", other), ("nothing", _cloth(kind, 0, 0) * 0 + 128),
        )
    }  # fmt: skip
    assert 0 < values["real"] < 0.5
    for name in ("blurred", "sharpened", "other", "nothing"):
        assert values[name] > 1.3 * max(values["real"], values["redrawn"]), values


def test_only_the_garment_counts_and_no_garment_is_no_number(distance: PatternDistance) -> None:
    source, real = _batch(_cloth("plaid", 20, 30)), _batch(_cloth("plaid", 44, 36))
    spoiled = real.clone()
    spoiled[..., :20] = 0
    mask = _mask(44, 36)
    clean = distance(real, real, source, mask)
    assert torch.allclose(clean, distance(spoiled, real, source, mask), atol=1e-3)
    assert distance(real, real, source, torch.zeros(1, SIDE, SIDE)).isnan().all()
    many = distance(
        real.repeat(18, 1, 1, 1), real.repeat(18, 1, 1, 1), source.repeat(18, 1, 1, 1), mask.repeat(18, 1, 1)
    )
    assert many.shape == (18,) and torch.allclose(many, clean.expand(18), atol=1e-5)


def test_the_sources_color_is_read_where_the_garment_lies_in_it(distance: PatternDistance) -> None:
    """The cloth's own mean color, though it lies elsewhere in the source, and not the background's."""
    source, real = _cloth("plaid", 10, 20), _cloth("plaid", 44, 36, phase=0.9)
    found = distance.source_color(_batch(real), _batch(source), _mask(44, 36))
    own = srgb_to_lab(_batch(source).permute(0, 2, 3, 1))[:, 20:84, 10:74].mean(dim=(1, 2))
    gray = srgb_to_lab(torch.full((1, 3), 128 / 255))
    assert ciede2000(found, own).item() < 0.5 * ciede2000(gray, own).item()
    assert distance.source_color(_batch(real), _batch(source), torch.zeros(1, SIDE, SIDE)).isnan().all()


def test_statistics_of_a_patch_are_mean_and_deviation_of_its_window() -> None:
    maps = torch.rand(1, 2, 56, 56, generator=torch.Generator().manual_seed(0))
    found = _statistics(maps).reshape(CELLS, CELLS, 4)
    window = maps[0, :, 2 * 5 - 2 : 2 * 5 + 4, 2 * 9 - 2 : 2 * 9 + 4].flatten(1)  # cell (5, 9) and one on each side
    assert torch.allclose(found[5, 9, :2], window.mean(1), atol=1e-6)
    assert torch.allclose(found[5, 9, 2:], window.std(1, correction=0), atol=1e-5)


def test_other_networks_have_no_pattern_distance() -> None:
    assert pattern_distance(torch.nn.Conv2d(3, 4, 3)) is None
