"""One call measures everything that applies, orders methods rightly, and compares them pairwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lora_dae.config import ConfigError
from lora_dae.evaluation.attributes.classifier import AttributeClassifier
from lora_dae.evaluation.metrics.features import FeatureExtractor
from lora_dae.evaluation.metrics.measure import build_reference, evaluate_images
from lora_dae.evaluation.report.table import paired_difference, verdict


class TinyFeatures(FeatureExtractor):
    """A stand-in: 16 random filters."""

    name = "tiny"
    num_features = 16
    names = {"fd": "fd_tiny", "kd": "kd_tiny", "is": "is_tiny"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters = torch.nn.Conv2d(3, 16, 5, stride=2)

    def features_and_probs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.filters(images).abs().mean(dim=(2, 3))
        return pooled, (pooled * 20).softmax(1)


def _photos(n: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(n, 3, 5, 5, generator=generator), size=(48, 48), mode="bilinear")
    return (0.7 * coarse + 0.3 * torch.rand(n, 3, 48, 48, generator=generator)).clamp(0, 1)


def _damaged(photos: Tensor, share: float) -> Tensor:
    return torch.lerp(photos, F.avg_pool2d(F.pad(photos, [1] * 4, mode="replicate"), 3, 1), share)


@pytest.fixture(scope="module")
def extractor() -> TinyFeatures:
    return TinyFeatures()


@pytest.fixture(scope="module")
def masks() -> Tensor:
    masks = torch.zeros(24, 48, 48, dtype=torch.uint8)
    masks[:, 10:40, 10:40] = 255
    return masks


def test_paired_mode_measures_everything(extractor: TinyFeatures, masks: Tensor) -> None:
    photos = _photos()
    classifier = AttributeClassifier({"color": ["red", "blue"]}).eval()
    labels: list[dict[str, str] | None] = [{"color": "red"}] * 23 + [None]
    result = evaluate_images(
        _damaged(photos, 0.5), build_reference(photos, masks, extractor), extractor,
        attributes=labels, classifier=classifier, bootstrap=50, paired=True,
    )  # fmt: skip
    expected = "fd_tiny kd_tiny is_tiny attr_color power_low_garment power_mid_garment power_high_garment"
    expected += " lsd_garment psnr ssim psnr_garment ssim_garment gradient_garment edge_f1_garment color_garment"
    assert set(result) == set(expected.split())
    for name, metric in result.items():
        assert metric.low is not None and metric.high is not None, name
        assert metric.low <= metric.value <= metric.high, name
    assert result["power_high_garment"].value < 1


def test_the_real_photos_themselves_are_the_best_that_can_be(extractor: TinyFeatures, masks: Tensor) -> None:
    photos = _photos()
    result = evaluate_images(photos, build_reference(photos, masks, extractor), extractor, bootstrap=20, paired=True)
    assert result["fd_tiny"].value == pytest.approx(0, abs=1e-9)
    assert result["lsd_garment"].value == 0
    assert result["ssim_garment"].value == pytest.approx(1, abs=1e-5)
    assert result["psnr"].value == 100


def test_more_damage_is_told_apart_from_less(extractor: TinyFeatures) -> None:
    photos = _photos()
    reference = build_reference(photos, None, extractor)
    mild, strong = (
        evaluate_images(_damaged(photos, share), reference, extractor, bootstrap=200, paired=True)
        for share in (0.2, 0.7)
    )
    for name in ("fd_tiny", "lsd", "psnr", "ssim"):
        assert verdict(mild[name], strong[name]) == "better", name
        assert verdict(strong[name], mild[name]) == "worse", name
        assert verdict(mild[name], mild[name]) is None, name
    assert mild["power_high"].better is None and verdict(mild["power_high"], strong["power_high"]) is None
    difference = paired_difference(mild["psnr"], strong["psnr"])
    assert difference is not None and difference.low is not None and difference.high is not None
    own = mild["psnr"]
    assert own.low is not None and own.high is not None
    assert difference.high - difference.low < own.high - own.low  # pairing takes the photos' own spread out


def test_memory_and_8_bit_files_give_the_same_numbers(extractor: TinyFeatures) -> None:
    photos = _photos()
    reference = build_reference(photos, None, extractor)
    images = _damaged(photos, 0.4)
    stored = (images * 255).round().to(torch.uint8)
    for a, b in zip(
        evaluate_images(images, reference, extractor, bootstrap=0).values(),
        evaluate_images(stored, reference, extractor, bootstrap=0).values(),
        strict=True,
    ):
        assert a.value == b.value and a.low is None


def test_text_mode_has_no_fidelity_and_takes_another_number_of_photos(extractor: TinyFeatures) -> None:
    result = evaluate_images(_photos(12, 1), build_reference(_photos(), None, extractor), extractor, bootstrap=20)
    assert set(result) == {"fd_tiny", "kd_tiny", "is_tiny", "power_low", "power_mid", "power_high", "lsd"}


def test_what_is_drawn_from_the_photos_captions_is_resampled_with_them(extractor: TinyFeatures) -> None:
    """Without likeness to the photo, which it never saw; the photos themselves then have distance 0 in every sample."""
    photos = _photos()
    reference = build_reference(photos, None, extractor)
    apart = evaluate_images(photos, reference, extractor, bootstrap=20)
    result = evaluate_images(photos, reference, extractor, bootstrap=20, together=True)
    assert result.keys() == apart.keys() and "psnr" not in result
    assert result["fd_tiny"].replicates is not None and apart["fd_tiny"].replicates is not None
    assert result["fd_tiny"].replicates.abs().max() < 1e-4 < apart["fd_tiny"].replicates.min()
    with pytest.raises(ConfigError, match="one real image each"):
        evaluate_images(photos[:5], reference, extractor, together=True)


def test_what_does_not_fit_is_told(extractor: TinyFeatures, masks: Tensor) -> None:
    photos = _photos()
    reference = build_reference(photos, None, extractor)
    with pytest.raises(ConfigError, match="one real image each"):
        evaluate_images(photos[:5], reference, extractor, paired=True)
    with pytest.raises(ConfigError, match="one resolution"):
        evaluate_images(photos[..., :40], reference, extractor)
    with pytest.raises(ConfigError, match="give both or none"):
        evaluate_images(photos, reference, extractor, masks=masks, bootstrap=0)
    with pytest.raises(ConfigError, match="masks must be"):
        build_reference(photos, masks[:, :20], extractor)
    with pytest.raises(ConfigError, match="attribute rows"):
        evaluate_images(photos, reference, extractor, attributes=[{}])
