"""The offline feature network: shapes, range, independence of batch and device format; clear errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics.features import (
    EffnetFeatures,
    FeatureExtractor,
    as_float_images,
    load_features,
    stack_images,
)


@pytest.fixture(scope="module")
def effnet() -> FeatureExtractor:
    return load_features("effnet")


def test_effnet_gives_features_and_probabilities_that_a_batch_does_not_change(
    effnet: FeatureExtractor,
) -> None:
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    together = effnet.extract([images])
    assert together.pooled.shape == (3, 1280) and together.probs.shape == (3, 1000)
    assert torch.allclose(together.probs.sum(1), torch.ones(3), atol=1e-5)
    apart = effnet.extract(iter([images[:1], images[1:]]))
    assert torch.allclose(together.pooled, apart.pooled, atol=1e-4)
    assert torch.allclose(effnet(as_float_images(images)), together.pooled, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_several_cores_give_what_the_network_gives_in_the_images_order(effnet: FeatureExtractor, threads: int) -> None:
    images = torch.rand(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = effnet.extract(iter([images[:9], images[9:]]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found.pooled, effnet(as_float_images(images)), atol=1e-4)
    assert not found.pooled.requires_grad


def test_effnet_is_the_packages_own_network(effnet: FeatureExtractor) -> None:
    """At 224 pixels nothing is resized: the probabilities are those of the package's forward."""
    assert isinstance(effnet, EffnetFeatures)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = effnet.network((images * 255 - 127) / 128).softmax(1)
        assert torch.allclose(effnet.features_and_probs(images)[1], expected, atol=1e-5)


def test_effnet_is_frozen_and_stays_in_evaluation_mode(effnet: FeatureExtractor) -> None:
    assert not any(p.requires_grad for p in effnet.parameters())
    effnet.train()
    assert not any(module.training for module in effnet.modules())


def test_effnet_features_follow_the_picture(effnet: FeatureExtractor) -> None:
    """A picture that is a little darker stays close in feature space, noise is far away."""
    smooth = F.interpolate(torch.rand(1, 3, 6, 6), size=(128, 128), mode="bicubic").clamp(0, 1)
    near = smooth * 0.98
    a, b, c = effnet.extract([torch.cat([smooth, near, torch.rand_like(smooth)])]).pooled
    assert (a - b).norm() < 0.5 * (a - c).norm()


def test_names_never_claim_the_standard_metrics(effnet: FeatureExtractor) -> None:
    assert effnet.names == {"fd": "fd_effnet", "kd": "kd_effnet", "is": "is_effnet"}


def test_inception_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-dae\[fid\]'.*effnet"):
        load_features("inception")


def test_unknown_features_and_no_images_are_told(effnet: FeatureExtractor) -> None:
    with pytest.raises(ConfigError, match="effnet, inception"):
        load_features("dino")
    with pytest.raises(ConfigError, match="no images"):
        effnet.extract([])


def test_images_are_brought_to_8_bits_whatever_they_come_as() -> None:
    pictures = [np.random.default_rng(i).integers(0, 256, (5, 4, 3), dtype=np.uint8) for i in range(2)]
    stacked = stack_images(pictures)
    assert stacked.shape == (2, 3, 5, 4) and stacked[1, 2, 3, 1] == pictures[1][3, 1, 2]
    exact = as_float_images(stacked)
    assert torch.equal(as_float_images(exact + 0.3 / 255), exact.clamp(max=1))
    assert exact.max() <= 1


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 1, 8, 8), "N x 3 x H x W"),
        (torch.rand(2, 3, 8, 8) * 2 - 1, r"\[0, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), "NaN"),
    ],
)
def test_wrong_images_are_told(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        as_float_images(images)
