"""The guided reverse loop against diffusers' own pipelines, and the algebra of two guidance scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

from lora_dae.adapter import fused
from lora_dae.adapter.inject import inject
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import round_frozen
from lora_dae.config import SCHEDULERS, AdapterConfig, BackboneConfig, ConfigError, SamplingConfig
from lora_dae.sampling.draw import Drawer, _bytes
from lora_dae.sampling.loop import Conditions, Guidance, initial_noise, sample_latents
from lora_dae.sampling.schedulers import build_scheduler


@pytest.mark.parametrize("name", [s for s in SCHEDULERS if s not in ("ddpm", "euler_a")])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_the_pipeline_of_diffusers(name: str, scale: float, tiny_backbone: Path) -> None:
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    noise = initial_noise(0, [0, 1], (8, 8, 8))
    captions = ["a red dress", "a blue shirt"]
    text = backbone.encode_text(["", *captions])
    ours = sample_latents(
        backbone.unet,
        build_scheduler(name, backbone.scheduler),
        noise,
        Conditions(text[1:], text[0]),
        Guidance(scale),
        6,
    )
    pipe = StableDiffusionPipeline.from_pretrained(tiny_backbone)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = build_scheduler(name, backbone.scheduler)
    theirs = pipe(
        captions,
        latents=noise.clone(),
        num_inference_steps=6,
        guidance_scale=scale,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-3)


def brooks(none: torch.Tensor, source: torch.Tensor, full: torch.Tensor, text: float, image: float) -> torch.Tensor:
    """InstructPix2Pix, equation 3."""
    return none + image * (source - none) + text * (full - source)


@pytest.mark.parametrize(("text", "image"), [(1.0, 1.0), (3.0, 1.0), (2.0, 2.0), (3.0, 1.5), (1.0, 2.0)])
def test_guidance_is_equation_3_of_instructpix2pix(text: float, image: float) -> None:
    values = dict(zip(("none", "source", "full"), torch.randn(3, 2, 4, 8, 8, dtype=torch.float64), strict=True))
    guidance = Guidance(text, image)
    branches = guidance.branches(has_source=True)
    mixed = guidance.mix({b: values[b] for b in branches})
    torch.testing.assert_close(mixed, brooks(values["none"], values["source"], values["full"], text, image))


def test_no_more_network_calls_than_the_formula_needs() -> None:
    assert Guidance(1, 1).branches(True) == ("full",)
    assert len(Guidance(2, 2).branches(True)) == 2
    assert len(Guidance(2, 1).branches(True)) == 2
    assert len(Guidance(2, 1.5).branches(True)) == 3
    assert Guidance(1).branches(False) == ("full",)


def test_a_number_of_steps_that_diffusers_rounds_to_one_more_is_refused() -> None:
    """Its last timestep is -1, which DDIM takes for the noisiest level."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    with pytest.raises(ConfigError, match="no 61 steps.*use 60 or 62"):
        sample_latents(torch.nn.Identity(), scheduler, torch.zeros(1, 4, 8, 8), None, Guidance(), 61)  # type: ignore[arg-type]


def test_noise_belongs_to_seed_and_index() -> None:
    a = initial_noise(5, [3, 9], (2, 4, 4))
    assert torch.equal(a[1], initial_noise(5, [9], (2, 4, 4))[0])
    assert not torch.equal(a[0], initial_noise(6, [3], (2, 4, 4))[0])


def test_pictures_that_are_not_finite_are_an_error() -> None:
    """As bytes they would be black, and distances to them finite."""
    pictures = torch.rand(2, 3, 4, 4)
    assert _bytes(pictures).shape == (2, 4, 4, 3)
    pictures[1, 0, 2, 2] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        _bytes(pictures)


def test_unknown_scheduler(tiny_backbone: Path) -> None:
    with pytest.raises(ConfigError, match="magic"):
        build_scheduler("magic", load_backbone(BackboneConfig(path=str(tiny_backbone))).scheduler)


@pytest.mark.parametrize("name", ["heun", "lms", "pndm"])
def test_solvers_without_zero_terminal_snr_are_refused_on_a_base_with_it(name: str) -> None:
    base = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(ConfigError, match=f"sampling.scheduler={name} knows no zero terminal SNR"):
        build_scheduler(name, base)
    assert float(build_scheduler("ddim", base).alphas_cumprod[-1]) == 0


@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun"])
@pytest.mark.parametrize("base", [PNDMScheduler(), DDIMScheduler(), DDIMScheduler(clip_sample=True)])
def test_latents_are_not_clipped_whatever_the_base_says_of_it(name: str, base: Any) -> None:
    """SD 1.5's own PNDM does not speak of it; diffusers' default is right for pixels in [-1, 1]."""
    scheduler = build_scheduler(name, base)
    scheduler.set_timesteps(4)
    far = torch.full((1, 4, 2, 2), 3.0)
    clean = scheduler.step(torch.zeros_like(far), scheduler.timesteps[0], far).pred_original_sample  # it has no noise
    assert float(clean.min()) >= 3


def test_merged_layers_compute_the_text_once_a_chain(tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of every later step are the first one's; the latents are those without that, to rounding."""
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    unet = backbone.unet
    inject(unet, AdapterConfig(rank=2, init="gaussian"))
    unet.eval()
    text, noise = backbone.encode_text(["", "a red dress"]), initial_noise(0, [0], (8, 8, 8))
    reused: list[bool] = []
    original = fused._Kept.reused

    def noted(self: fused._Kept, given: torch.Tensor) -> torch.Tensor | None:
        product = original(self, given)
        reused.append(product is not None)
        return product

    def draw() -> torch.Tensor:
        scheduler = build_scheduler("ddim", backbone.scheduler)
        return sample_latents(unet, scheduler, noise, Conditions(text[1:], text[0]), Guidance(3.0), 4)

    expected = draw()
    monkeypatch.setattr(fused._Kept, "reused", noted)
    with fused.merged_once(unet):
        torch.testing.assert_close(draw(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    layers = sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name, _ in unet.named_modules())
    assert len(reused) == 4 * layers and sum(reused) == 3 * layers > 0


def test_frozen_layers_of_half_precision_draw_beside_an_adapter_of_full(tiny_backbone: Path) -> None:
    """As a run with trainer.precision=16-mixed leaves them where the first convolution has an adapter."""
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    inject(backbone.unet, AdapterConfig(rank=2, targets=["conv_in"]))
    assert round_frozen(backbone.unet, "16-mixed") > 0
    drawer = Drawer(backbone, None, "none", "none", 32, SamplingConfig(num_inference_steps=2), bf16=False)
    assert torch.isfinite(drawer.latents(["a dress"], None, 0.0, [0])).all()
