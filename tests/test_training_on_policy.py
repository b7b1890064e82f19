"""On-policy training against a closed form: white Gaussian data, the exact denoiser, DDIM's known loss of power."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from lora_dae.config import EnhancementConfig
from lora_dae.enhancement.hook import enhance_scheduler
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.sampling.loop import Conditions, Guidance, sample_latents
from lora_dae.sampling.schedulers import build_scheduler
from lora_dae.training.objective import seeded
from lora_dae.training.on_policy import Chain, chain_loss, draw_chain

VARIANCE = 0.1
SHAPE = (8, 4, 16, 16)


class ExactDenoiser(torch.nn.Module):
    """The best possible v-prediction for white Gaussian latents of variance 0.1."""

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        super().__init__()
        self.alphas_cumprod = alphas_cumprod

    def forward(self, sample, t, encoder_hidden_states, return_dict):  # noqa: ANN001, ANN201
        a2 = self.alphas_cumprod[torch.as_tensor(t).long()]
        alpha, sigma = a2.sqrt(), (1 - a2).sqrt()
        x0 = sample * alpha * VARIANCE / (a2 * VARIANCE + 1 - a2)
        return ((alpha * sample - x0) / sigma,)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        prediction_type="v_prediction",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def batch(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"latent_mean": VARIANCE**0.5 * torch.randn(SHAPE, generator=g), "text": torch.zeros(SHAPE[0], 2, 3)}


def final_std(
    unet: torch.nn.Module, module: EnhancementModule | None, strength: float, placement: str = "prediction"
) -> float:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99))
    used = enhance_scheduler(scheduler(), module, strength, placement)
    latents = sample_latents(unet, used, noise, Conditions(torch.zeros(8, 2, 3), torch.zeros(2, 3)), Guidance(), 10)
    return float(latents.std() / VARIANCE**0.5)


@pytest.mark.parametrize("placement", ["prediction", "direction"])
def test_training_gives_back_what_ddim_loses(placement: str) -> None:
    """Drawn as it was trained: what direction term and prediction need is not the same."""
    torch.manual_seed(0)
    base = scheduler()
    unet, module = ExactDenoiser(base.alphas_cumprod), EnhancementModule()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    before = final_std(unet, module, 1.0, placement)
    assert before < 0.85  # ten first-order steps lose this much, by the product of cosines
    for k in range(40):
        noise, reference = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(k))
        chain = Chain("ddim", 10, Guidance(), False, noise, reference)
        loss, _ = chain_loss(unet, base, module, batch(k), torch.zeros(2, 3), chain, placement=placement)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = final_std(unet, module, 1.0, placement)
    # The direction term fades with the noise, so the cap leaves it less to give back.
    assert abs(1 - after) < {"prediction": 0.6, "direction": 0.8}[placement] * abs(1 - before)
    assert abs(final_std(unet, module, 0.0) - before) < 1e-6  # strength 0 is the plain sampler


def test_gradients_reach_the_module_alone() -> None:
    unet = torch.nn.Module()
    exact = ExactDenoiser(scheduler().alphas_cumprod)
    unet.weight = torch.nn.Parameter(torch.ones(()))
    unet.forward = lambda s, t, encoder_hidden_states, return_dict: (  # type: ignore[method-assign]
        unet.weight * exact(s, t, encoder_hidden_states, return_dict)[0],
    )
    module = EnhancementModule()
    chain = draw_chain(batch(0), EnhancementConfig(steps_range=[4, 4]), seeded(0), [seeded(1, i) for i in range(8)])
    loss, _ = chain_loss(unet, scheduler(), module, batch(0), torch.zeros(2, 3), chain)
    loss.backward()
    assert unet.weight.grad is None
    assert module.gain.output.bias.grad is not None and module.gain.output.bias.grad.abs().sum() > 0


def draw_chains(data: dict[str, torch.Tensor], cfg: EnhancementConfig, count: int) -> list[Chain]:
    return [draw_chain(data, cfg, seeded(0, k), [seeded(1, i) for i in range(8)]) for k in range(count)]


def test_chains_are_drawn_within_their_ranges() -> None:
    chains = draw_chains(batch(0), EnhancementConfig(steps_range=[5, 7], guidance_range=[1.5, 2.0]), 40)
    assert {c.num_inference_steps for c in chains} == {5, 6, 7}
    assert all(1.5 <= c.guidance.text <= 2.0 for c in chains)
    assert {c.solver for c in chains} == {"ddim", "dpm++", "euler", "unipc"}
    usual = draw_chains(batch(0), EnhancementConfig(), 300)
    steps, text = (
        torch.tensor([f(c) for c in usual]) for f in (lambda c: c.num_inference_steps, lambda c: c.guidance.text)
    )
    assert (steps.min(), steps.max()) == (8, 50) and 0.35 < (steps < 20).float().mean() < 0.65
    assert text.min() < 1.5 and text.max() > 7.5


def test_sources_are_dropped_and_guided_by_their_own_scale() -> None:
    data = {**batch(0), "source": torch.zeros(SHAPE)}
    chains = draw_chains(data, EnhancementConfig(), 300)
    shown = [c for c in chains if not c.alone]
    assert 0.1 < 1 - len(shown) / 300 < 0.2
    assert all(c.guidance.text == c.guidance.source for c in chains if c.alone)
    assert all(1 <= c.guidance.source <= 3 for c in shown) and max(c.guidance.source for c in shown) > 2.8
    same = [c.guidance.text for c in shown if c.guidance.text == c.guidance.source]
    assert 0.4 < len(same) / len(shown) < 0.6 and 2.8 < max(same) <= 3
    assert max(c.guidance.text for c in shown) > 7.5


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++", "unipc"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_a_chain_is_the_samplers_own(solver: str, alone: bool, identity: bool) -> None:
    """The network is asked what ``sample_latents`` asks it, also where the module edits."""
    base, data = scheduler(), {**batch(0), "source": torch.full(SHAPE, 0.3)}
    exact = ExactDenoiser(base.alphas_cumprod)
    asked: list[torch.Tensor] = []
    sources: list[torch.Tensor | None] = []

    class Steered(torch.nn.Module):
        """Its output depends on source and caption, so that every branch of the guidance counts."""

        def forward(self, sample, t, encoder_hidden_states, return_dict):  # noqa: ANN001, ANN202
            asked.append(sample.detach())
            x, source = sample.chunk(2, dim=1)
            return (
                exact(x, t, None, False)[0] + 0.1 * source + encoder_hidden_states.mean((1, 2))[:, None, None, None],
            )

    data["text"] = torch.full((SHAPE[0], 2, 3), 0.05)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    guidance = Guidance(2.0, 2.0) if alone else Guidance(3.0, 1.5)
    chain = Chain(solver, 6, guidance, alone, noise, noise)

    class Watched(EnhancementModule):
        def evaluate(self, x0, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
            sources.append(kwargs["source"])
            return super().evaluate(x0, *args, **kwargs)

    module = Watched() if identity else _trained(Watched())
    chain_loss(Steered(), base, module, data, torch.zeros(2, 3), chain)
    while_training, asked = asked, []
    shown = torch.zeros(SHAPE) if alone else data["source"]
    drawing, told = build_scheduler(solver, base), list(sources)
    if not identity:
        drawing = enhance_scheduler(drawing, module, source=None if alone else data["source"])
    sample_latents(Steered(), drawing, noise, Conditions(data["text"], torch.zeros(2, 3), shown), guidance, 6)
    assert len(told) == 6 and all((source is None) == alone for source in told)
    torch.testing.assert_close(torch.stack(while_training), torch.stack(asked), atol=1e-5, rtol=1e-5)
    if not identity:  # it does something
        sample_latents(
            Steered(),
            build_scheduler(solver, base),
            noise,
            Conditions(data["text"], torch.zeros(2, 3), shown),
            guidance,
            6,
        )
        assert (asked[-1] - asked[5]).abs().max() > 1e-3


def _trained(module: EnhancementModule) -> EnhancementModule:
    """With a last layer that is not zero any more."""
    assert module.gain is not None
    with torch.no_grad():
        module.gain.output.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(7))
        module.gain.output.bias.fill_(0.4)
    return module
