"""Puts the enhancement module into the reverse step of any Stable Diffusion pipeline of diffusers.

    pipe.scheduler = enhance_scheduler(pipe.scheduler, load_enhancement("enhancement.safetensors"), strength=0.7)

The enhanced scheduler is a copy whose ``step`` first edits the network output, or for
``placement="direction"`` edits DDIM's direction term afterwards. It stays an instance of its own class, with
its own configuration, signatures and numerics; multistep solvers convert the edited output themselves and so
keep a consistent history. At strength 0, or without a module, the very same tensors pass through.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from lora_dae.config import PLACEMENTS, ConfigError
from lora_dae.diffusion import (
    current_level,
    is_sigma_space,
    next_level,
    predict_x0,
    step_levels,
    x0_delta_to_output_delta,
)
from lora_dae.enhancement.gates import WINDOW
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.registration import RegisteredSource, for_images

_SIGMA_FLOOR = 1e-3  # below it x0 hardly depends on the output, and the edit would be divided by almost 0
_HIGHER_ORDER = (UniPCMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler)
_STOCHASTIC = (DDPMScheduler, EulerAncestralDiscreteScheduler)


@dataclass
class Enhancement:
    """What an enhanced scheduler does; ``strength``, ``source`` and its ``trust`` may be changed between images."""

    module: EnhancementModule | None
    strength: float
    placement: str
    # latents of the source photos, (S, C, h, w): one per image, or per prompt; of a registering module, the photos
    source: Tensor | RegisteredSource | None = None
    trust: Tensor | None = None  # in each of them, by what the captions say, (S,) or one per image; None = whole
    conditional: Tensor | None = None  # the network's raw output at this step

    @property
    def active(self) -> bool:
        if self.module is None or self.strength == 0 or self.placement == "none":
            return False
        return self.module.gain is not None or (self.module.texture is not None and self.source is not None)


class GateInputs(NamedTuple):
    """The arguments of ``EnhancementModule.forward`` for one step of a running scheduler."""

    x0: Tensor
    x0_cond: Tensor
    sample: Tensor
    alpha: float
    sigma: float
    h: float
    first_order: float


class EnhancedScheduler:
    """Mixin of every enhanced scheduler: beside ``step``, only this is new."""

    enhancement: Enhancement
    plain_class: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # pipe.scheduler.from_config(...) makes a plain scheduler; only enhance_scheduler makes enhanced ones.
        return cls.plain_class(*args, **kwargs)

    def set_conditional(self, output: Tensor | None) -> None:
        """Hand over the network's conditional output for the next ``step`` (before guidance mixes it).

        Batch as the sample's, or as a pipeline batches it: twice [unconditional, conditional], or three times
        [conditional, image only, neither] (InstructPix2Pix); three in another order (perturbed attention) are usable
        but less exact. Without it the guided output is taken instead.
        """
        self.enhancement.conditional = output


def enhance_scheduler(
    scheduler: Any,
    module: EnhancementModule | None,
    strength: float = 1.0,
    placement: str = "prediction",
    source: Tensor | RegisteredSource | None = None,
    trust: Tensor | None = None,
) -> Any:
    """An enhanced copy of a diffusers scheduler, for a pipeline or a sampling loop of one's own.

    ``strength`` >= 0 scales the edit (1 as trained, 0 off); ``placement`` is ``prediction``, ``direction`` or ``none``.
    ``source``: latents of the source photos (S, C, h, w), scaled as the UNet sees latents, one per image or per prompt;
    without it a module's source texture does nothing. One that was trained with ``enhancement.registered`` takes what
    its ``registering`` makes of photos. ``trust``: in each of them, as ``module.trust`` gives it.

    Call ``set_conditional`` before each ``step`` where guidance is used, and ``set_timesteps`` as usual. Unsupported
    schedulers and values raise ConfigError.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"enhancement.placement={placement!r} is unknown; use one of {', '.join(PLACEMENTS)}.")
    if not 0 <= strength < math.inf:
        raise ConfigError(f"enhancement.strength={strength} is not a finite number >= 0; 0 switches it off.")
    plain_class: Any = getattr(scheduler, "plain_class", type(scheduler))
    if module is not None and placement != "none":
        first_order_share(scheduler)  # refuses unknown solvers
        if placement == "direction" and module.gain is None:
            raise ConfigError(
                "enhancement.placement=direction edits the direction term by the gain, which this module does not "
                "have; use placement=prediction, or train with enhancement=direction."
            )
        if placement == "direction" and plain_class is not DDIMScheduler:
            raise ConfigError(
                f"enhancement.placement=direction edits DDIM's direction term, which {plain_class.__name__} "
                "does not have; use the ddim scheduler or placement=prediction."
            )
    if module is not None and isinstance(source, Tensor) and module.preview is not None:
        raise ConfigError(
            "this module moves source photos to their place: give source=module.registering(photos, ...)."
        )
    enhanced = _copy(scheduler, _enhanced_class(plain_class))
    enhanced.enhancement = Enhancement(module, strength, placement, source, trust)
    return enhanced


def first_order_share(scheduler: Any, eta: float = 0.0) -> float:
    """How far a solver is a deterministic first-order one, in [0, 1]: the share of the u part that applies.

    DDIM has 1 - eta, Euler 1, DPM-Solver++ 1 at order 1, all else 0: UniPC, PNDM, Heun, LMS and DPM-Solver++
    are of higher order, DDPM, ancestral Euler and the SDE solvers draw fresh noise. It is a property of the
    solver as a whole: the first-order opening and closing steps of multistep solvers, Euler's ``s_churn`` and
    LMS's ``order`` argument are not followed. Other schedulers raise ConfigError.
    """
    if isinstance(scheduler, DDIMScheduler):
        return max(0.0, 1.0 - eta)
    if isinstance(scheduler, EulerDiscreteScheduler):
        return 1.0
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        config: Any = scheduler.config  # type: ignore[attr-defined]
        return float(config.solver_order == 1 and not config.algorithm_type.startswith("sde"))
    if isinstance(scheduler, (*_HIGHER_ORDER, *_STOCHASTIC)):
        return 0.0
    raise ConfigError(
        f"{type(scheduler).__name__} cannot be enhanced; use DDIM, DDPM, DPM-Solver++, UniPC, PNDM, Euler, "
        "Euler ancestral, Heun or LMS."
    )


def gate_inputs(
    scheduler: Any,
    model_output: Tensor,
    timestep: Tensor | int | float,
    sample: Tensor,
    conditional: Tensor | None = None,
    eta: float = 0.0,
) -> GateInputs:
    """What the module sees at this step: ``module(*gate_inputs(...))`` is the delta of x0.

    ``model_output`` (guided), ``sample``: (B, C, H, W); ``conditional`` as in ``set_conditional``.
    Call before ``scheduler.step``. Predictions come as float32.
    """
    alpha, sigma = current_level(scheduler, timestep)
    prediction_type, sigma_space = scheduler.config.prediction_type, is_sigma_space(scheduler)

    def clean(output: Tensor) -> Tensor:
        return predict_x0(output.float(), sample.float(), alpha, sigma, prediction_type, sigma_space)

    x0 = clean(model_output)
    conditional = _conditional_part(conditional, len(sample))
    x0_cond = x0 if conditional is None or conditional is model_output else clean(conditional)
    h = _step_size(*step_levels(scheduler, timestep))
    return GateInputs(x0, x0_cond, sample.float(), alpha, sigma, h, first_order_share(scheduler, eta))


def _conditional_part(output: Tensor | None, batch: int) -> Tensor | None:
    if output is None or len(output) == batch:
        return output
    if len(output) == 2 * batch:
        return output[batch:]
    return output[:batch] if len(output) == 3 * batch else None


def _step_size(level: tuple[float, float], following: tuple[float, float]) -> float:
    """h = lambda_s - lambda_t, at least 0; infinite on the step to sigma 0 and from pure noise."""
    (alpha, sigma), (next_alpha, next_sigma) = level, following
    kept = alpha * next_sigma / max(sigma * next_alpha, 1e-12)  # e^-h
    return math.inf if kept == 0 else max(0.0, -math.log(kept))


@functools.cache
def _enhanced_class(plain: type) -> type:
    """A subclass under the plain class's own name, so that pipelines save it as what it is."""

    @functools.wraps(plain.step)  # type: ignore[attr-defined]  # pipelines inspect step's signature
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        enhancement: Enhancement = self.enhancement
        conditional, enhancement.conditional = enhancement.conditional, None
        plain_step = functools.partial(plain.step, self)  # type: ignore[attr-defined]
        if not enhancement.active or _is_idle(self, timestep):
            return plain_step(model_output, timestep, sample, *args, **kwargs)
        eta = kwargs.get("eta", args[0] if args else 0.0) if plain is DDIMScheduler else 0.0
        inputs = gate_inputs(self, model_output, timestep, sample, conditional, eta)
        if enhancement.placement == "direction":
            edit = _direction_edit(self, enhancement, inputs, timestep, eta)
            result = plain_step(model_output, timestep, sample, *args, **kwargs)
            return _with_previous(result, (result[0].float() + edit).to(result[0].dtype))
        edited = _edit_output(self, enhancement, inputs, model_output)
        return plain_step(edited, timestep, sample, *args, **kwargs)

    namespace = {"step": step, "plain_class": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (EnhancedScheduler, plain), namespace)


def _is_idle(scheduler: Any, timestep: Any) -> bool:
    """Whether the edit is 0 or undefined here; then sampling skips it, while training keeps its graph."""
    alpha, sigma = current_level(scheduler, timestep)
    if sigma < _SIGMA_FLOOR:
        return True
    return not torch.is_grad_enabled() and alpha <= sigma * math.exp(WINDOW[0])


def _edit_output(scheduler: Any, enhancement: Enhancement, inputs: GateInputs, model_output: Tensor) -> Tensor:
    trust, source = for_images(enhancement.trust, inputs.x0), enhancement.source
    if isinstance(source, RegisteredSource):
        placed, source = source, source.at(inputs.x0, inputs.sigma / max(inputs.alpha, 1e-6))
        trust = placed.trusted(trust)
    else:
        source = for_images(source, inputs.x0)
    delta = _module_on(enhancement, inputs.x0.device)(*inputs, source=source, trust=trust) * enhancement.strength
    change = x0_delta_to_output_delta(
        delta, inputs.alpha, inputs.sigma, scheduler.config.prediction_type, is_sigma_space(scheduler)
    )
    return (model_output.float() + change).to(model_output.dtype)


def _direction_edit(scheduler: Any, enhancement: Enhancement, inputs: GateInputs, timestep: Any, eta: float) -> Tensor:
    """Change of DDIM's x_s: the bands of its direction term alone (formula 12 of Song et al. 2021)."""
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    noise_variance = eta**2 * float(scheduler._get_variance(int(timestep), int(timestep) - stride))
    next_variance = next_level(scheduler, timestep)[1] ** 2
    scale = max(0.0, next_variance - noise_variance) ** 0.5
    delta = _module_on(enhancement, inputs.x0.device)(*inputs, direction=True)
    return delta * (enhancement.strength * scale)


def _module_on(enhancement: Enhancement, device: torch.device) -> EnhancementModule:
    # pipe.to(device) does not know the module, so it follows the latents.
    assert enhancement.module is not None
    if enhancement.module.device != device:
        enhancement.module.to(device)
    return enhancement.module


def _with_previous(result: Any, previous: Tensor) -> Any:
    if isinstance(result, tuple):
        return (previous, *result[1:])
    return type(result)(**{**result, "prev_sample": previous})


def _copy(scheduler: Any, cls: Any) -> Any:
    """A shallow copy as ``cls``; histories are lists that schedulers change in place, so those are copied."""
    copied = object.__new__(cls)
    state = {key: list(value) if isinstance(value, list) else value for key, value in vars(scheduler).items()}
    vars(copied).update(state)
    return copied
