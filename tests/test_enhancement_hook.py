"""The hook in real diffusers pipelines and schedulers: absent without strength, consistent with it."""

from __future__ import annotations

import inspect
from contextlib import contextmanager

import diffusers
import pytest
import torch

from lora_dae.config import SCHEDULERS, ConfigError
from lora_dae.diffusion import PREDICTION_TYPES, current_level, next_level, predict_x0
from lora_dae.enhancement import EnhancementModule, enhance_scheduler
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.hook import first_order_share, gate_inputs

CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
}
PLAIN = {"ddim": {"clip_sample": False}, "ddpm": {"clip_sample": False}, "pndm": {"skip_prk_steps": True}}


def scheduler_for(name: str, prediction_type: str = "epsilon"):
    return CLASSES[name](
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        **PLAIN.get(name, {}),
    )


def random_module(seed: int = 0) -> EnhancementModule:
    torch.manual_seed(seed)
    module = EnhancementModule()
    torch.nn.init.normal_(module.gain.output.weight, std=1.0)
    torch.nn.init.normal_(module.gain.output.bias, std=1.0)
    return module.requires_grad_(False)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    ).eval()


def pipeline(unet, scheduler):
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def enhanced(pipe, module, strength: float = 1.0, placement: str = "prediction"):
    """Its scheduler enhanced, and told of all that the UNet puts out, as a call of an attached pipeline does."""
    plain = pipe.scheduler
    pipe.scheduler = scheduler = enhance_scheduler(plain, module, strength, placement)
    hook = pipe.unet.register_forward_hook(lambda _unet, _inputs, output: scheduler.set_conditional(output[0]))
    try:
        yield
    finally:
        hook.remove()
        pipe.scheduler = plain


def draw(pipe, guidance_scale: float = 3.0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))
    return pipe(
        prompt_embeds=embeds[:2],
        negative_prompt_embeds=embeds[2:],
        guidance_scale=guidance_scale,
        num_inference_steps=4,
        height=64,
        width=64,
        generator=generator,
        output_type="latent",
        **options,
    ).images


def test_every_configured_scheduler_is_tested():
    assert set(CLASSES) == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_pipeline_is_bit_exact_without_and_different_with_the_module(unet, name):
    pipe = pipeline(unet, scheduler_for(name))
    plain = draw(pipe)
    for module, strength, placement in (
        (random_module(), 0.0, "prediction"),
        (None, 1.0, "prediction"),
        (random_module(), 1.0, "none"),
        (EnhancementModule(), 1.0, "prediction"),  # as initialized: the identity
    ):
        with enhanced(pipe, module, strength, placement):
            assert torch.equal(draw(pipe), plain)
    with enhanced(pipe, random_module(), 0.5):
        half = draw(pipe)
    with enhanced(pipe, random_module(), 1.0):
        whole = draw(pipe)
    assert torch.isfinite(whole).all()
    assert 0 < float((half - plain).abs().max()) < float((whole - plain).abs().max())
    assert torch.equal(draw(pipe), plain)  # nothing was changed in the plain scheduler itself


@pytest.mark.parametrize("name", SCHEDULERS)
def test_strength_zero_hands_over_the_very_same_tensors(name):
    seen = []
    plain_step = CLASSES[name].step

    def spy(self, model_output, timestep, sample, *args, **kwargs):
        seen.append((model_output, sample))
        return plain_step(self, model_output, timestep, sample, *args, **kwargs)

    scheduler = scheduler_for(name)
    spied = type("Spied", (CLASSES[name],), {"step": spy})
    scheduler.__class__ = spied
    scheduler = enhance_scheduler(scheduler, random_module(), 0.0)
    scheduler.set_timesteps(4)
    output, sample = torch.randn(2, 1, 4, 8, 8)
    timestep = scheduler.timesteps[0]
    scheduler.scale_model_input(sample, timestep)
    scheduler.step(output, timestep, sample)
    assert seen[0][0] is output and seen[0][1] is sample


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_enhanced_scheduler_passes_for_its_own_kind(name):
    plain = scheduler_for(name)
    enhanced = enhance_scheduler(plain, random_module())
    assert isinstance(enhanced, CLASSES[name]) and enhanced is not plain
    assert type(enhanced).__name__ == CLASSES[name].__name__
    assert enhanced.config == plain.config and len(enhanced) == len(plain)
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(enhanced, method)) == inspect.signature(getattr(plain, method))
    enhanced.set_timesteps(4)
    plain.set_timesteps(4)
    assert torch.equal(enhanced.timesteps, plain.timesteps)
    assert type(type(enhanced).from_config(enhanced.config)) is CLASSES[name]
    again = enhance_scheduler(enhanced, None)
    assert type(again) is type(enhanced) and again.enhancement.module is None
    assert enhanced.enhancement.module is not None


def test_an_enhanced_pipeline_is_saved_as_the_plain_one(unet, tmp_path):
    pipe = pipeline(unet, scheduler_for("ddim"))
    with enhanced(pipe, random_module()):
        assert pipe.config.scheduler == ("diffusers", "DDIMScheduler")
        pipe.scheduler.save_pretrained(tmp_path)
    assert type(diffusers.DDIMScheduler.from_pretrained(tmp_path)) is diffusers.DDIMScheduler


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["ddim", "euler", "heun"])
def test_x0_moves_by_strength_times_delta_whatever_the_network_predicts(name, prediction_type):
    """The scheduler itself derives x0 + strength * delta, and channel means stay."""
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    scheduler = enhance_scheduler(scheduler_for(name, prediction_type), random_module(), 0.7)
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[-2]
    alpha, sigma = current_level(scheduler, timestep)
    sample = alpha * x0 + sigma * noise
    norm = (alpha**2 + sigma**2) ** 0.5
    output = {
        "epsilon": noise,
        "v_prediction": (alpha * noise - sigma * x0) / norm,
        "sample": x0,
    }[prediction_type]
    inputs = gate_inputs(scheduler, output, timestep, sample)
    torch.testing.assert_close(inputs.x0, x0, rtol=1e-4, atol=1e-4)
    result = scheduler.step(output, timestep, sample).pred_original_sample
    expected = x0 + 0.7 * random_module()(*inputs)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.mean((2, 3)), x0.mean((2, 3)), rtol=0, atol=1e-5)
    assert float((result - x0).abs().max()) > 0.05


def test_unet_hook_finds_the_conditional_half(unet):
    """Guidance inflates texture, so features must come from the conditional prediction."""
    pipe, module = pipeline(unet, scheduler_for("ddim")), random_module()
    seen = []
    evaluate = module.forward
    module.forward = lambda *inputs, **options: seen.append(inputs) or evaluate(*inputs, **options)
    outputs = []
    handle = unet.register_forward_hook(lambda _m, _i, output: outputs.append(output[0]))
    with enhanced(pipe, module):
        draw(pipe)
    handle.remove()
    x0, x0_cond, sample, alpha, sigma = seen[-1][:5]
    uncond, cond = outputs[-1].chunk(2)
    torch.testing.assert_close(x0_cond, predict_x0(cond, sample, alpha, sigma, "epsilon"))
    guided = uncond + 3.0 * (cond - uncond)
    torch.testing.assert_close(x0, predict_x0(guided, sample, alpha, sigma, "epsilon"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("copies", "part"), [(1, 0), (2, 1), (3, 0)])
def test_set_conditional_takes_every_batch_order(copies, part):
    scheduler = scheduler_for("ddim")
    scheduler.set_timesteps(10)
    sample, guided = torch.randn(2, 2, 4, 8, 8)
    raw = torch.randn(2 * copies, 4, 8, 8)
    inputs = gate_inputs(scheduler, guided, scheduler.timesteps[5], sample, raw)
    cond = raw[2 * part : 2 * part + 2]
    torch.testing.assert_close(inputs.x0_cond, predict_x0(cond, sample, inputs.alpha, inputs.sigma, "epsilon"))


def test_first_order_share_knows_the_solvers():
    shares = {name: first_order_share(scheduler_for(name)) for name in SCHEDULERS}
    assert shares == {name: float(name in ("ddim", "euler")) for name in SCHEDULERS}
    assert first_order_share(scheduler_for("ddim"), eta=0.25) == 0.75
    assert first_order_share(diffusers.DPMSolverMultistepScheduler(solver_order=1)) == 1
    assert first_order_share(diffusers.EulerAncestralDiscreteScheduler()) == 0
    with pytest.raises(ConfigError, match="KDPM2DiscreteScheduler cannot be enhanced"):
        first_order_share(diffusers.KDPM2DiscreteScheduler())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_discretization_part_acts_only_with_first_order_solvers(unet, name):
    module = random_module()
    module.gain.output.weight[: module.levels] = 0
    module.gain.output.bias[: module.levels] = 0
    pipe = pipeline(unet, scheduler_for(name))
    plain = draw(pipe)
    with enhanced(pipe, module):
        unchanged = torch.equal(draw(pipe), plain)
    assert unchanged == (name not in ("ddim", "euler"))


def test_the_discretization_part_vanishes_with_many_steps():
    """What it does to a chain of exact Gaussian denoisers shrinks about as 1 / steps."""
    module = random_module()
    module.gain.output.weight[: module.levels] = 0
    module.gain.output.bias[: module.levels] = 0

    def chain(scheduler, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        sample = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for timestep in scheduler.timesteps[scheduler.timesteps > 200]:  # below, lambda itself is coarse
                alpha, sigma = current_level(scheduler, timestep)
                noise = sample * sigma / (0.3 * alpha**2 + sigma**2)  # x0 of variance 0.3
                sample = scheduler.step(noise, timestep, sample).prev_sample
        return sample

    def change(steps: int) -> float:
        plain = scheduler_for("ddim")
        difference = chain(enhance_scheduler(plain, module), steps) - chain(plain, steps)
        return float(difference.abs().max())

    few, many = change(10), change(500)
    assert few > 1e-3 and many < few / 15


def test_direction_placement_changes_only_the_direction_term():
    scheduler = enhance_scheduler(scheduler_for("ddim", "v_prediction"), random_module(), 0.8, "direction")
    plain = scheduler_for("ddim", "v_prediction")
    for each in (scheduler, plain):
        each.set_timesteps(10)
    timestep = plain.timesteps[-3]
    output, sample = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    inputs = gate_inputs(plain, output, timestep, sample, eta=0.5)
    results = [
        each.step(output, timestep, sample, eta=0.5, generator=torch.Generator().manual_seed(5))
        for each in (scheduler, plain)
    ]
    assert torch.equal(results[0].pred_original_sample, results[1].pred_original_sample)
    # prev = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + noise: only the bands of eps gain.
    noise = (sample - inputs.alpha * inputs.x0) / inputs.sigma
    delta = random_module()(*inputs, direction=True)
    std = 0.5 * plain._get_variance(int(timestep), int(timestep) - 100) ** 0.5
    scale = (next_level(plain, timestep)[1] ** 2 - std**2) ** 0.5
    change = results[0].prev_sample - results[1].prev_sample
    torch.testing.assert_close(change, 0.8 * scale * delta, rtol=1e-4, atol=1e-5)
    assert float(change.abs().max()) > 1e-2
    # With equal gains everywhere the delta is the gain of eps itself, without its low-pass.
    constant = EnhancementModule().requires_grad_(False)
    constant.gain.output.bias.fill_(10.0)
    inputs = inputs._replace(first_order=1.0)
    delta, log_gain = constant.evaluate(*inputs, direction=True)[:2]
    low = split_bands(noise, 3)[1]
    torch.testing.assert_close(delta, (log_gain[0, 0, 0, 0].exp() - 1) * (noise - low), rtol=1e-3, atol=1e-4)


def test_half_precision_stays_half():
    scheduler = enhance_scheduler(scheduler_for("dpm++"), random_module())
    scheduler.set_timesteps(4)
    output, sample = torch.randn(2, 1, 4, 8, 8).half()
    with torch.no_grad():
        result = scheduler.step(output, scheduler.timesteps[0], sample)
    assert result.prev_sample.dtype == torch.float16


def test_gradients_reach_the_module_through_a_step():
    module = random_module().requires_grad_(True)
    scheduler = enhance_scheduler(scheduler_for("ddim"), module)
    scheduler.set_timesteps(10)
    output, sample = torch.randn(2, 1, 4, 8, 8)
    scheduler.step(output, scheduler.timesteps[-2], sample).prev_sample.square().sum().backward()
    assert all(float(parameter.grad.abs().sum()) > 0 for parameter in module.parameters())


def test_bad_requests_are_refused_in_one_sentence():
    scheduler = scheduler_for("euler")
    with pytest.raises(ConfigError, match="strength=-1"):
        enhance_scheduler(scheduler, random_module(), -1)
    with pytest.raises(ConfigError, match="placement='both'"):
        enhance_scheduler(scheduler, random_module(), placement="both")
    with pytest.raises(ConfigError, match="direction.*EulerDiscreteScheduler"):
        enhance_scheduler(scheduler, random_module(), placement="direction")
