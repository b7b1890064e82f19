"""How much of the gain is kept: known deficits, none, and what keeping a share means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_dae.config import SamplingConfig
from lora_dae.data.pair import Pair
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.training.calibrate import calibrate_gain, keep_share, with_share

CAP = math.log(1.5)


def module(**parts: int | bool) -> EnhancementModule:
    """A module that multiplies every band by 1.5 at low noise."""
    made = EnhancementModule(max_log_gain=CAP, **parts)  # type: ignore[arg-type]
    assert made.gain is not None
    nn.init.constant_(made.gain.output.bias, 10.0)
    return made


def pairs(count: int) -> HeldOut:
    image = np.zeros((8, 8, 3), np.uint8)
    return HeldOut([Pair(id=str(i), group_id=str(i), caption="a shirt", image=image) for i in range(count)])


REAL = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@dataclass
class Chain:
    """A sampler in closed form: the real latents, ``deficit`` times too weak, made louder by the module's cap."""

    enhancement: EnhancementModule | None
    deficit: float
    cfg: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(batch_size=3)
    )  # 8 pairs: the last batch is short

    @property
    def backbone(self) -> SimpleNamespace:
        return SimpleNamespace(encode_images=lambda images: (REAL[: len(images)], None), unet=nn.Identity())

    def latents(self, captions: list[str], sources: None, strength: float, indices: list[int]) -> Tensor:
        assert self.enhancement is not None
        gain = 0.0 if self.enhancement.gain is None else self.enhancement.gain.max_log_gain
        return REAL[indices] / self.deficit * math.exp(gain)


@pytest.mark.parametrize(("deficit", "kept"), [(1.5, 1.0), (1.5**0.5, 0.5), (1.0, 0.0), (0.8, 0.0)])
def test_what_is_missing_decides(deficit: float, kept: float) -> None:
    made = module(decoder=True)
    found = calibrate_gain(Chain(made, deficit), pairs(8), ["a shirt"] * 8)  # type: ignore[arg-type]
    assert found.share == kept
    assert made.max_log_gain == pytest.approx(kept * CAP)
    assert (made.gain is None) == (kept == 0)


def test_half_of_the_gain_halves_the_log_gain_everywhere() -> None:
    made, x = module(), torch.randn(2, 4, 16, 16)
    nn.init.normal_(made.gain.output.weight)  # type: ignore[union-attr]
    arguments = (x, x, x, 0.9, 0.4, 0.2)
    whole, half = (m.evaluate(*arguments).log_gain for m in (made, with_share(made, 0.5)))
    assert whole is not None and half is not None
    torch.testing.assert_close(half, whole / 2)


def test_a_module_of_gain_alone_becomes_the_identity() -> None:
    made, x = module(), torch.randn(2, 4, 16, 16)
    keep_share(made, 0.0)
    assert made.evaluate(x, x, x, 0.9, 0.4, 0.2).delta.abs().max() == 0
