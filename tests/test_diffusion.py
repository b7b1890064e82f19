"""Diffusion arithmetic against closed forms and against diffusers' own schedulers."""

from __future__ import annotations

import diffusers
import pytest
import torch

from lora_dae import diffusion
from lora_dae.config import ConfigError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES = diffusion.PREDICTION_TYPES
WITH_ORIGINAL = ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
WITH_ORIGINAL += ["LMSDiscreteScheduler"]
CONVERTING = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


def build(name: str, prediction_type: str, **options):
    unclipped = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return getattr(diffusers, name)(prediction_type=prediction_type, **BETAS, **unclipped, **options)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", WITH_ORIGINAL)
def test_predict_x0_is_the_schedulers_own(name, prediction_type):
    scheduler = build(name, prediction_type)
    scheduler.set_timesteps(6)
    sample = torch.randn(2, 4, 4, 4) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        output = torch.randn_like(sample)
        alpha, sigma = diffusion.alpha_sigma(scheduler, timestep, sample)
        space = diffusion.is_sigma_space(scheduler)
        mine = diffusion.predict_x0(output, sample, alpha, sigma, prediction_type, space)
        result = scheduler.step(output, timestep, sample)
        torch.testing.assert_close(mine, result.pred_original_sample, rtol=1e-4, atol=1e-4)
        sample = result.prev_sample


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", CONVERTING)
def test_predict_x0_is_what_multistep_solvers_convert_to(name, prediction_type):
    scheduler = build(name, prediction_type)
    scheduler.set_timesteps(6)
    sample = torch.randn(2, 4, 4, 4)
    for timestep in scheduler.timesteps:
        output = torch.randn_like(sample)
        alpha, sigma = diffusion.alpha_sigma(scheduler, timestep, sample)  # before step_index exists, too
        mine = diffusion.predict_x0(output, sample, alpha, sigma, prediction_type, False)
        following = scheduler.step(output, timestep, sample).prev_sample
        torch.testing.assert_close(mine, scheduler.model_outputs[-1], rtol=1e-4, atol=1e-4)
        sample = following


@pytest.mark.parametrize("skip_prk_steps", [True, False])
def test_pndm_level_is_that_of_the_network_call(skip_prk_steps):
    scheduler = build("PNDMScheduler", "epsilon", skip_prk_steps=skip_prk_steps)
    scheduler.set_timesteps(8)
    sample = torch.randn(1, 4, 4, 4)
    for timestep in scheduler.timesteps:
        alpha, sigma = diffusion.alpha_sigma(scheduler, timestep, sample)
        assert float(alpha) ** 2 == pytest.approx(float(scheduler.alphas_cumprod[timestep]), rel=1e-5)
        assert float(alpha**2 + sigma**2) == pytest.approx(1.0, abs=1e-6)
        sample = scheduler.step(torch.randn_like(sample), timestep, sample).prev_sample


@pytest.mark.parametrize("sigma_space", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_output_delta_moves_x0_by_delta(prediction_type, sigma_space):
    alpha, sigma = (1.0, 2.5) if sigma_space else (0.8, 0.6)
    output, sample, delta = torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)
    change = diffusion.x0_delta_to_output_delta(delta, alpha, sigma, prediction_type, sigma_space)
    before = diffusion.predict_x0(output, sample, alpha, sigma, prediction_type, sigma_space)
    after = diffusion.predict_x0(output + change, sample, alpha, sigma, prediction_type, sigma_space)
    torch.testing.assert_close(after - before, delta)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_network_returns_x0(prediction_type):
    x0, noise = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    scheduler = build("DDPMScheduler", prediction_type)
    timesteps = torch.tensor([3, 400, 950])
    alpha, sigma = (value.double() for value in diffusion.alpha_sigma(scheduler, timesteps, x0))
    sample = diffusion.add_noise(x0, noise, alpha, sigma)
    torch.testing.assert_close(
        sample, scheduler.add_noise(x0, noise, timesteps), rtol=1e-5, atol=1e-5, check_dtype=False
    )
    target = diffusion.training_target(x0, noise, alpha, sigma, prediction_type)
    restored = diffusion.predict_x0(target, sample, alpha, sigma, prediction_type)
    torch.testing.assert_close(restored, x0, rtol=1e-4, atol=1e-4)


def test_velocity_is_diffusers_velocity():
    x0, noise = torch.randn(2, 3, 4, 5, 5)
    scheduler = build("DDPMScheduler", "v_prediction")
    timesteps = torch.tensor([0, 500, 999])
    alpha, sigma = diffusion.alpha_sigma(scheduler, timesteps, x0)
    torch.testing.assert_close(
        diffusion.velocity(x0, noise, alpha, sigma), scheduler.get_velocity(x0, noise, timesteps)
    )


def test_sigma_space_vector_of_training_timesteps():
    scheduler = build("EulerDiscreteScheduler", "epsilon")
    alpha, sigma = diffusion.alpha_sigma(scheduler, torch.tensor([0, 999]), torch.zeros(2, 4, 2, 2))
    cumprod = scheduler.alphas_cumprod[[0, 999]]
    torch.testing.assert_close(sigma.flatten(), ((1 - cumprod) / cumprod).sqrt())
    assert alpha.flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in [*WITH_ORIGINAL[:1], *WITH_ORIGINAL[2:], *CONVERTING]]  # all but DDPM, which draws noise
    + [("PNDMScheduler", {"skip_prk_steps": skip, "steps_offset": 1}) for skip in (True, False)],
)
def test_every_step_leads_from_one_level_to_the_other(name, options):
    """With the true noise as network output, a deterministic step lands on its level; all stages of a step start alike.

    So do the second stages of Heun and PNDM, whose network is evaluated where the first one led to.
    """
    scheduler = build(name, "epsilon", **options)
    scheduler.set_timesteps(7)
    x0, noise = torch.randn(2, 1, 4, 4, 4, dtype=torch.float64).float()
    sample = reached = before = None
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x0, timestep)
        alpha, sigma = diffusion.current_level(scheduler, timestep)
        start, end = diffusion.step_levels(scheduler, timestep)
        assert end == diffusion.next_level(scheduler, timestep)
        assert end[1] / end[0] < start[1] / start[0]
        if sample is None:
            assert start == (alpha, sigma)
            sample = alpha * x0 + sigma * noise
        else:
            assert reached == pytest.approx((alpha, sigma), abs=1e-6)
            if start != (alpha, sigma):  # a later stage of the step before
                assert start == before
        sample, reached, before = scheduler.step(noise, timestep, sample).prev_sample, end, start
        torch.testing.assert_close(sample, end[0] * x0 + end[1] * noise, rtol=1e-3, atol=1e-3)
    assert end[1] < 0.1


def test_snr_and_half_log_snr():
    alpha, sigma = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    torch.testing.assert_close(diffusion.snr(alpha, sigma), torch.tensor([0.5625, 16 / 9]))
    torch.testing.assert_close(2 * diffusion.half_log_snr(alpha, sigma), diffusion.snr(alpha, sigma).log())


def test_min_snr_weights_are_the_papers_and_finite_at_the_ends():
    snr = torch.tensor([0.0, 0.1, 5.0, 50.0, torch.inf])
    weight = {kind: diffusion.min_snr_weight(snr, 5.0, kind) for kind in PREDICTION_TYPES}
    torch.testing.assert_close(weight["epsilon"], torch.tensor([1.0, 1.0, 1.0, 0.1, 0.0]))
    torch.testing.assert_close(weight["v_prediction"], torch.tensor([0.0, 0.1 / 1.1, 5 / 6, 5 / 51, 0.0]))
    torch.testing.assert_close(weight["sample"], torch.tensor([0.0, 0.1, 5.0, 5.0, 5.0]))


def test_bad_input_is_refused_in_one_sentence():
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ConfigError, match="flow_prediction"):
        diffusion.predict_x0(x, x, 1.0, 1.0, "flow_prediction")
    with pytest.raises(ConfigError, match="gamma"):
        diffusion.min_snr_weight(torch.ones(1), 0.0, "epsilon")
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(3)
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler"):
        diffusion.alpha_sigma(flow, flow.timesteps[0], x)
