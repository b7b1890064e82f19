"""How loud the finished module is: judged on validation pairs, half of them drawn by each of two solvers.

The gain learns from a few chains of random settings, each step judged on its own. Where a backbone can hardly draw
its data, or guidance has filled every deficit already, small errors of many steps add up to too much texture. So the
finished module draws validation pairs with all, half and none of its gain, and the share whose band energies come
nearest to the real photos' is what the run saves: none, where none is needed. One half of the pairs is drawn with
DPM++ 2M and one with DDIM, which loses energy of its own: what is kept is right for solvers of both kinds. A gain makes
louder what the network has drawn, true or not, so beside the texture of source photos it is kept only where it takes
pictures no farther away from their photos: energy is not bought with what the source has proved.

The finest band of pictures is weaker than photos' because the autoencoder cannot keep all of it and no gate can say
where what is missing would go. Where the source photo has more of it than the picture, the picture's own is made
louder, by at most what brings its power on the drawn pairs to that of the real ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from lora_dae.adapter.fused import merged_once
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.module import PIXEL_GAIN, EnhancementModule
from lora_dae.enhancement.objective import on_policy_loss
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.sampling.draw import Drawer

SHARES = (0.0, 0.5, 1.0)
PAIRS = 32


@dataclass(frozen=True)
class Calibration:
    """share: how much of the gain is kept; untrue: how much would be by the energies alone, if that is more;
    gaps: for each share tried, how far the drawn latents' band energies are from the real ones' (``on_policy_loss``),
    on the even and on the odd pairs."""

    share: float
    gaps: dict[float, tuple[float, float]]
    untrue: float = 0.0

    def __str__(self) -> str:
        tried = ", ".join(f"{sum(gap) / 2:.3f} with {share:.0%}" for share, gap in self.gaps.items())
        told = f"; {self.untrue:.0%} would take pictures away from their photos" if self.untrue > self.share else ""
        return f"{self.share:.0%} of the gain is kept (gap of band energies on validation pairs: {tried}{told})"


def calibrate_gain(drawers: tuple[Drawer, Drawer], held_out: HeldOut, captions: Sequence[str]) -> Calibration:
    """Keep the best share of the drawers' one enhancement's gain, in place; the first draws even pairs, the other odd.

    A share above 0 is kept only if it is farther from the real photos than 0 is on neither half of the pairs, and
    nearer on one: what the gain does for one solver alone changes nothing with the other. With source texture that
    holds for the squared error of the latents as well.
    """
    module, backbone = drawers[0].enhancement, drawers[0].backbone
    assert module is not None and module.gain is not None
    real = backbone.encode_images(np.stack([pair.image for pair in held_out.pairs]))[0]
    gaps, errors, needed = {}, {}, drawers[0].placement == "direction"
    with merged_once(backbone.unet):
        for share in SHARES:
            trial = with_share(module, share, needed)
            drawn = [
                _drawn(replace(drawer, enhancement=trial), held_out, captions, range(half, len(real), 2))
                for half, drawer in enumerate(drawers)
            ]
            even, odd = (_gap(latents, real[half::2], module.levels) for half, latents in enumerate(drawn))
            gaps[share] = (even, odd)
            errors[share] = [float((latents - real[half::2]).square().mean()) for half, latents in enumerate(drawn)]
    none = gaps[0.0]
    better = [
        s for s in SHARES if all(g <= g0 for g, g0 in zip(gaps[s], none, strict=True)) and sum(gaps[s]) < sum(none)
    ]
    true = better
    if module.texture is not None and held_out.sources is not None:
        true = [s for s in better if all(e <= e0 for e, e0 in zip(errors[s], errors[0.0], strict=True))]
    share, untrue = (min(some, key=lambda s: sum(gaps[s]), default=0.0) for some in (true, better))
    keep_share(module, share, needed)
    return Calibration(share, gaps, untrue)


@dataclass(frozen=True)
class Finest:
    """log_gain of the finest band, the most there is; power: drawn over real without it."""

    log_gain: float
    power: float

    def __str__(self) -> str:
        return (
            f"finest band of pictures: {self.power:.0%} of the real photos' power on validation pairs, made up to "
            f"{math.exp(self.log_gain):.2f} times as large"
        )


def calibrate_finest(
    drawers: tuple[Drawer, Drawer], held_out: HeldOut, captions: Sequence[str], placed: bool = True
) -> Finest:
    """Set ``finest_log_gain`` of the drawers' one enhancement, in place; the first draws even pairs, the other odd.

    On the garments where pairs have masks and sources and drawn garments lie where the photos' do (``placed``), else
    on whole pictures. What one half of the pairs asks for has to bring the other half nearer to its photos as well,
    else it is 0.
    """
    module, sources = drawers[0].enhancement, held_out.sources
    assert module is not None
    module.finest_log_gain = 0.0
    photos = np.stack([pair.image for pair in held_out.pairs])
    drawn = np.empty_like(photos)
    for half, drawer in enumerate(drawers):
        shown = None if sources is None else sources[half::2]
        drawn[half::2] = drawer.images(captions[half::2], shown, 1.0, range(half, len(photos), 2))
    masks = held_out.masks if placed and sources is not None else None
    real, made = finest_energy(photos, masks), finest_energy(drawn, masks)
    room = torch.full(made.shape, math.inf)  # of whole pictures no source tells all
    if masks is not None and sources is not None:
        room = module.lacking(_pixels(drawn), _pixels(sources))

    def missing(some: slice) -> float:
        return louder_by(made[some], room[some], float(real[some].sum()))

    even, odd, asked = missing(slice(0, None, 2)), missing(slice(1, None, 2)), missing(slice(None))
    if abs(odd - even) < min(abs(odd), abs(even)):
        module.finest_log_gain = asked
    return Finest(module.finest_log_gain, float(made.sum() / real.sum()) if real.any() else 1.0)


def finest_energy(images: np.ndarray, masks: Tensor | None) -> Tensor:
    """(N, H, W): squares of the finest band of uint8 (N, H, W, 3), 0 outside ``masks`` (N, H, W) of 0 and 255."""
    energy = split_bands(_pixels(images), 1)[0][0].square().sum(1)
    return energy if masks is None else energy * (masks > 127)


def louder_by(energy: Tensor, room: Tensor, wanted: float) -> float:
    """The log gain within PIXEL_GAIN of 0 that brings the sum of ``energy`` nearest to ``wanted``.

    At no place it adds more than ``room`` (as energy, of amplitudes). 0 where there is nothing to bring there.
    """
    if wanted <= 0 or float(energy.sum()) <= 0:
        return 0.0

    def beyond(log_gain: float) -> float:
        return float((energy.double() * (2 * room.clamp(max=log_gain).double()).exp()).sum()) - wanted

    ends = -PIXEL_GAIN, PIXEL_GAIN
    at = [beyond(end) for end in ends]
    if at[0] >= 0 or at[1] <= 0:
        return ends[0] if at[0] >= 0 else ends[1]
    return float(brentq(beyond, *ends))


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) as (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def with_share(module: EnhancementModule, share: float, needed: bool = False) -> EnhancementModule:
    """A copy of the module with ``share`` of its gain."""
    copied = copy.deepcopy(module)
    keep_share(copied, share, needed)
    return copied


@torch.no_grad()
def keep_share(module: EnhancementModule, share: float, needed: bool = False) -> None:
    """Scale the gain's log gains by ``share`` in [0, 1], in place.

    At 0 it is gone, or the identity if it is all there is or ``needed``, as by ``placement=direction``.
    """
    assert module.gain is not None
    if share > 0:
        module.max_log_gain = module.gain.max_log_gain = share * module.max_log_gain
    elif not needed and (module.texture is not None or module.decoder is not None):
        module.max_log_gain, module.gain = 0.0, None
    else:
        module.gain.output.weight.zero_()
        module.gain.output.bias.zero_()


def _drawn(drawer: Drawer, held_out: HeldOut, captions: Sequence[str], numbers: range) -> Tensor:
    """Latents of the pairs of these numbers, at strength 1."""
    sources, size, parts = held_out.sources, drawer.cfg.batch_size, []
    for k in range(0, len(numbers), size):
        some = list(numbers[k : k + size])
        shown = None if sources is None else sources[some]
        parts.append(drawer.latents([captions[i] for i in some], shown, 1.0, some))
    return torch.cat(parts)


def _gap(drawn: Tensor, real: Tensor, levels: int) -> float:
    return float(on_policy_loss(drawn, real, drawn.new_zeros(len(drawn), levels, *drawn.shape[2:])).total)
