"""Source texture: bands of the source photo, carried to where they belong, let in by a gate.

    delta = sum_b [ (exp(l_b) - 1) W_b x + h_b (W_b (source o flow) - W_b x) ]

A gain can only make louder what is there. The source photo proves what should be there: where its carried bands
agree with the image, the gate ``h_b`` opens and replaces the image's own; where they do not (skin, background, a
source of another garment) it stays shut. One class for predicted clean latents in every reverse step and, with
three channels, for the decoded image. Relatives train a decoder: the skip connections of LaDI-VTON's EMASC
(2305.13501) and the asymmetric VQGAN (2306.04632); here a few thousand numbers decide place by place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_dae.enhancement.bands import local_log_energy, split_bands
from lora_dae.enhancement.gates import pointwise, visible, weighted
from lora_dae.enhancement.match import Match, Matcher, warp

_SCALE = 0.25  # log energies span about [-9, 4]
_FLOOR = 1e-4


class Blend(NamedTuple):
    """What ``SourceTexture`` did: delta (B, C, H, W), gates (B, levels, H, W), the match (None without source)."""

    delta: Tensor
    gates: Tensor | None
    match: Match | None


class SourceTexture(nn.Module):
    """Gates per band and place, from agreement with the matched source and from ``conditions`` numbers per image.

    ``channels`` of the images or latents, ``levels`` bands, ``factors``: scales of the match, coarse first. The last
    layer starts at zero: a new module changes nothing. ``max_log_gain`` > 0 adds a gain per band, which works
    without a source too. ``inputs`` as in ``gates.visible``; ``time`` hides how sure the match is, too.
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
    ) -> None:
        super().__init__()
        self.levels, self.max_log_gain, self.inputs = levels, max_log_gain, inputs
        self.matcher = Matcher(channels, factors=factors)
        self.input = nn.Conv2d(3 * levels + 3, hidden, 1)
        self.spatial = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.film = nn.Linear(conditions, 2 * hidden) if conditions else None
        self.output = nn.Conv2d(hidden, 2 * levels, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)  # type: ignore[arg-type]

    def forward(
        self, x: Tensor, source: Tensor | None, conditions: Tensor | None = None, trust: Tensor | None = None
    ) -> Blend:
        """Edit ``x`` (B, C, H, W) by ``source`` (the same shape, or None); ``conditions`` (B or 1, n).

        ``trust`` (B,) in each source, 0 to 1: what gates are multiplied by; None = whole.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            own, rest = split_bands(x, self.levels)
            match, carried, carried_rest = None, own, rest
            if source is not None:
                source = source.float()
                # The finest band repeats itself, and a blurred image lacks it: the others say what belongs where.
                match = self.matcher(x - own[0], source - split_bands(source, 1)[0][0])
                carried, carried_rest = split_bands(warp(source, match.flow), self.levels)
            gaps = carried - own
            gain, gate = self._gates(own, carried, gaps, carried_rest - rest, match, conditions).chunk(2, dim=1)
            delta = torch.zeros_like(x)
            if self.max_log_gain > 0:
                delta = weighted(torch.expm1(self.max_log_gain * torch.tanh(gain)), own)
                # Bands have zero mean, but a gain that varies in space would move it again.
                delta = delta - delta.mean((2, 3), keepdim=True)
            gates = None
            if source is not None:
                gates = torch.tanh(gate)
                if trust is not None:
                    gates = gates * trust.view(-1, 1, 1, 1)
                delta = delta + weighted(gates, gaps)
            return Blend(delta, gates, match)

    def _gates(
        self,
        own: Tensor,
        carried: Tensor,
        gaps: Tensor,
        rest_gap: Tensor,
        match: Match | None,
        conditions: Tensor | None,
    ) -> Tensor:
        """(B, 2 * levels, H, W): what gain and gate are the tanh of."""
        b, _, height, width = rest_gap.shape
        sure = rest_gap.new_zeros(b, 1, height, width) if match is None else match.confidence
        far = (rest_gap.square().mean(1, keepdim=True) + _FLOOR).log()
        energies = torch.cat(local_log_energy(own, carried, gaps).chunk(3), dim=1)
        if self.inputs == "time":
            far, sure = torch.zeros_like(far), torch.zeros_like(sure)
        features = torch.cat([visible(energies, self.levels, self.inputs), far], dim=1)
        flag = torch.full_like(sure, float(match is not None))
        hidden = self.spatial(pointwise(self.input, torch.cat([features * _SCALE, sure, flag], dim=1)))
        if self.film is not None:
            assert conditions is not None
            scale, shift = self.film(conditions)[:, :, None, None].chunk(2, dim=1)
            hidden = hidden * (1 + scale) + shift
        return pointwise(self.output, functional.silu(hidden))
