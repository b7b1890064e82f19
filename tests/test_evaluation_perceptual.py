"""LPIPS, MS-SSIM, CIEDE2000, edges, gradients and CLIPScore against other implementations and published values."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from compose import config
from conftest import write_tokenizer
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as reference_lpips
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from lora_dae.config import ConfigError, EvaluationConfig
from lora_dae.data.pair import Pair
from lora_dae.evaluation import controls, run
from lora_dae.evaluation.metrics import edges, texture
from lora_dae.evaluation.metrics.clip_score import ClipScore
from lora_dae.evaluation.metrics.color import ciede2000, color_difference, srgb_to_lab
from lora_dae.evaluation.metrics.features import FeatureExtractor, stack_images
from lora_dae.evaluation.metrics.observe import Batch, Meters, observe
from lora_dae.evaluation.metrics.perceptual import Lpips, composed, ms_ssim
from lora_dae.evaluation.report.table import MetricValue, Protocol, ResultsTable
from lora_dae.rules import check


def _alexnet() -> nn.Sequential:
    """torchvision's AlexNet.features with random weights."""
    torch.manual_seed(0)
    convs = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers: list[nn.Module] = []
    for k, conv in enumerate(convs):
        layers += [nn.Conv2d(*conv), nn.ReLU(inplace=True)] + ([nn.MaxPool2d(3, 2)] if k in (0, 1, 4) else [])
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def alexnet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alexnet") / "features.safetensors"
    save_file({f"features.{k}": v for k, v in _alexnet().state_dict().items()}, path)
    return path


def test_lpips_equals_torchmetrics_on_the_same_weights(alexnet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_lpips, "_get_tv_model_features", lambda net, pretrained=False: _alexnet())
    reference = reference_lpips._LPIPS(net="alex")
    a, b = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ours = Lpips(alexnet_file)
    assert ours(a, b) == pytest.approx(reference(a, b, normalize=True).flatten().tolist(), rel=1e-4)
    assert ours(a, a).tolist() == [0, 0, 0]
    assert ours(a, b) == pytest.approx(ours(b, a).tolist(), rel=1e-5)


def test_lpips_of_a_garment_is_the_mean_of_upstreams_map(alexnet_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_lpips, "_get_tv_model_features", lambda net, pretrained=False: _alexnet())
    reference = reference_lpips._LPIPS(net="alex", spatial=True)
    a, b = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(3, 64, 64)
    masks[0, 5:40, 11:50] = 1
    masks[1] = 1
    maps = reference(a, b, normalize=True)[:, 0]
    ours = Lpips(alexnet_file)
    everywhere, inside = ours.with_inside(a, b, masks)
    assert torch.equal(everywhere, ours(a, b))  # one look at the pictures gives both
    first, whole, empty = inside.tolist()
    assert first == pytest.approx(maps[0, 5:40, 11:50].mean().item(), rel=1e-4)
    assert whole == pytest.approx(maps[1].mean().item(), rel=1e-4) and math.isnan(empty)


def test_a_composed_picture_is_the_real_one_outside_the_mask() -> None:
    """Its squared error is the garment's, spread over the whole picture; what was drawn outside does not count."""
    a, b = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    masks = torch.zeros(3, 16, 16)
    masks[:2, 4:12, 4:12] = 1
    elsewhere = torch.where(masks[:, None] > 0, a, torch.rand(3, 3, 16, 16))

    def error(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().mean(dim=(1, 2, 3))

    values = composed(error, a, b, masks)
    assert values[:2] == pytest.approx((error(a[..., 4:12, 4:12], b[..., 4:12, 4:12])[:2] / 4).tolist())
    assert math.isnan(values[2]) and torch.equal(composed(error, elsewhere, b, masks)[:2], values[:2])


def test_lpips_names_a_file_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Lpips(tmp_path / "absent.safetensors")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("other", "text"):
        with pytest.raises(ConfigError, match="AlexNet features"):
            Lpips(tmp_path / f"{name}.safetensors")


def test_ms_ssim_is_torchmetrics_and_needs_its_size() -> None:
    a, b = torch.rand(2, 2, 3, 176, 176)
    b = 0.7 * a + 0.3 * b
    pooled = multiscale_structural_similarity_index_measure(a, b, sigma=1.5, data_range=1.0)
    assert ms_ssim(a, b).mean().item() == pytest.approx(pooled.item(), rel=1e-5)
    assert ms_ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)
    with pytest.raises(ConfigError, match="176 pixels"):
        ms_ssim(a[..., :168, :168], b[..., :168, :168])


# Sharma, Wu and Dalal 2005, table 1: pairs chosen to catch every wrong branch.
SHARMA = [
    (50.0, 2.6772, -79.7751, 50.0, 0.0, -82.7485, 2.0425), (50.0, 3.1571, -77.2803, 50.0, 0.0, -82.7485, 2.8615),
    (50.0, 2.8361, -74.02, 50.0, 0.0, -82.7485, 3.4412), (50.0, -1.3802, -84.2814, 50.0, 0.0, -82.7485, 1.0),
    (50.0, -1.1848, -84.8006, 50.0, 0.0, -82.7485, 1.0), (50.0, -0.9009, -85.5211, 50.0, 0.0, -82.7485, 1.0),
    (50.0, 0.0, 0.0, 50.0, -1.0, 2.0, 2.3669), (50.0, -1.0, 2.0, 50.0, 0.0, 0.0, 2.3669),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0009, 7.1792), (50.0, 2.49, -0.001, 50.0, -2.49, 0.001, 7.1792),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0011, 7.2195), (50.0, 2.49, -0.001, 50.0, -2.49, 0.0012, 7.2195),
    (50.0, -0.001, 2.49, 50.0, 0.0009, -2.49, 4.8045), (50.0, -0.001, 2.49, 50.0, 0.001, -2.49, 4.8045),
    (50.0, -0.001, 2.49, 50.0, 0.0011, -2.49, 4.7461), (50.0, 2.5, 0.0, 50.0, 0.0, -2.5, 4.3065),
    (50.0, 2.5, 0.0, 73.0, 25.0, -18.0, 27.1492), (50.0, 2.5, 0.0, 61.0, -5.0, 29.0, 22.8977),
    (50.0, 2.5, 0.0, 56.0, -27.0, -3.0, 31.9030), (50.0, 2.5, 0.0, 58.0, 24.0, 15.0, 19.4535),
    (50.0, 2.5, 0.0, 50.0, 3.1736, 0.5854, 1.0), (50.0, 2.5, 0.0, 50.0, 3.2972, 0.0, 1.0),
    (50.0, 2.5, 0.0, 50.0, 1.8634, 0.5757, 1.0), (50.0, 2.5, 0.0, 50.0, 3.2592, 0.3350, 1.0),
    (60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644),
    (63.0109, -31.0961, -5.8663, 62.8187, -29.7946, -4.0864, 1.2630),
    (61.2901, 3.7196, -5.3901, 61.4292, 2.2480, -4.9620, 1.8731),
    (35.0831, -44.1164, 3.7933, 35.0232, -40.0716, 1.5901, 1.8645),
    (22.7233, 20.0904, -46.6940, 23.0331, 14.9730, -42.5619, 2.0373),
    (36.4612, 47.8580, 18.3852, 36.2715, 50.5065, 21.2231, 1.4146),
    (90.8027, -2.0831, 1.4410, 91.1528, -1.6435, 0.0447, 1.4441),
    (90.9257, -0.5406, -0.9208, 88.6381, -0.8985, -0.7239, 1.5381),
    (6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377),
    (2.0776, 0.0795, -1.1350, 0.9033, -0.0636, -0.5514, 0.9082),
]  # fmt: skip


def test_ciede2000_is_the_published_table() -> None:
    table = torch.tensor(SHARMA, dtype=torch.float64)
    assert ciede2000(table[:, :3], table[:, 3:6]) == pytest.approx(table[:, 6].tolist(), abs=1e-4)
    assert ciede2000(table[:, 3:6], table[:, :3]) == pytest.approx(table[:, 6].tolist(), abs=1e-4)


def test_lab_of_known_colors() -> None:
    """White, black and the primaries of sRGB (Lindbloom's calculator)."""
    colors = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86]]
    assert srgb_to_lab(colors).numpy() == pytest.approx(np.array(expected), abs=0.02)


def test_color_difference_looks_inside_the_mask_only() -> None:
    a, b = torch.full((2, 3, 8, 8), 0.5), torch.full((2, 3, 8, 8), 0.5)
    masks = torch.zeros(2, 8, 8)
    masks[0, :4] = 1
    b[0, :, 4:] = torch.tensor([1.0, 0, 0])[:, None, None]
    first, empty = color_difference(a, b, masks).tolist()
    assert first == 0 and math.isnan(empty)
    assert color_difference(a, b, 1 - masks)[0] > 20


def _photos(seed: int, n: int = 8, side: int = 64) -> Tensor:
    """Pictures with the spectrum of natural photos: amplitude falls with 1 / frequency."""
    fy, fx = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None, :]
    noise = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
    shaped = torch.fft.irfft2(torch.fft.rfft2(noise) / torch.hypot(fy, fx).clamp(min=1 / side), s=(side, side))
    return (0.5 + 0.15 * shaped / shaped.std()).clamp(0, 1)


def test_gradient_distance_of_a_ramp_is_the_difference_of_slopes() -> None:
    ramp = torch.linspace(0, 1, 65)[:64].expand(1, 3, 64, 64)
    inside = torch.zeros(1, 64, 64)
    inside[:, 8:-8, 8:-8] = 1
    assert edges.gradient_distance(ramp, ramp * 0.5, inside).item() == pytest.approx(0.5 / 64, rel=1e-3)
    assert edges.gradient_distance(ramp, ramp.flip(3), inside).item() == pytest.approx(0, abs=1e-7)
    assert math.isnan(edges.gradient_distance(ramp, ramp, torch.zeros(1, 64, 64)).item())


def _square(left: int, side: int = 64) -> tuple[Tensor, Tensor]:
    image, mask = torch.full((1, 3, side, side), 0.2), torch.zeros(1, side, side)
    image[:, :, 20:44, left : left + 24] = 0.8
    mask[:, 20:44, 20:44] = 1
    return image, mask


def test_edge_f1_is_one_for_the_same_border_and_falls_as_it_moves() -> None:
    image, mask = _square(20)
    values = [edges.edge_f1(_square(20 + shift)[0], image, mask).item() for shift in (0, 1, 3, 6)]
    assert values[0] == 1 and values[1] > 0.95
    assert values[1] > values[2] > 0.3 and values[3] < values[1] - 0.2
    flat = torch.full_like(image, 0.5)
    assert edges.edge_f1(flat, image, mask).item() == 0
    assert math.isnan(edges.edge_f1(flat, flat, mask).item())


def test_damage_far_from_the_border_does_not_count_as_edge_error() -> None:
    image, mask = _square(20)
    noisy = image.clone()
    noisy[:, :, 30:34, 30:34] = 0  # in the middle of the garment
    assert edges.edge_f1(noisy, image, mask).item() == 1


def test_every_texture_metric_ranks_blurred_and_over_sharpened_photos_worse() -> None:
    """Against other real photos: not because a photo equals itself."""
    a, b = _photos(0), _photos(1)
    pixels = [(image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for image in a]
    makers = {"blurred": controls.blurred, "over-sharpened": controls.over_sharpened}
    damaged = {name: stack_images([make(p) for p in pixels]).float() / 255 for name, make in makers.items()}
    power = texture.band_power(b)
    for name, worse in damaged.items():
        assert texture.lsd(texture.band_power(worse), power) > 2 * texture.lsd(texture.band_power(a), power), name
        far, near = edges.gradient_distance(worse, b).mean(), edges.gradient_distance(a, b).mean()
        assert far > 1.3 * near, (name, far, near)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "eos_token_id": tokenizer.eos_token_id,
        **small,
    }
    config = CLIPConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **small}, projection_dim=8)
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.visual_projection.weight.data *= -1  # with this seed all cosines are negative otherwise, and all scores 0
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_papers_formula(clip_folder: Path) -> None:
    score = ClipScore(str(clip_folder))
    images = torch.rand(18, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    captions = ["a red dress", "a blue shirt in a plaid pattern"] * 9
    values = score(images, captions)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        one = processor(images=[(images[3] * 255).round().to(torch.uint8)], text=[captions[3]], return_tensors="pt")
        logit = model(**one).logits_per_image.item() / model.logit_scale.exp().item()
    assert values.shape == (18,) and values[3].item() == pytest.approx(2.5 * max(logit, 0), abs=1e-4)
    assert (values >= 0).all() and values.max() > 0


def test_a_caption_that_clip_would_cut_off_is_an_error_and_no_lower_score(clip_folder: Path, tmp_path: Path) -> None:
    score = ClipScore(str(clip_folder))
    with pytest.raises(ConfigError, match=r"tokens, CLIP reads 16"):
        score(torch.rand(1, 3, 32, 32), ["a red dress with white dots " * 10])
    with pytest.raises(ConfigError, match="as many captions"):
        score(torch.rand(2, 3, 32, 32), ["a"])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ClipScore(str(tmp_path))


def test_captions_that_clip_would_cut_off_leave_its_score_out(clip_folder: Path) -> None:
    """It would be no reason to lose a training that has asked for it."""
    asked = EvaluationConfig(clip=str(clip_folder))
    assert run.load_extras(asked, 64, ["a red dress"]).clip is not None
    extras = run.load_extras(asked, 64, ["a red dress", "a red dress with white dots " * 10])
    assert extras.clip is None and extras.definitions == []
    assert "tokens, CLIP reads 16" in extras.not_available["clip_score"]


def test_networks_of_single_pictures_go_to_the_best_device(
    alexnet_file: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's meta device stands for an accelerator."""
    networks: list[nn.Module] = []

    class Network(nn.Module):
        def __init__(self, load_weights: bool) -> None:
            super().__init__()
            self.register_buffer("weights", torch.zeros(1))
            networks.append(self)

    monkeypatch.setattr("torchmetrics.functional.image.dists.DISTSNetwork", Network)
    monkeypatch.setattr("lora_dae.evaluation.metrics.extras.best_device", lambda: torch.device("meta"))
    asked = EvaluationConfig(lpips=str(alexnet_file), clip=str(clip_folder), dists=True)
    extras = run.load_extras(asked, 64, ["a red dress"])
    lpips, clip = extras.perceptual["lpips_alex"], extras.clip
    assert isinstance(lpips, Lpips) and clip is not None and "dists" in extras.perceptual
    for module in (lpips, clip.model, *networks):
        assert {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} == {"meta"}


class _Filters(FeatureExtractor):
    """A stand-in for the feature network: 8 random filters."""

    name = "tiny"
    num_features = 8
    names = {"fd": "fd_tiny", "kd": "kd_tiny", "is": "is_tiny"}

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, 8, 5, stride=2)

    def features_and_probs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.filters(images).abs().mean(dim=(2, 3))
        return pooled, pooled.softmax(1)


@pytest.mark.parametrize(("side", "there"), [(168, False), (176, True)])
def test_ms_ssim_is_left_out_where_torchmetrics_has_no_fifth_scale(side: int, there: bool) -> None:
    a = _photos(0, 2, side)
    b = 0.7 * a + 0.3 * _photos(1, 2, side)
    values = observe([Batch(a, b)], Meters((_Filters(),))).values
    assert ("ms_ssim" in values) == there
    inside = observe([Batch(a, b, masks=torch.ones(2, side, side))], Meters((_Filters(),))).values
    assert ("ms_ssim_composed" in inside) == there
    if there:
        assert inside["ms_ssim_composed"].tolist() == pytest.approx(values["ms_ssim"].tolist())
        expected = multiscale_structural_similarity_index_measure(a, b, sigma=1.5, data_range=1.0)
        assert values["ms_ssim"].mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_options_add_their_metrics_and_rows_and_say_what_cannot_be_had(
    alexnet_file: Path, clip_folder: Path, tmp_path: Path
) -> None:
    photos = (_photos(0, 4) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    pairs = [Pair(str(i), str(i), "a red dress", p, source=p, mask=mask) for i, p in enumerate(photos)]
    held_out = run.HeldOut(pairs)
    rows = {"strength 0": photos, "frozen backbone": photos[::-1]}

    def table(*overrides: str) -> ResultsTable:
        cfg = config(tmp_path, tmp_path / "run", tmp_path / "cache", *overrides)
        check(cfg)
        extras = run.load_extras(cfg.evaluation, cfg.data.resolution, held_out.captions)
        return run.measure_rows(cfg, rows, held_out, _Filters(), extras)[0]

    with pytest.raises(ConfigError, match="evaluation.lpips=nowhere does not exist"):
        table("evaluation.lpips=nowhere")
    plain = table("evaluation.controls=false")
    asked = table(
        "evaluation.controls=true",
        f"evaluation.lpips={alexnet_file}", f"evaluation.clip={clip_folder}", "evaluation.dists=true",
        "evaluation.clean_fid=true", f"evaluation.dinov2={tmp_path}", f"evaluation.cmmd={tmp_path}",
    )  # fmt: skip
    assert set(plain.methods) == set(rows) and "clip_score" not in plain.methods["strength 0"]
    assert plain.references == {}
    assert plain.protocol.not_available.keys() == {"ms_ssim", "lpips_alex", "fd_tiny_inf"}
    for name in ("fd_dinov2", "cmmd"):
        assert "cannot be loaded" in asked.protocol.not_available[name]
    if importlib.util.find_spec("cleanfid") is None:
        assert "pip install 'lora-dae[fid]'" in asked.protocol.not_available["fid, kid"]
    assert "lpips_alex not available: evaluation.lpips names no weights" in plain.markdown()
    assert list(asked.references) == ["real, blurred", "real, over-sharpened"]
    own, other = asked.methods["strength 0"], asked.methods["frozen backbone"]
    assert own["lpips_alex"].value == 0 < asked.references["real, blurred"]["lpips_alex"].value
    assert own["lpips_alex_garment"].value == 0 < asked.references["real, blurred"]["lpips_alex_garment"].value
    assert "lpips_alex" not in other  # it saw no source, so there is no photo that it should agree with
    assert own["color_garment"].value == 0 < asked.references["real, over-sharpened"]["color_garment"].value
    assert own["gradient_garment"].value == 0 and own["edge_f1_garment"].value == 1
    for name in ("real, blurred", "real, over-sharpened"):
        assert asked.references[name]["gradient_garment"].value > own["gradient_garment"].value
    assert "clip score: 2.5 max(cos, 0)" in asked.protocol.line() and own["clip_score"].value >= 0
    if importlib.util.find_spec("torchvision") is None:
        assert "torchvision" in asked.protocol.not_available["dists"]
    blocks = asked.blocks()
    assert blocks["Edges, color and pattern of the garment"] == ["gradient_garment", "edge_f1_garment", "color_garment"]
    assert {"psnr", "ssim", "lpips_alex"} <= set(blocks["Fidelity to the real photo"]) and "Other" not in blocks


def test_marks_are_corrected_for_the_number_of_comparisons() -> None:
    """A difference of 2.3 standard errors is told apart alone, and not among thirty comparisons."""
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()
    base = MetricValue(1.0, 0.0, 2.0, "higher", torch.ones(2000))
    better = MetricValue(3.3, 1.0, 5.0, "higher", 3.3 + noise)
    same = MetricValue(1.1, 0.0, 3.0, "higher", 1.1 + noise)
    protocol = Protocol(9, 9, "test", 64, "ddim", 4, 2.0, None, [1], "effnet", 2000)
    alone = ResultsTable({"a": {"x": base}, "b": {"x": better}}, protocol)
    assert alone.cell("b", "x")[2] == "better" and alone.corrected()["b", "x"] == pytest.approx(0.0214, abs=2e-4)
    many = {f"y{k}": base for k in range(29)}
    among = ResultsTable({"a": {"x": base, **many}, "b": {"x": better, **{k: same for k in many}}}, protocol)
    assert among.cell("b", "x")[2] == "" and "for 30 comparisons" in among.legend()
