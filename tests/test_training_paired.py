"""Texture training: towards the true bands, with gates that learn to stay shut before a wrong source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compose import config
from test_enhancement_texture import smooth
from test_training_on_policy import scheduler

from lora_dae.adapter.inject import trainable_parameters
from lora_dae.backbone.load import load_backbone
from lora_dae.config import EnhancementConfig
from lora_dae.diffusion import alpha_sigma, half_log_snr
from lora_dae.enhancement import EnhancementModule
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.gates import WINDOW
from lora_dae.enhancement.module import build_enhancement
from lora_dae.sampling.loop import Guidance
from lora_dae.training.module import LoraDae
from lora_dae.training.objective import seeded
from lora_dae.training.paired import LATE, decoder_loss, draw_paired, gradient_magnitude, swapped, texture_loss


class Blurry(torch.nn.Module):
    """A denoiser that knows the truth but for its finest band, as an average over textures does not."""

    def __init__(self, clean: torch.Tensor, base) -> None:
        super().__init__()
        self.blurred, self.base = split_bands(clean, 1)[1], base

    def forward(self, sample, timestep, encoder_hidden_states, return_dict):
        noisy = sample[:, : self.blurred.shape[1]]
        alpha, sigma = alpha_sigma(self.base, timestep, noisy)
        x0 = self.blurred.repeat(len(noisy) // len(self.blurred), 1, 1, 1)
        return ((alpha * noisy - x0) / sigma,)  # v, from x0 = alpha x - sigma v


def draw(batch, base, cfg, k, share=1.0):
    generators = [seeded(0, place) for place in range(8 * k, 8 * k + 8)]
    return draw_paired(batch, base, cfg, seeded(9, k), generators, k, share)


def paired_batch() -> dict[str, torch.Tensor]:
    clean = torch.cat([smooth(k) for k in range(4)])
    return {"latent_mean": clean, "source": clean.clone(), "text": torch.zeros(8, 2, 3)}


def test_draws_stay_where_the_module_acts_and_repeat():
    base, cfg = scheduler(), EnhancementConfig(wrong_source=0.5)
    draws = [draw(paired_batch(), base, cfg, k) for k in range(20)]
    alpha, sigma = alpha_sigma(base, torch.cat([d.timesteps for d in draws]), torch.zeros(160, 1, 1, 1))
    assert half_log_snr(alpha, sigma).min() > WINDOW[0]
    assert {d.guidance == Guidance() for d in draws} == {True, False}
    assert max(d.guidance.source for d in draws) <= 3 < max(d.guidance.text for d in draws) <= 8
    assert 40 < sum(int(d.wrong.sum()) for d in draws) < 120
    late = [draw(paired_batch(), base, cfg, k, LATE) for k in range(20)]
    assert max(d.timesteps.max() for d in late) < 0.5 * max(d.timesteps.max() for d in draws)
    again = draw(paired_batch(), base, cfg, 3)
    assert torch.equal(again.noise, draws[3].noise) and torch.equal(again.wrong, draws[3].wrong)


def test_swapping_gives_the_next_samples_source():
    source = torch.arange(4.0).view(4, 1, 1, 1)
    assert swapped(source, torch.tensor([True, False, False, True])).flatten().tolist() == [1, 1, 2, 0]
    # The second of two processes, each with two of the samples: the same neighbors.
    own = swapped(source[2:], torch.tensor([False, True]), 1, lambda _: source)
    assert own.flatten().tolist() == [2, 0]


def test_training_opens_the_gates_for_the_right_source_and_not_for_a_wrong_one():
    torch.manual_seed(0)
    base, batch = scheduler(), paired_batch()
    unet = Blurry(batch["latent_mean"], base)
    module = EnhancementModule(max_log_gain=0.0, source_channels=4)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    cfg = EnhancementConfig(wrong_source=0.3)
    for k in range(60):
        draws = draw(batch, base, cfg, k)
        loss = texture_loss(unet, base, module, batch, torch.zeros(2, 3), draws)
        if k == 0:
            torch.testing.assert_close(loss, torch.ones(()))  # a new module does nothing, at whatever guidance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        blurred, noisy = unet.blurred, batch["latent_mean"]
        gates = [
            module.evaluate(blurred, blurred, noisy, 0.95, 0.31, 0.3, source=s).gates[:, 0].abs().mean()
            for s in (batch["source"], batch["source"].roll(2, 0))
        ]
    assert gates[0] > 0.4 and gates[1] < 0.5 * gates[0]


def test_the_decoder_stage_lowers_its_loss_with_the_right_source():
    torch.manual_seed(0)
    real = (torch.cat([smooth(k, 32, 3) for k in range(2)]) * 0.05 + 0.5).clamp(0, 1)
    blurred = split_bands(real, 1)[1].clamp(0, 1)
    module = EnhancementModule(max_log_gain=0.0, decoder=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = decoder_loss(module, blurred, real, real)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert decoder_loss(EnhancementModule(decoder=True), real, real, None).item() == pytest.approx(0, abs=1e-5)


def test_gradient_magnitude_of_a_ramp_is_its_slope():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 3, 8, 8) * 0.1
    torch.testing.assert_close(gradient_magnitude(ramp), torch.full((1, 7, 7), 0.1), rtol=0, atol=1e-4)


def test_the_decoders_loss_sums_the_parts_that_are_named():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    module = EnhancementModule(decoder=True)

    def loss(*losses: str) -> float:
        return decoder_loss(module, images, images.flip(3), None, losses).item()

    assert loss() < min(loss("energy"), loss("edges"))
    assert loss("energy", "edges") == pytest.approx(loss("energy") + loss("edges") - loss())
    assert loss("distribution", "power") == loss()  # the gain's


def test_captions_alone_leave_the_decoders_matcher_untrained(tiny_backbone: Path, tmp_path: Path) -> None:
    """It has nothing to match with; processes would wait for its gradients in vain."""
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "conditioning=none")
    backbone, enhancement = load_backbone(cfg.backbone), build_enhancement(cfg.enhancement, 8, "none")
    module = LoraDae(backbone, cfg, enhancement, torch.zeros(16, 32), "decoder")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    decoder_loss(enhancement, images, images.flip(3), None).backward()
    trains = trainable_parameters(module)
    assert trains and all(p.grad is not None for p in trains.values())
    assert not any(".matcher." in name for name in trains)
