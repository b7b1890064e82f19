"""The adapter's loss: a perfect network has none, each rank draws its own noise, validation is fixed."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from adapter_loss import adapter_loss
from diffusers import DDIMScheduler

from lora_dae.config import ObjectiveConfig
from lora_dae.training.objective import draw, fixed_draws, seeded


def batch(n: int = 6) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "index": torch.arange(n),
        "latent_mean": torch.randn(n, 4, 8, 8, generator=g),
        "latent_std": torch.full((n, 4, 8, 8), 0.1),
        "text": torch.randn(n, 5, 3, generator=g),
    }


def own(n: int, seed: int = 0) -> list[torch.Generator]:
    """One generator per sample."""
    return [seeded(seed, 0, place) for place in range(n)]


class Oracle(torch.nn.Module):
    """Knows x0 and the noise, so it can answer v exactly."""

    def __init__(self, scheduler: DDIMScheduler, x0: torch.Tensor, noise: torch.Tensor) -> None:
        super().__init__()
        self.scheduler, self.x0, self.noise = scheduler, x0, noise

    def forward(self, sample, t, encoder_hidden_states, return_dict):  # noqa: ANN001, ANN201
        return (self.scheduler.get_velocity(self.x0, self.noise, t),)


def test_the_exact_velocity_has_no_loss() -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    b = batch()
    draws = draw(b, 1000, ObjectiveConfig(), own(6))
    oracle = Oracle(scheduler, b["latent_mean"] + b["latent_std"] * draws.posterior, draws.noise)
    loss = adapter_loss(oracle, scheduler, b, torch.zeros(5, 3), draws, 5.0)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, torch.zeros(6), atol=1e-10, rtol=0)


def test_a_sample_draws_the_same_in_any_batch() -> None:
    b, cfg = batch(), ObjectiveConfig(caption_dropout=0.5)
    whole = draw(b, 1000, cfg, own(6))
    halves = [draw({k: v[at] for k, v in b.items()}, 1000, cfg, own(6)[at]) for at in (slice(0, 3), slice(3, 6))]
    for name in ("posterior", "noise", "timesteps", "drop_caption", "drop_source"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    assert len({tuple(row.flatten().tolist()) for row in whole.noise}) == 6  # and no two samples the same
    assert not torch.equal(draw(b, 1000, cfg, own(6, seed=1)).noise, whole.noise)


def test_dropout_shares() -> None:
    b = {**batch(), "latent_mean": torch.zeros(4000, 1, 1, 1)}
    cfg = ObjectiveConfig(caption_dropout=0.1, source_dropout=0.3)
    draws = draw(b, 1000, cfg, own(4000))
    assert abs(draws.drop_caption.float().mean() - 0.1) < 0.02  # 4 standard errors
    assert abs(draws.drop_source.float().mean() - 0.3) < 0.03


def test_validation_draws_belong_to_the_sample() -> None:
    """A sample's noise and timestep are the same whatever batch it comes in."""
    b = batch()
    alone = {k: v[3:4] for k, v in b.items()}
    together, single = fixed_draws(b, 1000), fixed_draws(alone, 1000)
    assert torch.equal(together.noise[3:4], single.noise)
    assert torch.equal(together.timesteps[3:4], single.timesteps)
    assert not together.drop_caption.any()


def test_dropped_captions_become_the_null_text() -> None:
    seen = {}

    class Recorder(torch.nn.Module):
        def forward(self, sample, t, encoder_hidden_states, return_dict):  # noqa: ANN001, ANN201
            seen["text"], seen["sample"] = encoder_hidden_states, sample
            return (sample[:, :4],)

    b = {**batch(), "source": torch.ones(6, 4, 8, 8)}
    draws = draw(b, 1000, ObjectiveConfig(), own(6))
    flags = torch.tensor([True, False] * 3)
    draws = type(draws)(draws.posterior, draws.noise, draws.timesteps, flags, ~flags)
    scheduler = SimpleNamespace(
        config=SimpleNamespace(prediction_type="epsilon"), alphas_cumprod=DDIMScheduler().alphas_cumprod
    )
    adapter_loss(Recorder(), scheduler, b, torch.full((5, 3), 7.0), draws, 0.0)
    assert (seen["text"][flags] == 7).all() and torch.equal(seen["text"][~flags], b["text"][~flags])
    assert (seen["sample"][flags, 4:] == 1).all() and (seen["sample"][~flags, 4:] == 0).all()


def test_garment_weight_averages_errors_by_the_mask() -> None:
    """Errors of 1 on the garment (a quarter) and 3 beside it: (w * 1 * 1/4 + 9 * 3/4) / (w / 4 + 3/4), by hand."""

    class Off(torch.nn.Module):
        def forward(self, sample, t, encoder_hidden_states, return_dict):  # noqa: ANN001, ANN201
            return (draws.noise + torch.where(mask > 0, 1.0, 3.0),)

    b = batch()
    mask = torch.zeros(6, 1, 8, 8)
    mask[..., :4, :4] = 1
    draws = draw(b, 1000, ObjectiveConfig(), own(6))
    scheduler = DDIMScheduler(prediction_type="epsilon")
    for weight, expected in ((1.0, 7.0), (3.0, (3 * 0.25 + 6.75) / (0.75 + 0.75)), (0.0, 9.0)):
        loss = adapter_loss(Off(), scheduler, {**b, "mask": mask}, torch.zeros(5, 3), draws, 0.0, weight)
        torch.testing.assert_close(loss, torch.full((6,), expected))
