"""How much of the trained gain a run keeps: judged on validation pairs, drawn with the default sampling.

The gain learns from a few chains of random settings, each step judged on its own. Where a backbone can hardly draw
its data, or guidance has filled every deficit already, small errors of many steps add up to too much texture. So the
finished module draws validation pairs with all, half and none of its gain, and the share whose band energies come
nearest to the real photos' is what the run saves: none, where none is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lora_dae.adapter.fused import merged_once
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.objective import on_policy_loss
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.sampling.draw import Drawer

SHARES = (0.0, 0.5, 1.0)
PAIRS = 32


@dataclass(frozen=True)
class Calibration:
    """share: how much of the gain is kept; gaps: for each share tried, how far the drawn latents' band energies are
    from the real ones' (``on_policy_loss``), on the even and on the odd pairs."""

    share: float
    gaps: dict[float, tuple[float, float]]

    def __str__(self) -> str:
        tried = ", ".join(f"{sum(gap) / 2:.3f} with {share:.0%}" for share, gap in self.gaps.items())
        return f"{self.share:.0%} of the gain is kept (gap of band energies on validation pairs: {tried})"


def calibrate_gain(drawer: Drawer, held_out: HeldOut, captions: Sequence[str]) -> Calibration:
    """Keep the best share of ``drawer.enhancement``'s gain, in place; it draws as the drawer is set.

    A share above 0 is kept only if it is nearer to the real photos than 0 is on both halves of the pairs.
    """
    module = drawer.enhancement
    assert module is not None and module.gain is not None
    real = drawer.backbone.encode_images(np.stack([pair.image for pair in held_out.pairs]))[0]
    gaps, size = {}, drawer.cfg.batch_size
    with merged_once(drawer.backbone.unet):
        for share in SHARES:
            trial = replace(drawer, enhancement=with_share(module, share))
            drawn = torch.cat([_drawn(trial, held_out, captions, k, size) for k in range(0, len(real), size)])
            gaps[share] = (_gap(drawn[0::2], real[0::2], module.levels), _gap(drawn[1::2], real[1::2], module.levels))
    better = [s for s in SHARES if s > 0 and all(g < g0 for g, g0 in zip(gaps[s], gaps[0.0], strict=True))]
    share = min(better, key=lambda s: sum(gaps[s]), default=0.0)
    keep_share(module, share)
    return Calibration(share, gaps)


def with_share(module: EnhancementModule, share: float) -> EnhancementModule:
    """A copy of the module with ``share`` of its gain."""
    copied = copy.deepcopy(module)
    keep_share(copied, share)
    return copied


@torch.no_grad()
def keep_share(module: EnhancementModule, share: float) -> None:
    """Scale the gain's log gains by ``share`` in [0, 1], in place; at 0 it is gone, or the identity if all there is."""
    assert module.gain is not None
    if share > 0:
        module.max_log_gain = module.gain.max_log_gain = share * module.max_log_gain
    elif module.texture is not None or module.decoder is not None:
        module.max_log_gain, module.gain = 0.0, None
    else:
        module.gain.output.weight.zero_()
        module.gain.output.bias.zero_()


def _drawn(drawer: Drawer, held_out: HeldOut, captions: Sequence[str], first: int, size: int) -> Tensor:
    """Latents of one batch, at strength 1."""
    some, sources = list(captions[first : first + size]), held_out.sources
    shown = None if sources is None else sources[first : first + size]
    return drawer.latents(some, shown, 1.0, list(range(first, first + len(some))))


def _gap(drawn: Tensor, real: Tensor, levels: int) -> float:
    return float(on_policy_loss(drawn, real, drawn.new_zeros(len(drawn), levels, *drawn.shape[2:])).total)
