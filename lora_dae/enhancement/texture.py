"""Source texture: bands of the source photo, carried to where they belong, let in by a gate.

    delta = sum_b [ (exp(l_b) - 1) W_b x + h_b (W_b (source o flow) - W_b x) ]

A gain can only make louder what is there. The source photo proves what should be there: where its carried bands
agree with the image, the gate ``h_b`` opens and replaces the image's own; where they do not (skin, background, a
source of another garment) it stays shut. Where a registered photo's bands and the image's own do not belong to each
other, a mixture is weaker than either, so it is brought back to the energy that it mixes (as blended textures are:
Heitz and Neyret 2018). One class for predicted clean latents in every reverse step and, with
three channels, for the decoded image. Relatives train a decoder: the skip connections of LaDI-VTON's EMASC
(2305.13501) and the asymmetric VQGAN (2306.04632); here a few thousand numbers decide place by place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_dae.enhancement.bands import local_log_energy, split_bands
from lora_dae.enhancement.gates import FEATURE_SCALE, Observed, pointwise, visible, weighted
from lora_dae.enhancement.match import Match, Matcher, warp

_FLOOR = 1e-4
_MOST = 1.6  # times that a mixture is made louder


class Blend(NamedTuple):
    """What ``SourceTexture`` did: delta (B, C, H, W), gates (B, levels, H, W), the match (None without source)."""

    delta: Tensor
    gates: Tensor | None
    match: Match | None


class SourceTexture(nn.Module):
    """Gates per band and place, from agreement with the matched source and from ``conditions`` numbers per image.

    ``channels`` of the images or latents, ``levels`` bands, ``factors``: scales of the match, coarse first. The last
    layer starts at zero: a new module changes nothing. ``max_log_gain`` > 0 adds a gain per band, which works
    without a source too. ``inputs`` as in ``gates.visible``; ``time`` hides how sure the match is, too. ``guided``:
    gates see what guidance has amplified, band by band and place by place. ``registered``: sources are in place
    as a whole already (registration.py), and nothing is matched.
    """

    def __init__(
        self,
        channels: int,
        levels: int = 3,
        hidden: int = 24,
        conditions: int = 0,
        max_log_gain: float = 0.0,
        factors: tuple[int, ...] = (4, 1),
        inputs: str = "energy",
        guided: bool = False,
        registered: bool = False,
    ) -> None:
        super().__init__()
        self.levels, self.max_log_gain, self.inputs, self.guided = levels, max_log_gain, inputs, guided
        self.matcher = None if registered else Matcher(channels, factors=factors)
        self.input = nn.Conv2d((4 if guided else 3) * levels + 3, hidden, 1)
        self.spatial = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.film = nn.Linear(conditions, 2 * hidden) if conditions else None
        self.output = nn.Conv2d(hidden, 2 * levels, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        source: Tensor | None,
        conditions: Tensor | None = None,
        trust: Tensor | None = None,
        seen: Observed | None = None,
    ) -> Blend:
        """Edit ``x`` (B, C, H, W) by ``source`` (the same shape, or None); ``conditions`` (B or 1, n).

        ``trust`` (B,) in each source, 0 to 1, or (B, 1, h, w) place by place: a source that is not trusted counts as
        none; None = whole. ``seen``: what has been observed of ``x``; a ``guided`` one needs it.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            own, rest = split_bands(x, self.levels) if seen is None else (seen.bands, seen.rest)
            match, carried, carried_rest = None, own, rest
            sure, flag = x.new_zeros(2, len(x), 1, *x.shape[2:])
            if source is not None:
                source = source.float()
                # The finest band repeats itself, and a blurred image lacks it: the others say what belongs where.
                if self.matcher is None:
                    match = Match(x.new_zeros(len(x), 2, *x.shape[2:]), torch.ones_like(flag))
                    carried, carried_rest = split_bands(source, self.levels)
                else:
                    match = self.matcher(x - own[0], source - split_bands(source, 1)[0][0])
                    carried, carried_rest = split_bands(warp(source, match.flow), self.levels)
                sure, flag = match.confidence, torch.ones_like(flag)
                if trust is not None:
                    share = in_places(trust, x)
                    carried, carried_rest = torch.lerp(own, carried, share), torch.lerp(rest, carried_rest, share)
                    sure, flag = sure * share, flag * share
            gaps = carried - own
            if seen is None:
                assert not self.guided
                found = list(_energies(own, carried, gaps))
            else:
                found = [seen.energy, *_energies(carried, gaps), *([seen.excess] if self.guided else [])]
            far = ((carried_rest - rest).square().mean(1, keepdim=True) + _FLOOR).log()
            gain, gate = self._gates(torch.cat(found, dim=1), far, sure, flag, conditions).chunk(2, dim=1)
            delta = torch.zeros_like(x)
            if self.max_log_gain > 0:
                delta = weighted(torch.expm1(self.max_log_gain * torch.tanh(gain)), own)
                # Bands have zero mean, but a gain that varies in space would move it again.
                delta = delta - delta.mean((2, 3), keepdim=True)
            gates = None
            if source is not None:
                gates = torch.tanh(gate)
                delta = delta + (weighted(gates, gaps) if self.matcher is not None else _mixed(own, gaps, gates))
            return Blend(delta, gates, match)

    def _gates(self, energies: Tensor, far: Tensor, sure: Tensor, flag: Tensor, conditions: Tensor | None) -> Tensor:
        """(B, 2 * levels, H, W): what gain and gate are the tanh of."""
        if self.inputs == "time":
            far, sure = torch.zeros_like(far), torch.zeros_like(sure)
        features = torch.cat([visible(energies, self.levels, self.inputs), far], dim=1)
        hidden = self.spatial(pointwise(self.input, torch.cat([features * FEATURE_SCALE, sure, flag], dim=1)))
        if self.film is not None:
            assert conditions is not None
            scale, shift = self.film(conditions)[:, :, None, None].chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        return pointwise(self.output, functional.silu(hidden))


def in_places(trust: Tensor, x: Tensor) -> Tensor:
    """``trust`` (B,) or (B, 1, h, w) for ``x`` (B, C, H, W): (B, 1, 1, 1), or (B, 1, H, W), linear between places."""
    if trust.ndim == 1 or trust.shape[2:] == x.shape[2:]:
        return trust.to(x).view(len(x), 1, *(trust.shape[2:] or (1, 1)))
    return functional.interpolate(trust.to(x), x.shape[2:], mode="bilinear")


def _mixed(own: Tensor, gaps: Tensor, gates: Tensor) -> Tensor:
    """What changes where ``gates`` (B, levels, H, W) mix bands (levels, B, C, H, W), energies kept; (B, C, H, W)."""
    share = gates.transpose(0, 1).unsqueeze(2)
    mixed = own + share * gaps
    before, after, made = (x.exp().transpose(0, 1).unsqueeze(2) for x in _energies(own, own + gaps, mixed))
    kept = torch.lerp(before, after, share.clamp(0, 1))
    return (mixed * ((kept + _FLOOR) / (made + _FLOOR)).sqrt().clamp(1 / _MOST, _MOST) - own).sum(0)


def _energies(*bands: Tensor) -> tuple[Tensor, ...]:
    """Local log energies of several at once, (B, levels, H, W) each."""
    return local_log_energy(*bands).chunk(len(bands))
