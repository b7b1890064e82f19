"""``mode=masked`` and ``mode=reconstruction``: the test photos themselves are given, drawn into or drawn again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora_dae.backbone.load import Backbone
from lora_dae.config import Config, ConfigError
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.sampling.keep import Kept
from lora_dae.sampling.noised import Noised, steps_left

NOISE_STRENGTH = 0.4


@dataclass(frozen=True)
class PhotoMode:
    """``masked``: the garments alone are drawn. ``reconstruction``: all is, from photos noised to a strength."""

    name: str  # masked | reconstruction
    noise_strength: float | None = None  # of reconstruction, a share of the schedule in (0, 1]

    def __str__(self) -> str:
        return self.name if self.noise_strength is None else f"{self.name}, strength {self.noise_strength:g}"

    @property
    def folder(self) -> str:
        """How folders of such pictures end."""
        return f"_{self.name}" + ("" if self.noise_strength is None else f"_{self.noise_strength:g}")

    def check(self, cfg: Config, split: str) -> None:
        """Raises ConfigError for a run that cannot draw so; no weight is loaded."""
        if self.noise_strength is None:
            if not load_splits(cfg.data)[split].has_mask:
                raise ConfigError(
                    f"mode=masked draws the garment alone, and the {split} split has no garment masks: train with "
                    "data.masks=<folder> (python -m lora_dae.data masks draws them), or leave mode= out."
                )
            return
        steps = cfg.sampling.num_inference_steps
        if steps_left(steps, self.noise_strength) == 0:
            raise ConfigError(
                f"noise_strength={self.noise_strength:g} of {steps} steps is less than one, so nothing would be drawn: "
                f"give at least {1 / steps:.2g}, or more num_inference_steps."
            )
        if cfg.sampling.scheduler == "lms":  # diffusers' solver then drops terms of a sum
            raise ConfigError(
                "mode=reconstruction starts in the middle of the schedule, where lms needs steps that it has not done: "
                "give scheduler=dpm++, say."
            )

    def keep(self, held_out: HeldOut, backbone: Backbone) -> Kept | None:
        """Photos of which all but the garment stays."""
        if self.name != "masked":
            return None
        assert held_out.masks is not None  # of a split that ``check`` let pass
        return Kept.of_photos(backbone, _photos(held_out), held_out.masks)

    def start(self, held_out: HeldOut, backbone: Backbone) -> Noised | None:
        """Photos that the drawing starts from."""
        if self.noise_strength is None:
            return None
        return Noised(backbone.encode_images(_photos(held_out))[0], self.noise_strength)


def photo_mode(mode: str | None, noise_strength: float | None) -> PhotoMode | None:
    """The mode of these options; ConfigError for unknown ones, and for a strength out of (0, 1] or without its mode."""
    if mode not in (None, "masked", "reconstruction"):
        raise ConfigError(
            f"mode={mode} is unknown: use masked or reconstruction, or leave it out to draw as the run draws."
        )
    if mode != "reconstruction":
        if noise_strength is not None:
            raise ConfigError("noise_strength belongs to mode=reconstruction: leave it out.")
        return None if mode is None else PhotoMode(mode)
    strength = NOISE_STRENGTH if noise_strength is None else noise_strength
    if not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ConfigError(f"noise_strength={strength} is no share of the schedule: give 0.3 to 0.5, at most 1.")
    return PhotoMode(mode, strength)


def _photos(held_out: HeldOut) -> np.ndarray:
    return np.stack([p.image for p in held_out.pairs])
