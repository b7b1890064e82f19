"""The gain: identity at birth, capped, budgeted, order-aware, blind to the scheduler family."""

from __future__ import annotations

import math

import pytest
import torch

from lora_dae.config import ConfigError, EnhancementConfig
from lora_dae.enhancement.gates import BandGain, noise_step, noise_window, observe

LEVEL = {"alpha": 0.8, "sigma": 0.6, "h": 0.2}


def random_module(seed: int = 0, scale: float = 1.0) -> BandGain:
    torch.manual_seed(seed)
    module = BandGain()
    torch.nn.init.normal_(module.output.weight, std=scale)
    torch.nn.init.normal_(module.output.bias, std=scale)
    return module


def latents(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0, noise, other = torch.randn(3, 2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return x0, x0 + 0.3 * other, 0.8 * x0 + 0.6 * noise


def evaluate(module, x0, x0_cond, sample, alpha, sigma, h, first_order=1.0, direction=False):
    """Delta and log gains of a step, from what the whole module observes."""
    step = noise_step(alpha, sigma, h, first_order, x0.device)
    return module.judge(observe(x0, x0_cond, sample, step, module.levels), step, direction)


def test_the_configured_gain_is_small_and_starts_as_the_identity():
    config = EnhancementConfig()
    module = BandGain(config.levels, config.hidden, config.max_log_gain)
    assert sum(parameter.numel() for parameter in module.parameters()) < 15_000
    delta, log_gain = evaluate(module, *latents(), **LEVEL)
    assert torch.count_nonzero(delta) == 0 and torch.count_nonzero(log_gain) == 0


def test_every_parameter_of_the_last_layer_gets_a_gradient_at_birth_even_at_high_noise():
    module = BandGain()
    for alpha in (0.8, 0.05):
        module.zero_grad()
        evaluate(module, *latents(), alpha, (1 - alpha**2) ** 0.5, 0.2)[0].square().sum().backward()
        assert module.output.weight.grad is not None
    delta = evaluate(module, *latents(), **LEVEL)[0]
    (delta * torch.randn_like(delta)).sum().backward()
    assert (module.output.weight.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("channels", [1, 4, 8])
def test_any_channel_count_and_channel_means_stay(channels):
    x0, sample = torch.randn(2, 2, channels, 24, 16) + 2
    delta = evaluate(random_module(), x0, x0, sample, **LEVEL)[0].detach()
    assert delta.shape == x0.shape and delta.dtype == torch.float32
    assert float(delta.abs().max()) > 1e-2
    assert float(delta.mean((2, 3)).abs().max()) < 1e-6


def test_gains_are_capped():
    _, log_gain = evaluate(random_module(scale=50), *latents(), **LEVEL)
    assert log_gain.abs().max().item() == pytest.approx(0.405, abs=1e-3)


def test_positive_gains_shrink_by_half_of_what_guidance_amplified_and_stop_at_zero():
    x0, _, sample = latents()
    module = BandGain()
    torch.nn.init.constant_(module.output.bias, 10.0)  # all gains at the cap
    plain = evaluate(module, x0, x0.clone(), sample, **LEVEL)[1]
    torch.testing.assert_close(plain, torch.full_like(plain, 0.405))
    factor = math.exp(0.2)  # log q = 0.4, up to the energy floor
    guided = evaluate(module, factor * x0, x0, sample, **LEVEL)[1]
    torch.testing.assert_close(guided, torch.full_like(guided, 0.405 - 0.2), rtol=0, atol=2e-3)
    strong = evaluate(module, 3 * x0, x0, sample, **LEVEL)[1]
    assert torch.count_nonzero(strong) == 0
    torch.nn.init.constant_(module.output.bias, -10.0)  # attenuation is not budgeted
    negative = evaluate(module, 3 * x0, x0, sample, **LEVEL)[1]
    torch.testing.assert_close(negative, torch.full_like(negative, -0.405))


def test_the_discretization_part_is_off_for_higher_order_solvers_and_fades_with_short_steps():
    module = random_module()
    with torch.no_grad():  # keep only u
        module.output.weight[: module.levels] = 0
        module.output.bias[: module.levels] = 0
    x0, cond, sample = latents()

    def size(h: float, first_order: float) -> float:
        return evaluate(module, x0, cond, sample, 0.8, 0.6, h, first_order)[0].abs().max().item()

    assert size(0.2, 0.0) == 0 and size(math.inf, 0.0) == 0
    assert size(0.2, 1.0) > size(0.02, 1.0) > size(0.002, 1.0) > 0
    assert size(0.002, 1.0) < 0.02 * size(0.2, 1.0)
    assert math.isfinite(size(math.inf, 1.0))


def test_the_window_is_off_at_high_noise():
    lambdas = torch.tensor([-8.0, -1.41, -1.15, -0.89, 8.0])
    assert noise_window(lambdas).tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    delta = evaluate(random_module(), *latents(), 0.1, 0.99**0.5, 0.2)[0]
    assert torch.count_nonzero(delta) == 0


def test_sigma_space_and_normalized_samples_give_the_same_delta():
    x0, cond, sample = latents()
    module = random_module()
    for direction in (False, True):
        normalized = evaluate(module, x0, cond, sample, 0.8, 0.6, 0.2, direction=direction)[0]
        unscaled = evaluate(module, x0, cond, sample / 0.8, 1.0, 0.6 / 0.8, 0.2, direction=direction)[0]
        torch.testing.assert_close(unscaled, normalized, rtol=1e-4, atol=1e-5)


def test_noise_levels_may_differ_within_a_batch():
    x0, cond, sample = latents()
    module = random_module()
    alpha = torch.tensor([0.8, 0.6])
    both = evaluate(module, x0, cond, sample, alpha, (1 - alpha**2).sqrt(), torch.tensor([0.1, 0.3]))[0]
    for i, h in enumerate((0.1, 0.3)):
        a = float(alpha[i])
        alone = evaluate(module, *(x[i : i + 1] for x in (x0, cond, sample)), a, (1 - a**2) ** 0.5, h)[0]
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("inputs", "kept"), [("place", 1.0), ("time", 0.0)])
def test_gates_that_see_less_are_gates_with_other_first_weights(inputs, kept):
    """Those of all bands alike, or none: what is hidden is hidden from every later layer."""
    full, less = random_module(), BandGain(inputs=inputs)
    less.load_state_dict(full.state_dict())
    own = evaluate(full, *latents(), **LEVEL)[1]
    with torch.no_grad():
        mean = full.input.weight.unflatten(1, (3, full.levels)).mean(2, keepdim=True)
        full.input.weight.copy_(kept * mean.expand(-1, -1, full.levels).flatten(1))
    expected, seen = evaluate(full, *latents(), **LEVEL)[1], evaluate(less, *latents(), **LEVEL)[1]
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert float((seen - own).detach().abs().max()) > 0.01
    x0, _, sample = latents()
    alone = evaluate(less, x0, x0, sample, **LEVEL)[1]  # without guidance no budget depends on the place
    assert (float(alone.detach().std((2, 3)).max()) < 1e-6) == (inputs == "time")


@pytest.mark.parametrize("values", [(0, 32, 0.4), (3, 0, 0.4), (3, 32, 0.0), (3, 32, math.inf)])
def test_senseless_sizes_are_refused(values):
    with pytest.raises(ConfigError, match="positive"):
        BandGain(*values)
