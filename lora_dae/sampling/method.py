"""What a method may change in the reverse loop. This one changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from lora_dae.diffusion import is_sigma_space, predict_x0, x0_delta_to_output_delta

if TYPE_CHECKING:
    from lora_dae.sampling.loop import Conditions, Guidance


@dataclass(frozen=True)
class Step:
    """One step of the loop, before the scheduler's own ``step``. Latents are (B, C, h, w) float32."""

    unet: nn.Module
    scheduler: Any
    timestep: Tensor
    level: tuple[float, float]  # (alpha, sigma) of ``sample``
    sample: Tensor
    conditions: Conditions
    guidance: Guidance
    predictions: dict[str, Tensor]  # the network's outputs by branch of the guidance

    @property
    def conditional(self) -> Tensor:
        return self.predictions["full"]

    @property
    def unconditional(self) -> Tensor:
        """The least conditioned prediction that guidance asked for."""
        return next(iter(self.predictions.values()))

    def x0(self, output: Tensor) -> Tensor:
        """The clean latents that a network output implies."""
        return predict_x0(output, self.sample, *self.level, self.prediction_type, is_sigma_space(self.scheduler))

    def output_delta(self, delta: Tensor) -> Tensor:
        """What changes the network output so that its x0 rises by ``delta``."""
        alpha, sigma = self.level
        sigma_space = is_sigma_space(self.scheduler)
        return x0_delta_to_output_delta(delta, alpha, sigma, self.prediction_type, sigma_space)

    @property
    def prediction_type(self) -> str:
        return str(self.scheduler.config.prediction_type)


class Method:
    """Plain sampling; each hook is one place where published methods differ from it."""

    extra_calls = 0  # of the network, per step and image

    def whole_calls(self, steps: int) -> float:
        """How many whole calls of the network the loop's ``steps`` calls cost, per image and branch of the guidance."""
        return steps

    @contextmanager
    def around(self, unet: nn.Module) -> Iterator[None]:
        """Holds while a batch is drawn."""
        yield

    def seen_level(
        self, scheduler: Any, timestep: Tensor, position: float, guidance: float
    ) -> tuple[float, float] | None:
        """(alpha, sigma), variance-preserving, that the network is told; None: the true level of the sample.

        ``position`` is 0 at the first noise level and 1 at the last; ``guidance`` the largest scale.
        """
        return None

    def guide(self, step: Step) -> Tensor:
        """The guided network output."""
        return step.guidance.mix(step.predictions)

    def after(self, step: Step, guided: Tensor, reached: Tensor, level: tuple[float, float]) -> Tensor:
        """The sample that the step led to, at (alpha, sigma) ``level``."""
        return reached

    def picture(self, images: np.ndarray) -> np.ndarray:
        """Finished pictures, uint8 (N, H, W, 3)."""
        return images
