"""Methods of the sampler: neutral settings draw bit for bit what plain sampling draws; each formula by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from hydra import compose, initialize_config_dir
from PIL import Image, ImageFilter

from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.config import METHODS, BackboneConfig, Config, ConfigError, SamplingConfig, conf_dir, from_dict, register
from lora_dae.diffusion import PREDICTION_TYPES
from lora_dae.enhancement.bands import split_bands
from lora_dae.rules import check
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.loop import (
    Conditions,
    Guidance,
    initial_noise,
    noise_generator,
    sample_latents,
)
from lora_dae.sampling.method import Method, Step
from lora_dae.sampling.methods import build_method
from lora_dae.sampling.methods.steps import DetailDaemon, haar_low
from lora_dae.sampling.schedulers import build_scheduler

NEUTRAL: dict[str, dict[str, float]] = {
    "none": {},
    "freeu": {"s1": 1, "s2": 1, "b1": 1, "b2": 1},
    "sag": {"scale": 0},
    "pag": {"scale": 0},
    "rescale": {"phi": 0},
    "detail_daemon": {"amount": 0},
    "wavelet": {"low": 0, "high": 0},
    "frequency": {"low": 1, "high": 1},
    "band_gain": {"log_gain": 0},
    "deepcache": {"interval": 1},
}


@pytest.fixture(scope="module")
def unet(tiny_backbone: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_backbone / "unet").eval()


def base(kind: str = "v_prediction") -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def draw(
    unet: torch.nn.Module, method: Method | None, scheduler: str = "ddim", kind: str = "v_prediction"
) -> torch.Tensor:
    text = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    noise = initial_noise(0, [0, 1], (8, 16, 16))
    generators = [noise_generator(1, i) for i in range(2)]
    conditions = Conditions(text[:2], text[2])
    chain = build_scheduler(scheduler, base(kind))
    return sample_latents(unet, chain, noise, conditions, Guidance(3.0), 4, method, generators)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_neutral_is_plain_and_published_settings_are_not(name: str, unet: UNet2DConditionModel) -> None:
    plain = draw(unet, None)
    before = [type(processor) for processor in unet.attn_processors.values()]
    if name in NEUTRAL:
        assert torch.equal(draw(unet, build_method(name, NEUTRAL[name])), plain)
    changed = draw(unet, build_method(name, {}))
    assert torch.isfinite(changed).all()
    # An unsharp mask leaves latents alone; norm 15 of projected guidance still projects.
    assert torch.equal(changed, plain) == (name in ("none", "unsharp"))
    assert [type(processor) for processor in unet.attn_processors.values()] == before
    assert torch.equal(draw(unet, None), plain)  # nothing was left behind


@pytest.mark.parametrize(
    ("scheduler", "kind"),
    [("ddim", "epsilon"), ("ddim", "sample"), ("dpm++", "v_prediction"), ("euler", "epsilon"),
     ("euler", "v_prediction"), ("euler_a", "v_prediction")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["apg", "sag", "detail_daemon", "wavelet"])
def test_every_parameterization_and_solver(name: str, scheduler: str, kind: str, unet: UNet2DConditionModel) -> None:
    found = draw(unet, build_method(name, {}), scheduler, kind)
    assert torch.isfinite(found).all() and not torch.equal(found, draw(unet, None, scheduler, kind))


def step(predictions: dict[str, torch.Tensor], guidance: Guidance, kind: str = "v_prediction") -> Step:
    scheduler = base(kind)
    scheduler.set_timesteps(10)
    sample = torch.randn(predictions["full"].shape, generator=torch.Generator().manual_seed(5))
    t = scheduler.timesteps[4]
    alpha = float(scheduler.alphas_cumprod[t]) ** 0.5
    conditions = Conditions(torch.zeros(2, 3, 4), torch.zeros(3, 4))
    level = (alpha, (1 - alpha**2) ** 0.5)
    return Step(torch.nn.Identity(), scheduler, t, level, sample, conditions, guidance, predictions)


def outputs(seed: int = 0) -> dict[str, torch.Tensor]:
    none, full = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"none": none, "full": full}


def test_projected_guidance_adds_nothing_along_the_prediction() -> None:
    """eta = 0: <x0 - x0_c, x0_c> = 0; its length is at most norm * (w - 1); eta = 1 without norm is plain guidance."""
    at = step(outputs(), Guidance(4.0))
    cond = at.x0(at.conditional).flatten(1)
    update = at.x0(build_method("apg", {"norm": 2.5, "momentum": 0}).guide(at)).flatten(1) - cond
    cosine = (update * cond).sum(1) / update.norm(dim=1) / cond.norm(dim=1)
    assert cosine.abs().max() < 1e-5 and (update.norm(dim=1) <= 2.5 * 3 * 1.0001).all()
    plain = build_method("apg", {"eta": 1, "norm": 0, "momentum": 0}).guide(at)
    torch.testing.assert_close(plain, Method().guide(at))
    one = step({"full": outputs()["full"]}, Guidance(1.0))  # the loop asks the network for no more
    assert torch.equal(build_method("apg", {}).guide(one), one.conditional)


def test_projected_guidance_remembers_the_steps_before() -> None:
    """Two steps with momentum m: the second update is that of d2 + m d1."""
    first, second = step(outputs(0), Guidance(2.0)), step(outputs(1), Guidance(2.0))
    method = build_method("apg", {"eta": 1, "norm": 0, "momentum": -0.5})
    method.guide(first)
    differences = [s.x0(s.conditional) - s.x0(s.predictions["none"]) for s in (first, second)]
    expected = second.x0(second.conditional) + differences[1] - 0.5 * differences[0]
    torch.testing.assert_close(second.x0(method.guide(second)), expected, atol=1e-5, rtol=1e-5)


def test_rescaled_guidance_has_the_conditional_deviation() -> None:
    at = step(outputs(), Guidance(6.0))
    full = build_method("rescale", {"phi": 1.0}).guide(at)
    torch.testing.assert_close(full.std((1, 2, 3)), at.conditional.std((1, 2, 3)))
    half = build_method("rescale", {"phi": 0.5}).guide(at)
    torch.testing.assert_close(half, 0.5 * full + 0.5 * Method().guide(at))


def test_frequencies_have_scales_of_their_own() -> None:
    """A constant difference is low frequency alone: only its scale counts. Both scales alike are one guidance scale."""
    full = torch.randn(2, 4, 8, 8)
    at = step({"none": full - 0.7, "full": full}, Guidance(3.0))
    found = build_method("frequency", {"low": 0.5, "high": 9.0}).guide(at)
    torch.testing.assert_close(found, full + 0.5 * 2.0 * 0.7)
    at = step(outputs(), Guidance(3.0))
    twice = build_method("frequency", {"low": 2.0, "high": 2.0}).guide(at)
    torch.testing.assert_close(twice, at.conditional + 2 * 2 * (at.conditional - at.predictions["none"]))


def test_detail_daemon_lowers_sigma_in_the_middle_alone() -> None:
    method = DetailDaemon(amount=0.5, start=0.2, end=0.8)
    assert [method.multiplier(x) for x in (0.0, 0.2, 0.8, 1.0)] == [0.0] * 4
    assert method.multiplier(0.5) == pytest.approx(1.0) and method.multiplier(0.35) == pytest.approx(0.5)
    scheduler = base()
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[5]
    cumprod = float(scheduler.alphas_cumprod[t])
    alpha, sigma = method.seen_level(scheduler, t, 0.5, 4.0)  # type: ignore[misc]
    assert sigma / alpha == pytest.approx((1 - 0.1 * 0.5 * 4) * math.sqrt((1 - cumprod) / cumprod))
    assert alpha**2 + sigma**2 == pytest.approx(1.0)
    alpha, sigma = DetailDaemon(9.0, 0.2, 0.8).seen_level(scheduler, t, 0.5, 9.0)  # type: ignore[misc]
    assert 0 < sigma < 1e-5  # as in the node: never below 0


@pytest.mark.parametrize("solver", ["heun", "pndm", "dpm++"])
def test_a_noise_level_has_one_position_and_one_scale(solver: str, unet: UNet2DConditionModel) -> None:
    """Also where a solver asks the network twice at it."""
    seen: list[tuple[float, float, float]] = []

    class Spy(Method):
        def seen_level(self, scheduler, timestep, position, guidance):  # noqa: ANN001, ANN202
            seen.append((float(timestep), position, guidance))

    draw(unet, Spy(), solver)
    times = list(dict.fromkeys(t for t, _, _ in seen))
    assert {(t, p) for t, p, _ in seen} == {(t, k / (len(times) - 1)) for k, t in enumerate(times)}
    assert {scale for _, _, scale in seen} == {3.0}
    assert len(seen) > len(times) or solver == "dpm++"


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_a_network_that_knows_x0_is_not_misled(kind: str) -> None:
    """Told another noise level it still answers x0, and the chain ends there: only its errors are shifted."""
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    ratios = base().alphas_cumprod

    class Knows(torch.nn.Module):
        def forward(self, x, t, encoder_hidden_states, return_dict):  # noqa: ANN001, ANN201
            low = int(math.floor(float(t)))
            # the level between two table entries, log-linear in sigma / alpha as the caller interpolates
            logs = [0.5 * math.log((1 - float(ratios[i])) / float(ratios[i])) for i in (low, min(low + 1, 999))]
            ratio = math.exp(logs[0] + (float(t) - low) * (logs[1] - logs[0]))
            alpha = (1 + ratio**2) ** -0.5
            sigma = ratio * alpha
            noise = (x - alpha * target) / sigma
            return ({"epsilon": noise, "v_prediction": alpha * noise - sigma * target, "sample": target}[kind],)

    noise = torch.randn(2, 4, 8, 8)
    conditions = Conditions(torch.zeros(2, 3, 4), torch.zeros(3, 4))
    scheduler = base(kind)
    found = sample_latents(Knows(), scheduler, noise, conditions, Guidance(), 8, DetailDaemon(3.0, 0.0, 1.0))
    expected = sample_latents(Knows(), scheduler, noise, conditions, Guidance(), 8)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_wavelet_correction_by_hand() -> None:
    """Blocks of 2 x 2: their mean is the low band; equal gains in both move the sample as a whole.

    The weights are those of AMAP-ML/DCW: t_steps[i] / sigma_max, and what lacks to 1.
    """
    at = step(outputs(), Guidance(1.0))
    reached = torch.randn(2, 4, 8, 8)
    low = haar_low(reached)
    assert torch.equal(low[..., ::2, ::2], low[..., 1::2, 1::2])
    torch.testing.assert_close(haar_low(low), low)
    torch.testing.assert_close(haar_low(reached - low), torch.zeros_like(low), atol=1e-6, rtol=0)
    sigmas = ((1 - base().alphas_cumprod) / base().alphas_cumprod).sqrt()
    share = float(sigmas[at.timestep] / sigmas[-1])
    method = build_method("wavelet", {"low": 0.1 / share, "high": 0.1 / (1 - share)})
    moved = method.after(at, at.conditional, reached, (0.8, 0.6))
    torch.testing.assert_close(moved, reached + 0.1 * (reached - at.x0(at.conditional)), atol=1e-5, rtol=1e-4)
    alone = build_method("wavelet", {"low": 0.1, "high": 0.0}).after(at, at.conditional, reached, (0.8, 0.6))
    torch.testing.assert_close(alone, reached + 0.1 * share * haar_low(reached - at.x0(at.conditional)))


def test_wavelet_correction_has_a_share_where_the_terminal_snr_is_zero() -> None:
    """By the level of Stable Diffusion's own last step: the one before pure noise would leave all others none."""
    at = step(outputs(), Guidance(1.0))
    flat = DDIMScheduler.from_config(at.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    reached, method = torch.randn(2, 4, 8, 8), build_method("wavelet", {"low": 0.1, "high": 0.0})
    found = method.after(replace(at, scheduler=flat), at.conditional, reached, (0.8, 0.6))
    plain = method.after(at, at.conditional, reached, (0.8, 0.6))
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-3)


def test_a_gain_of_bands_leaves_what_is_below_them_and_high_noise_alone() -> None:
    at = step(outputs(), Guidance(3.0))
    plain, gained = at.x0(Method().guide(at)), at.x0(build_method("band_gain", {"log_gain": math.log(1.5)}).guide(at))
    bands, rest = split_bands(plain, 3)
    torch.testing.assert_close(gained, 1.5 * bands.sum(0) + rest, atol=1e-5, rtol=1e-4)
    noisy = replace(at, level=(0.1, 0.99**0.5))
    assert torch.equal(build_method("band_gain", {}).guide(noisy), Method().guide(noisy))


def test_unsharp_mask_is_pixel_plus_what_a_blur_removes() -> None:
    image = np.random.default_rng(0).integers(60, 190, (1, 32, 32, 3), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(image[0]).filter(ImageFilter.GaussianBlur(1.0))).astype(float)
    expected = np.clip(image[0] + 0.5 * (image[0] - blurred), 0, 255)
    found = build_method("unsharp", {"amount": 0.5, "radius": 1.0}).picture(image)
    assert np.abs(found[0] - expected).max() <= 1
    assert np.array_equal(build_method("unsharp", {"amount": 0.0}).picture(image), image)


def test_fresh_noise_belongs_to_the_image(unet: UNet2DConditionModel) -> None:
    """Euler ancestral draws noise in every step; batches do not matter to it either."""
    text = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))

    def one(indices: list[int]) -> torch.Tensor:
        noise = initial_noise(0, indices, (8, 16, 16))
        own = [noise_generator(1, i) for i in indices]
        conditions = Conditions(text[indices], text[2])
        return sample_latents(unet, build_scheduler("euler_a", base()), noise, conditions, Guidance(2.0), 3, None, own)

    torch.testing.assert_close(one([0, 1])[1:], one([1]), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(one([1]), draw(unet, None, "euler_a")[1:], atol=1e-3)


def test_noise_of_stochastic_dpm_belongs_to_the_image_too(unet: UNet2DConditionModel) -> None:
    """Whatever the global generator, and another noise for another seed."""
    chain = DPMSolverMultistepScheduler.from_config(base().config, algorithm_type="sde-dpmsolver++")
    text = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    noise = initial_noise(0, [0, 1], (8, 16, 16))

    def drawn(chance: int, seed: int = 1) -> torch.Tensor:
        torch.manual_seed(chance)
        own = [noise_generator(seed, i) for i in range(2)]
        return sample_latents(unet, chain, noise, Conditions(text[:2], text[2]), Guidance(2.0), 3, None, own)

    assert torch.equal(drawn(0), drawn(1)) and not torch.equal(drawn(0), drawn(0, seed=2))


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return load_backbone(BackboneConfig(path=str(tiny_backbone)))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_config_draws(name: str, backbone: Backbone) -> None:
    """With a source-blind tiny Stable Diffusion and every method's own file."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("train", [f"method={name}", "run_dir=x", "sampling.num_inference_steps=3"])
    cfg = from_dict({"sampling": composed.sampling, "run_dir": "x"})
    check(cfg)
    assert cfg.sampling.method == name
    drawer = Drawer(backbone, None, "none", "none", 64, cfg.sampling)
    images = drawer.images(["a red dress", "a blue shirt"])
    plain = replace(drawer, cfg=replace(cfg.sampling, method="none")).images(["a red dress", "a blue shirt"])
    assert images.shape == (2, 64, 64, 3) and images.dtype == np.uint8
    assert np.array_equal(images, plain) == (name == "none")


def test_every_method_has_a_config() -> None:
    assert sorted(path.stem for path in (conf_dir() / "method").glob("*.yaml")) == sorted(METHODS)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (SamplingConfig(method="magic"), "sampling.method=magic"),
        (SamplingConfig(method="pag", method_options={"eta": 1.0}), "method_options of pag=eta"),
        (SamplingConfig(method="pag", method_options={"scale": math.nan}), "not finite"),
        (SamplingConfig(method="detail_daemon", method_options={"start": 0.9}), "start is not before end"),
        (SamplingConfig(method="deepcache", method_options={"interval": 1.5}), "interval=1.5 counts"),
        (SamplingConfig(method="freeu", method_options={"s2": 0.0}), "scale of 0"),
        (SamplingConfig(method="wavelet", scheduler="unipc"), "unipc goes on from elsewhere"),
        (SamplingConfig(method="wavelet", scheduler="heun"), "heun goes on from elsewhere"),
        (SamplingConfig(method="apg", guidance_scale=1.0, source_guidance_scale=1.0), "adds nothing"),
        (SamplingConfig(method="rescale", guidance_scale=1.0, source_guidance_scale=1.0), "adds nothing"),
        (SamplingConfig(method="frequency", guidance_scale=1.0, source_guidance_scale=1.0), "adds nothing"),
    ],
    ids=["unknown", "option", "nan", "order", "interval", "freeu", "unipc", "heun", "apg", "rescale", "frequency"],
)
def test_bad_methods_are_one_sentence(sampling: SamplingConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(Config(run_dir="x", sampling=copy.deepcopy(sampling)))
