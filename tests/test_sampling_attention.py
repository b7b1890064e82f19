"""Methods in the network's attention, and two guidance scales at once: written down for a network that can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, PAGIdentitySelfAttnProcessor2_0
from test_sampling_methods import outputs, step

from lora_dae.config import ConfigError
from lora_dae.sampling.loop import Conditions, Guidance, branch_predictions
from lora_dae.sampling.method import Method, Step
from lora_dae.sampling.methods import build_method
from lora_dae.sampling.methods.attention import IdentityAttention, blur_where, middle_self_attention


@pytest.fixture(scope="module")
def unet(tiny_backbone: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_backbone / "unet").eval()


def test_identity_attention_is_that_of_diffusers(unet: UNet2DConditionModel) -> None:
    (layer, *_) = middle_self_attention(unet)
    states = torch.randn(2, 16, layer.to_q.in_features)
    with torch.no_grad():
        ours = IdentityAttention()(layer, states)
        theirs = PAGIdentitySelfAttnProcessor2_0()(layer, torch.cat([states, states])).chunk(2)[1]
    torch.testing.assert_close(ours, theirs)


def test_perturbed_attention_is_linear_in_its_scale(unet: UNet2DConditionModel) -> None:
    text = torch.randn(3, 16, 32)
    at = step({k: torch.randn(2, 8, 16, 16) for k in ("none", "full")}, Guidance(2.0))
    at = replace(at, unet=unet, conditions=Conditions(text[:2], text[2]))
    with torch.no_grad():
        changes = [build_method("pag", {"scale": s}).guide(at) - Method().guide(at) for s in (1.0, 3.0)]
    assert changes[0].abs().max() > 0
    torch.testing.assert_close(changes[1], 3 * changes[0], atol=1e-5, rtol=1e-4)


class Attending(torch.nn.Module):
    """Stands for a UNet whose output can be written down: half the latents, attention, source and text."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = torch.nn.Module()
        self.mid_block.attention = Attention(4, heads=2, dim_head=4)

    def forward(self, x, t, encoder_hidden_states, return_dict):  # noqa: ANN001, ANN201
        states = x[:, :4].flatten(2).transpose(1, 2)
        return (self.plain(x, encoder_hidden_states) + image(self.mid_block.attention(states)),)

    def plain(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return 0.5 * x[:, :4] + 0.3 * x[:, 4:] + text.mean((1, 2))[:, None, None, None]


def image(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).unflatten(2, (8, 8))


def attended_step(guidance: Guidance, method: Method) -> Step:
    """A step with text and source, predicted by ``Attending`` as the loop does it."""
    torch.manual_seed(0)
    unet, text, source = Attending().eval(), torch.randn(3, 3, 5), torch.randn(2, 4, 8, 8)
    conditions = Conditions(text[:2], text[2], source)
    at = step(outputs(), guidance)
    with torch.no_grad(), method.around(unet):
        predictions = branch_predictions(unet, at.sample, at.timestep, conditions, guidance)
    return replace(at, unet=unet, conditions=conditions, predictions=predictions)


@torch.no_grad()
def test_perturbed_attention_leads_away_from_the_conditional_prediction_without_attention() -> None:
    method = build_method("pag", {"scale": 2.0})
    at = attended_step(Guidance(3.0, 2.0), method)
    assert list(at.predictions) == ["none", "source", "full"]
    unet: Any = at.unet
    layer, states = unet.mid_block.attention, at.sample.flatten(2).transpose(1, 2)
    shown = torch.cat([at.sample, at.conditions.source], dim=1)  # type: ignore[list-item]
    perturbed = unet.plain(shown, at.conditions.text) + image(layer.to_out[0](layer.to_v(states)))
    expected = Method().guide(at) + 2.0 * (at.predictions["full"] - perturbed)
    torch.testing.assert_close(method.guide(at), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_self_attention_guidance_leads_away_from_the_blurred_sample_without_conditions() -> None:
    method = build_method("sag", {"scale": 2.0})
    at = attended_step(Guidance(3.0, 2.0), method)
    unet: Any = at.unet
    layer, states = unet.mid_block.attention, at.sample.flatten(2).transpose(1, 2)
    query, key = (project(states).unflatten(2, (2, 4)).transpose(1, 2) for project in (layer.to_q, layer.to_k))
    attended = (query @ key.mT / 4**0.5).softmax(-1).mean(1).sum(1)
    none, (alpha, sigma) = at.predictions["none"], at.level
    x0, noise = alpha * at.sample - sigma * none, sigma * at.sample + alpha * none  # of v
    worse = alpha * blur_where(x0, attended) + sigma * noise
    assert not torch.equal(worse, alpha * x0 + sigma * noise)
    null = at.conditions.null_text.expand_as(at.conditions.text)
    (degraded,) = unet(torch.cat([worse, torch.zeros_like(worse)], dim=1), at.timestep, null, return_dict=False)
    expected = Method().guide(at) + 2.0 * (none - degraded)
    torch.testing.assert_close(method.guide(at), expected, atol=1e-4, rtol=1e-4)


def test_projected_guidance_sees_text_and_source_as_one_direction() -> None:
    """By hand with two scales: with eta 1, no norm and no momentum it is the guidance of InstructPix2Pix."""
    at = attended_step(Guidance(3.0, 2.0), Method())
    plain = build_method("apg", {"eta": 1, "norm": 0, "momentum": 0}).guide(at)
    torch.testing.assert_close(plain, Method().guide(at), atol=1e-5, rtol=1e-4)
    short = at.x0(build_method("apg", {"norm": 0.5, "momentum": 0}).guide(at)) - at.x0(at.conditional)
    assert (short.flatten(1).norm(dim=1) <= 0.5 * (3 - 1) * 1.0001).all()


def test_self_attention_guidance_blurs_what_is_attended() -> None:
    x = torch.randn(1, 4, 16, 16)
    nothing, everything = torch.full((1, 16), 0.9), torch.full((1, 16), 1.1)
    assert torch.equal(blur_where(x, nothing), x)
    blurred = blur_where(x, everything)
    kernel = np.exp(-0.5 * np.arange(-4, 5) ** 2.0)
    kernel /= kernel.sum()
    padded = np.pad(x[0, 0].numpy(), 4, mode="reflect")
    expected = sum(kernel[i] * kernel[j] * padded[i : i + 16, j : j + 16] for i in range(9) for j in range(9))
    np.testing.assert_allclose(blurred[0, 0], expected, atol=1e-5)
    corner = torch.full((1, 16), 0.9)
    corner[0, 0] = 2.0
    found = blur_where(x, corner)
    assert torch.equal(found[..., 4:, :], x[..., 4:, :]) and torch.equal(found[..., :4, :4], blurred[..., :4, :4])


def test_no_self_attention_in_the_middle_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="middle block"):
        middle_self_attention(torch.nn.Module())
