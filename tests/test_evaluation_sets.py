"""Distances between sets beyond FID and KID: CMMD, large sets, extrapolation, published networks on small weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics import distances, grouped
from lora_dae.evaluation.metrics.extrapolate import frechet_against_size
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features
from lora_dae.evaluation.metrics.measure import build_reference, evaluate_images
from lora_dae.evaluation.metrics.networks import CleanFid, ClipEmbeddings, DinoV2
from lora_dae.evaluation.metrics.observe import Observed
from lora_dae.evaluation.metrics.sizes import add_infinity, size_curves
from lora_dae.evaluation.metrics.texture import BandPower
from lora_dae.evaluation.report.protocol import Protocol
from lora_dae.evaluation.report.table import MetricValue, p_value
from lora_dae.evaluation.statistics.bootstrap import bootstrap_interval, bootstrap_weights


def _features(n: int, d: int = 6, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(0.5, 2, d) + shift


def _published_cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 5 of Gretton et al. 2012 with CMMD's constants, pair by pair."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[math.exp(-((p - q) ** 2).sum() / 200) for q in b] for p in a]))

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def test_cmmd_is_the_published_formula() -> None:
    x, y = F.normalize(_features(9), dim=1), F.normalize(_features(7, shift=0.4, seed=1), dim=1)
    assert distances.cmmd_distance(x, y) == pytest.approx(_published_cmmd(x.numpy(), y.numpy()), rel=1e-5)
    twice = distances.cmmd_replicates(distances.gram(x, y), 2 * torch.ones(1, 9), torch.ones(1, 7))
    assert twice.item() == pytest.approx(distances.cmmd_distance(torch.cat([x, x]), y), rel=1e-9)


def _left_out(
    x: Tensor, y: Tensor, groups_x: Tensor, groups_y: Tensor, distance: Callable[[Tensor, Tensor], float]
) -> list[float]:
    return [distance(x[groups_x != g], y[groups_y != g]) for g in range(grouped.GROUPS)]


def test_large_sets_give_the_distances_of_small_ones_with_groups_left_out() -> None:
    """Block sums and group moments against the plain functions on what is left."""
    x, y = _features(90, shift=0.3) + 50, _features(70, seed=1) + 50  # far from zero: digits must not be lost
    groups = grouped.groups_of(90, 0), grouped.groups_of(70, 1)
    assert sorted(groups[0].bincount().tolist()) == [4] * 10 + [5] * 10
    frechet = grouped.grouped_frechet(x, y, *groups)
    expected = _left_out(x, y, *groups, distances.frechet_from_features)
    assert frechet.tolist() == pytest.approx(expected, rel=1e-6)
    for paired in (False, True):
        n = 70 if paired else 90
        value, left_out = grouped.grouped_mmd(
            x[:n], y, groups[1] if paired else groups[0], groups[1], distances.polynomial_kernel, True, paired
        )
        assert value == pytest.approx(distances.kernel_distance(x[:n], y, paired), rel=1e-9)
        own = groups[1] if paired else groups[0]
        expected = _left_out(x[:n], y, own, groups[1], lambda a, b, p=paired: distances.kernel_distance(a, b, p))
        assert left_out.tolist() == pytest.approx(expected, rel=1e-9)
    value, left_out = grouped.grouped_mmd(x, y, *groups, distances.gaussian_kernel, skip_same=False)
    assert 1000 * value == pytest.approx(distances.cmmd_distance(x, y), rel=1e-8)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    """For a mean and equal groups the delete-a-group jackknife is the standard error of the group means, exactly."""
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    groups = grouped.groups_of(200, 0)
    left_out = torch.stack([values[groups != g].mean() for g in range(grouped.GROUPS)])
    means = torch.stack([values[groups == g].mean() for g in range(grouped.GROUPS)])
    replicates = grouped.as_replicates(values.mean().item(), left_out)
    assert replicates.std().item() == pytest.approx(means.std().item() / math.sqrt(grouped.GROUPS), rel=1e-9)


def test_twenty_replicates_are_judged_by_students_distribution() -> None:
    """Leaving out one of twenty values at a time, p and interval of their mean are those of the one-sample t-test."""
    values = torch.randn(20, generator=torch.Generator().manual_seed(3)).double() + 0.4
    left_out = (values.sum() - values) / 19
    mean, replicates = values.mean().item(), grouped.as_replicates(values.mean().item(), left_out)
    test = stats.ttest_1samp(values.numpy(), 0)
    zero = MetricValue(0.0, None, None, "higher", torch.zeros(20).double())
    p = p_value(MetricValue(mean, None, None, "higher", replicates), zero)
    assert p == pytest.approx(test.pvalue, rel=1e-6)
    assert bootstrap_interval(mean, replicates) == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-6)


@pytest.mark.parametrize(
    ("n", "m", "large"),
    [(512, 512, True), (511, 5000, False), (40, 8193, True), (8193, 40, True), (39, 8193, False), (40, 8192, False)],
)
def test_few_images_against_very_many_are_measured_as_large_sets(n: int, m: int, large: bool) -> None:
    """Two images a group are left on the small side; the inner products of 8,193 images would take half a gigabyte."""
    assert grouped.is_large(n, m) == large


def test_intervals_of_large_sets_are_as_wide_as_the_bootstraps() -> None:
    x, y = _features(150, 4, 0.3), _features(150, 4, seed=1)
    inner = distances.gram(x, y)
    weights = bootstrap_weights(150, 300, 0), bootstrap_weights(150, 300, 1)
    wide = distances.frechet_replicates(inner, *weights).std().item()
    groups = grouped.groups_of(150, 0), grouped.groups_of(150, 1)
    value = distances.frechet_from_features(x, y)
    narrow = grouped.as_replicates(value, grouped.grouped_frechet(x, y, *groups)).std().item()
    assert narrow == pytest.approx(wide, rel=0.5)  # 19 degrees of freedom: their spread is known to a third


def test_a_line_in_one_over_n_ends_at_the_true_distance() -> None:
    """Two Gaussians whose distance is known: few images give far too much, the end of the line does not."""
    x, y = _features(2000, 24), _features(40_000, 24, shift=0.2, seed=1)
    curve = frechet_against_size(x, y)
    true = 24 * 0.2**2
    assert curve.infinity is not None and curve.sizes[0] == 500 and curve.sizes[-1] == 2000
    assert curve.values[0] > curve.values[-1] > true  # biased upward, less with more images
    value, low, high = curve.infinity
    assert abs(value - true) < abs(curve.values[-1] - true) and low < value < high


def test_the_interval_at_the_end_of_the_line_holds_the_true_distance() -> None:
    """In 57 of 60 draws as 95 % says, give or take two standard deviations."""
    y, true, held = _features(3000, 4, seed=1), 4 * 0.3**2, 0
    nobody = torch.full((len(y),), -1)
    for k in range(60):
        x = _features(256, 4, shift=0.3, seed=100 + k)
        value, groups = distances.frechet_from_features(x, y), grouped.groups_of(256, k)
        left_out = torch.tensor(_left_out(x, y, groups, nobody, distances.frechet_from_features))
        high = bootstrap_interval(value, grouped.as_replicates(value, left_out))[1]
        end = frechet_against_size(x, y, k, high - value).infinity
        assert end is not None
        held += end[1] < true < end[2]
    assert 54 <= held <= 60


def test_the_end_of_the_line_is_in_the_table_with_its_protocol_and_interval() -> None:
    x, y = _features(400, 6, shift=0.3), _features(300, 6, seed=1)
    extractor = FeatureExtractor()
    extractor.name, extractor.names = "tiny", {"fd": "fd_tiny"}
    features = {n: {"tiny": Features(f, torch.empty(len(f), 0))} for n, f in (("few", x[:80]), ("all", x), ("y", y))}
    power = BandPower(torch.ones(400, 3, 1), torch.ones(400))
    seen = {n: Observed(features[n], power, False, {}) for n in ("few", "all")}
    own = MetricValue(distances.frechet_from_features(x, y), 0.0, 3.0, "lower")
    methods: dict[str, dict[str, MetricValue]] = {n: {"fd_tiny": own} for n in seen}
    methods["few"] = {"fd_tiny": MetricValue(own.value, None, None, "lower")}
    curves = size_curves(seen, methods, features["y"], [extractor], 0)
    protocol = Protocol(400, 300, "test", 8, None, None, None, None, [], "tiny", 0)
    add_infinity(methods, curves, protocol)
    end = methods["all"]["fd_tiny_inf"]
    assert end.high is not None and end.low is not None
    assert end.high - end.value > 3.0 - own.value  # never surer of the end than of what was measured
    assert "fd_tiny_inf: end of a line in 1 / N" in protocol.line() and "fd_tiny_inf" not in protocol.not_available


def test_too_few_images_have_no_end_of_the_line_and_say_why() -> None:
    curve = frechet_against_size(_features(100, 60), _features(90, 60, seed=1))
    assert len(curve.values) == 8 and curve.infinity is None and curve.why_not == "needs 240 images for 60 features"
    assert frechet_against_size(_features(40), _features(90)).values == []


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip_vision")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=8, **small)
    ).save_pretrained(folder)
    return folder


def _images(n: int = 3) -> Tensor:
    pixels = torch.randint(0, 256, (n, 3, 40, 30), generator=torch.Generator().manual_seed(0))
    return pixels.float() / 255


def test_dinov2_sees_what_dgm_eval_shows_it(dino_folder: Path) -> None:
    """PIL's bicubic resize of the 8-bit picture, ImageNet's mean, the normalized class token."""
    images = _images()
    features = DinoV2(str(dino_folder)).extract([images]).pooled
    picture = Image.fromarray((images[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    resized = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC)) / 255
    normalized = (resized - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    with torch.no_grad():
        out = model(torch.from_numpy(normalized).permute(2, 0, 1)[None].float()).last_hidden_state[:, 0]
    assert torch.allclose(features[1], out[0], atol=1e-4)


def test_cmmds_embeddings_are_clips_of_unit_length(clip_vision: Path) -> None:
    """At CLIP's own size nothing is resized: transformers' processor and model give the same direction."""
    images = F.interpolate(_images(), size=(32, 32)).mul(255).round() / 255
    embedded = ClipEmbeddings(str(clip_vision)).extract([images]).pooled
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    inputs = processor([(i * 255).round().to(torch.uint8) for i in images], return_tensors="pt")
    with torch.no_grad():
        out = CLIPVisionModelWithProjection.from_pretrained(clip_vision).eval()(**inputs).image_embeds
    assert torch.allclose(embedded, F.normalize(out, dim=1), atol=1e-4)
    assert embedded.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path: Path) -> None:
    for load in (lambda: DinoV2("nobody/has-this"), lambda: ClipEmbeddings(str(tmp_path))):
        with pytest.raises(ConfigError, match="cannot be loaded") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_distances_are_the_numbers_that_clean_fid_gave() -> None:
    """fid_from_feats and kernel_distance of clean-fid 0.1.35 (scipy 1.17) on these features."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(50, 12)) * np.linspace(0.5, 2, 12) + 0.3)
    y = torch.from_numpy(rng.normal(size=(50, 12)))
    assert x[0, 0].item() == pytest.approx(0.36286511, abs=1e-8)  # the features that it was given
    assert distances.frechet_from_features(x, y) == pytest.approx(6.914969349120739, rel=1e-6)
    assert distances.kernel_distance(x, y) == pytest.approx(1.1242194237432925, rel=1e-6)
    groups = grouped.groups_of(50, 0)
    large = grouped.grouped_mmd(x, y, groups, groups, distances.polynomial_kernel, skip_same=True)[0]
    assert large == pytest.approx(1.1242194237432925, rel=1e-6)


def test_fid_and_kid_are_clean_fids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own functions on features of its own resize, with a small network in place of the downloaded one."""
    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install 'lora-dae[fid]'")
    fid = pytest.importorskip("cleanfid.fid", reason="clean-fid is not installed: pip install 'lora-dae[fid]'")
    torch.manual_seed(0)
    filters = torch.nn.Conv2d(3, 12, 9, stride=4)

    def network(pixels: Tensor) -> Tensor:
        assert pixels.shape[2:] == (299, 299) and pixels.max() > 1
        with torch.no_grad():
            return filters(pixels / 128 - 1).abs().mean(dim=(2, 3))

    monkeypatch.setattr("cleanfid.features.build_feature_extractor", lambda *args, **kwargs: network)
    extractor = CleanFid()
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(0, 256, (20, 3, 48, 40), generator=generator, dtype=torch.uint8)
    b = torch.randint(0, 200, (20, 3, 48, 40), generator=generator, dtype=torch.uint8)
    x, y = (extractor.extract([s]).pooled for s in (a, b))
    resize = fid.build_resizer("clean")
    arrays = [np.stack([resize(i) for i in s.permute(0, 2, 3, 1).numpy()]).transpose(0, 3, 1, 2) for s in (a, b)]
    theirs = [fid.get_batch_features(torch.from_numpy(s), network, "cpu") for s in arrays]
    assert np.allclose(x.numpy(), theirs[0], atol=1e-5)
    assert distances.frechet_from_features(x, y) == pytest.approx(fid.fid_from_feats(*theirs), rel=1e-3)
    # Subsets as large as the sets: clean-fid's random draws are then always all images.
    assert distances.kernel_distance(x, y) == pytest.approx(fid.kernel_distance(*theirs, num_subsets=2), rel=1e-4)
    # The whole way, as evaluate.py goes it, under the published names.
    numbers = evaluate_images(a, build_reference(b, None, extractor), extractor, bootstrap=0)
    assert numbers["fid"].value == pytest.approx(fid.fid_from_feats(*theirs), rel=1e-3)
    assert numbers["kid"].value == pytest.approx(fid.kernel_distance(*theirs, num_subsets=2), rel=1e-3)
