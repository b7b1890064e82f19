"""Real photos that are noised to a share of the schedule, from where they are drawn again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lora_dae.diffusion import add_noise, current_level


@dataclass(frozen=True)
class Noised:
    """``latents`` of real photos, clean, float32 (N, C, h, w), noised to ``strength``, in [0, 1], of the schedule.

    SDEdit (Meng et al. 2022, arXiv 2108.01073), counted as diffusers' image-to-image pipelines count it. The noise is
    the one that the image's chain would start from.
    """

    latents: Tensor
    strength: float

    def __getitem__(self, some: slice) -> Noised:
        return Noised(self.latents[some], self.strength)

    def begin(self, scheduler: Any, noise: Tensor, num_inference_steps: int) -> tuple[int, Tensor]:
        """Which of ``scheduler.timesteps`` is the first to run, and the sample that it starts from.

        Call after ``set_timesteps``. Where none runs, the sample is the photos' clean latents.
        """
        steps = steps_left(num_inference_steps, self.strength)
        if steps == 0:
            return len(scheduler.timesteps), self.latents
        first = (num_inference_steps - steps) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return first, add_noise(self.latents, noise, *current_level(scheduler, scheduler.timesteps[first]))


def steps_left(num_inference_steps: int, strength: float) -> int:
    """How many of the steps run from a photo that is noised to ``strength``."""
    return min(int(num_inference_steps * strength), num_inference_steps)
