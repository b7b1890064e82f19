"""Closed forms of the DDIM step on Gaussians, and the on-policy loss."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch

from lora_dae.diffusion import Level, current_level, next_level, x0_delta_to_output_delta
from lora_dae.enhancement import EnhancementModule
from lora_dae.enhancement.objective import gain_regularization, on_policy_loss, sorted_distance


def ddim_std_ratio(
    variance: torch.Tensor, alpha: Level, sigma: Level, next_alpha: Level, next_sigma: Level
) -> torch.Tensor:
    """What one DDIM step does to a Gaussian band's standard deviation, relative to the exact flow, in (0, 1].

    cos(theta_t - theta_s) with theta = atan2(sigma, alpha * sqrt(variance)). ``variance``: the band's, of x0.
    Over a trajectory the ratios multiply; small variances (fine texture) lose most.
    """
    spread = variance.sqrt()

    def angle(a: Level, s: Level) -> torch.Tensor:
        return torch.atan2(torch.as_tensor(s, dtype=variance.dtype), a * spread)

    return torch.cos(angle(alpha, sigma) - angle(next_alpha, next_sigma))


def exact_gain(
    variance: torch.Tensor, alpha: Level, sigma: Level, next_alpha: Level, next_sigma: Level
) -> torch.Tensor:
    """The x0 gain g* >= 1 that makes one DDIM step exact for a Gaussian band of ``variance``; 1 as h -> 0."""
    total = alpha**2 * variance + sigma**2
    next_total = next_alpha**2 * variance + next_sigma**2
    kept = next_sigma / sigma
    step = next_alpha - alpha * kept  # alpha_s * (1 - e^-h)
    return ((next_total / total).sqrt() - kept) / (step * alpha * variance / total)


def run_ddim(variance: torch.Tensor, steps: int, corrected: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Final std over the exact flow's, and the predicted product of ratios, of Gaussian bands."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    alpha, sigma = current_level(scheduler, scheduler.timesteps[0])
    sample = (alpha**2 * variance + sigma**2).sqrt()
    predicted = torch.ones_like(variance)
    for timestep in scheduler.timesteps:
        alpha, sigma = current_level(scheduler, timestep)
        following = next_level(scheduler, timestep)
        x0 = sample * alpha * variance / (alpha**2 * variance + sigma**2)  # the exact posterior mean
        output = (sample - alpha * x0) / sigma
        if corrected:
            delta = (exact_gain(variance, alpha, sigma, *following) - 1) * x0
            output = output + x0_delta_to_output_delta(delta, alpha, sigma, "epsilon")
        predicted = predicted * ddim_std_ratio(variance, alpha, sigma, *following)
        sample = scheduler.step(output, timestep, sample).prev_sample
    return sample / (following[0] ** 2 * variance + following[1] ** 2).sqrt(), predicted


VARIANCES = torch.tensor([1.0, 0.3, 0.1, 0.03, 0.01], dtype=torch.float64)


def test_ddim_multiplies_each_bands_std_by_the_product_of_cosines():
    measured, predicted = run_ddim(VARIANCES, 20, corrected=False)
    torch.testing.assert_close(measured, predicted, rtol=1e-5, atol=0)
    assert (measured.diff() < 0).all() and measured[0] < 0.96  # fine texture loses most, all lose


def test_the_exact_gain_makes_every_step_exact():
    measured, _ = run_ddim(VARIANCES, 20, corrected=True)
    torch.testing.assert_close(measured, torch.ones_like(measured), rtol=1e-5, atol=0)


def test_the_exact_gain_is_above_one_and_vanishes_with_the_step():
    def level(lam: float) -> tuple[float, float]:
        alpha = 1 / math.sqrt(1 + math.exp(-2 * lam))
        return alpha, math.exp(-lam) * alpha

    gains = [exact_gain(VARIANCES, *level(0.5), *level(0.5 + h)) for h in (0.5, 0.05, 0.005)]
    assert (gains[0] > gains[1]).all() and (gains[1] > gains[2]).all() and (gains[2] > 1).all()
    torch.testing.assert_close(gains[2], torch.ones_like(VARIANCES), rtol=0, atol=5e-3)


def test_loss_is_zero_on_the_same_distribution_and_sees_missing_energy():
    x0 = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(4, 3, 16, 16)
    assert float(on_policy_loss(x0, x0.flip(0), none).total) == pytest.approx(0, abs=1e-6)
    # Only fluctuations count: a shift of the mean is not texture.
    assert float(on_policy_loss(x0 + 5, x0, none).total) == pytest.approx(0, abs=1e-3)
    weak = on_policy_loss(0.5 * x0, x0, none)
    assert float(weak.power) == pytest.approx(math.log(4), abs=2e-3)
    assert float(weak.distribution) == pytest.approx(math.log(4), abs=2e-2)


def test_loss_sums_the_parts_that_are_named():
    x0 = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = on_policy_loss(0.5 * x0, x0, torch.full((4, 3, 16, 16), 0.1))
    for name in ("distribution", "power"):
        one = on_policy_loss(0.5 * x0, x0, torch.full((4, 3, 16, 16), 0.1), losses=[name])
        assert float(one.total) == pytest.approx(float(getattr(whole, name) + whole.regularization))


def test_loss_counts_only_masked_places():
    x0 = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = x0.clone()
    changed[..., 24:, :] = 0
    mask = torch.zeros(2, 1, 32, 32, dtype=torch.bool)
    mask[..., :4, :] = True  # further away than any band reaches
    none = torch.zeros(2, 3, 32, 32)
    assert float(on_policy_loss(changed, x0, none, mask).total) == pytest.approx(0, abs=1e-5)
    assert float(on_policy_loss(changed, x0, none).total) > 0.1


def test_sorted_distance_of_a_shift_is_the_shift():
    values = torch.randn(2, 100)
    assert float(sorted_distance(values + 0.7, values.flip(-1))) == pytest.approx(0.7, abs=1e-5)


def test_regularization_vanishes_only_without_gains():
    assert float(gain_regularization(torch.zeros(1, 2, 4, 4))) == 0
    constant = torch.full((1, 2, 4, 4), 0.2)
    assert float(gain_regularization(constant)) == pytest.approx(1e-3 * 0.04)


def test_a_few_steps_on_the_loss_restore_the_energy_of_faded_latents():
    torch.manual_seed(0)
    reference = torch.randn(4, 4, 16, 16)
    faded, noise = 0.8 * reference, torch.randn_like(reference)
    sample = 0.8 * faded + 0.6 * noise
    module = EnhancementModule()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        delta, log_gain = module.evaluate(faded, faded, sample, 0.8, 0.6, 0.2)[:2]
        loss = on_policy_loss(faded + delta, reference, log_gain)
        losses.append(loss.total.item())
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert log_gain.mean().item() == pytest.approx(math.log(1 / 0.8), abs=0.06)
