"""The adaptive enhancement module: gain and source texture in every reverse step, and once more after the decoder.

    x0' = x0 + strength * sum_b [ (exp(l_b) - 1) W_b x0 + h_b (T_b - W_b x0) ]

``W_b`` are frequency bands, ``T_b`` the source photo's, carried to where they belong. An interpretation of
LoRA-DAE's "adaptive enhancement module", which is known from an abstract only. Its parts can be had one by one:
without a source (text alone) the gain is all that acts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_dae.config import ConfigError, EnhancementConfig
from lora_dae.diffusion import Level
from lora_dae.enhancement.agreement import Agreement
from lora_dae.enhancement.bands import local_log_energy, split_bands
from lora_dae.enhancement.gates import NOISE_FEATURES, BandGain, NoiseStep, Observed, noise_step, observe
from lora_dae.enhancement.match import Match, warp
from lora_dae.enhancement.registration import Encode, Preview, RegisteredSource
from lora_dae.enhancement.texture import Blend, SourceTexture, in_places

PIXEL_GAIN = 0.405  # log(1.5)
_REFINED = 2**22  # numbers of pictures in pixels that are worked on at once: one of 1,024 pixels, 85 of 128
_LATENT_SCALES, _PIXEL_SCALES = (4, 1), (16, 4, 1)


class Edit(NamedTuple):
    """delta (B, C, H, W); log_gain, gates (B, levels, H, W) and match where that part acted."""

    delta: Tensor
    log_gain: Tensor | None
    gates: Tensor | None
    match: Match | None


class EnhancementModule(nn.Module):
    """``gain``, ``texture`` (latents of ``source_channels`` channels, 0 = without) and ``decoder`` (pixels).

    ``levels`` bands, ``hidden`` channels, gains within ``exp(+-max_log_gain)`` at strength 1; ``max_log_gain=0``
    leaves the gain out. ``gate_inputs`` as in ``gates.visible``. ``finest_log_gain``: of the decoder stage, how much
    louder the finest band of all pictures may get besides, place by place up to what the source photo has there.
    ``text_channels`` of captions' embeddings, whose first ``text_tokens`` are read: where a caption and its source
    photo disagree, the source's bands are kept out (agreement.py); 0 = always trusted. ``sourced``: it learned with
    source photos, as source texture always does, so that the finest band stays where none is shown. ``placement``: what
    its gain learned to edit. ``registered``: source photos are moved to where the garment is (registration.py), by
    small pictures that ``preview`` makes of latents. Every last layer starts at zero: a new module is the exact
    identity. Under 60 k parameters. Values that make no sense, or leave nothing, raise ConfigError.
    """

    def __init__(
        self,
        levels: int = 3,
        hidden: int = 32,
        max_log_gain: float = 0.405,
        source_channels: int = 0,
        decoder: bool = False,
        gate_inputs: str = "energy",
        finest_log_gain: float = 0.0,
        text_channels: int = 0,
        text_tokens: int = 77,
        sourced: bool = False,
        placement: str = "prediction",
        registered: bool = False,
    ) -> None:
        super().__init__()
        if not -PIXEL_GAIN <= finest_log_gain <= PIXEL_GAIN:
            raise ConfigError(f"finest_log_gain={finest_log_gain} is not within {PIXEL_GAIN} of 0.")
        if levels < 1 or hidden < 1 or not 0 <= max_log_gain < math.inf:
            raise ConfigError(
                f"enhancement.levels={levels}, hidden={hidden}, max_log_gain={max_log_gain}: "
                "all must be finite, levels and hidden positive, max_log_gain not negative."
            )
        if max_log_gain == 0 and source_channels == 0 and not decoder:
            raise ConfigError(
                "enhancement.max_log_gain=0 without source or decoder leaves no module: use enhancement=none."
            )
        self.levels, self.hidden, self.max_log_gain = levels, hidden, max_log_gain
        self.source_channels, self.gate_inputs = source_channels, gate_inputs
        self.finest_log_gain, self.sourced = finest_log_gain, sourced or source_channels > 0
        self.placement = placement
        self.gain = BandGain(levels, hidden, max_log_gain, gate_inputs) if max_log_gain > 0 else None
        self.texture = None
        if source_channels:
            # One number beside the noise features: how far the solver is of first order.
            conditions = NOISE_FEATURES + 1
            self.texture = SourceTexture(
                source_channels, levels, 24, conditions, 0.0, _LATENT_SCALES, gate_inputs, True, registered
            )
        self.preview = Preview(source_channels) if registered and source_channels else None
        self.agreement = None
        if text_channels and source_channels:
            self.agreement = Agreement(text_channels, source_channels, text_tokens)
        self.decoder = SourceTexture(3, levels, 24, 0, PIXEL_GAIN, _PIXEL_SCALES, gate_inputs) if decoder else None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def acts_on_latents(self) -> bool:
        """Whether any part works in the reverse step."""
        return self.gain is not None or self.texture is not None

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The delta to add to ``x0`` (or, with ``direction``, the gain's to the predicted noise), as ``evaluate``."""
        return self.evaluate(*inputs, **options).delta

    def evaluate(
        self,
        x0: Tensor,
        x0_cond: Tensor,
        sample: Tensor,
        alpha: Level,
        sigma: Level,
        h: Level,
        first_order: Level = 1.0,
        direction: bool = False,
        source: Tensor | None = None,
        trust: Tensor | None = None,
    ) -> Edit:
        """Arguments as ``gates.observe`` and ``gates.noise_step``.

        ``source``: latents of the source photos (B, C, H, W), scaled as ``x0``; ``trust`` in each of them, (B,), as
        ``trust`` says, or (B, 1, h, w) in its places; None = whole.
        """
        delta, log_gain, gates, match = torch.zeros_like(x0, dtype=torch.float32), None, None, None
        step = noise_step(alpha, sigma, h, first_order, x0.device)
        seen = observe(x0, x0_cond, None if self.gain is None else sample, step, self.levels)
        if self.gain is not None:
            change, log_gain = self.gain.judge(seen, step, direction)
            delta = delta + change
        if self.texture is not None and source is not None and not direction:
            blend = self._blended(x0, source, seen, step, trust)
            delta, gates, match = delta + blend.delta, blend.gates, blend.match
        return Edit(delta, log_gain, gates, match)

    def trust(self, text: Tensor | None, source: Tensor | None) -> Tensor | None:
        """Trust (B,) in the source photos' latents (B, C, h, w), by what the captions (B, L, D) say; None = whole."""
        if self.agreement is None or text is None or source is None:
            return None
        if self.device != source.device:
            self.to(source.device)
        return self.agreement(text.to(source.device), source)

    def registering(self, photos: Tensor, latents: Tensor, encode: Encode) -> RegisteredSource | None:
        """Source photos (S, 3, H, W) in [0, 1] and their latents, to be moved in each chain; None: nothing is moved."""
        if self.preview is None:
            return None
        if self.device != latents.device:
            self.to(latents.device)
        return RegisteredSource(self.preview, photos, latents, encode)

    def blend(
        self,
        x0: Tensor,
        x0_cond: Tensor,
        source: Tensor,
        alpha: Level,
        sigma: Level,
        h: Level,
        first_order: Level = 1.0,
        trust: Tensor | None = None,
    ) -> Blend:
        """The source texture's part alone; arguments as ``evaluate``."""
        step = noise_step(alpha, sigma, h, first_order, x0.device)
        return self._blended(x0, source, observe(x0, x0_cond, None, step, self.levels), step, trust)

    def _blended(self, x0: Tensor, source: Tensor, seen: Observed, step: NoiseStep, trust: Tensor | None) -> Blend:
        assert self.texture is not None
        features = step.features
        conditions = torch.cat([features, step.first_order.flatten(1).expand(len(features), -1)], dim=1)
        blend = self.texture(x0, source, conditions, trust, seen)
        return blend._replace(delta=blend.delta * step.window)

    def refine(
        self, images: Tensor, source: Tensor | None, strength: float = 1.0, trust: Tensor | None = None
    ) -> Tensor:
        """The decoder stage on decoded ``images`` (B, 3, H, W) in [0, 1]; ``source`` likewise, or None; trust (B,).

        The very same tensor comes back at strength 0 and where there is no such stage.
        """
        if self.decoder is None or strength == 0:
            return images
        if self.device != images.device:
            self.to(images.device)
        size = max(1, _REFINED // images[0].numel())
        parts = zip(*(_pieces(x, len(images), size) for x in (images, source, trust)), strict=True)
        return torch.cat([self._refine(some, shown, strength, trusted) for some, shown, trusted in parts])

    def _refine(self, images: Tensor, source: Tensor | None, strength: float, trust: Tensor | None) -> Tensor:
        assert self.decoder is not None
        x = images.float() * 2 - 1
        shown = None if source is None else _centered(source, images)
        delta, _, match = self.decoder(x, shown, trust=trust)
        # What it makes good, carrying and decoding of sources, captions alone have not lost.
        if self.finest_log_gain != 0 and (source is not None or not self.sourced):
            finest = split_bands(x + delta, 1)[0]
            log_gains = finest_log_gains(finest, shown, match, self.finest_log_gain)
            louder = torch.expm1(log_gains)[:, None] * finest[0]
            louder = louder - louder.mean((2, 3), keepdim=True)  # its zero mean, which a gain in space has moved
            delta = delta + (louder if trust is None else louder * in_places(trust, louder))
        return (images.float() + 0.5 * strength * delta).clamp(0, 1).to(images.dtype)

    @torch.no_grad()
    def lacking(self, images: Tensor, source: Tensor | None) -> Tensor:
        """How much weaker the finest band of finished ``images`` is than the source's, (B, H, W), natural log of
        amplitudes, not below 0; infinite without a source. Arguments as ``refine``."""
        assert self.decoder is not None
        found, size = [], max(1, _REFINED // images[0].numel())
        for some, photos in zip(*(_pieces(x, len(images), size) for x in (images, source)), strict=True):
            assert some is not None
            x = some.to(self.device).float() * 2 - 1
            shown = None if photos is None else _centered(photos, x)
            log_gains = finest_log_gains(split_bands(x, 1)[0], shown, self.decoder(x, shown).match, math.inf)
            found.append(log_gains.to(images.device))
        return torch.cat(found)


def finest_log_gains(finest: Tensor, source: Tensor | None, match: Match | None, most: float) -> Tensor:
    """Log gains (B, H, W) of the band ``finest`` (1, B, C, H, W): up to ``most`` where the matched ``source`` has more.

    Everywhere without one, or where the band is to be weaker.
    """
    even = finest.new_full((finest.shape[1], *finest.shape[3:]), most)
    if source is None or match is None or most < 0:
        return even
    # The source's energy is carried, not the source: that would lose some between the pixels.
    proven = warp(local_log_energy(split_bands(source, 1)[0]), match.flow)
    return (0.5 * (proven - local_log_energy(finest))).squeeze(1).clamp_min(0).minimum(even)


def _centered(photos: Tensor, like: Tensor) -> Tensor:
    """[0, 1] to [-1, 1], float32, where ``like`` is."""
    return photos.to(like.device).float() * 2 - 1


def _pieces(x: Tensor | None, count: int, size: int) -> list[Tensor | None]:
    """``x`` of ``count`` images, ``size`` at a time."""
    return [None if x is None else x[k : k + size] for k in range(0, count, size)]


def build_enhancement(cfg: EnhancementConfig, latent_channels: int, conditioning: str) -> EnhancementModule | None:
    """The module that a run trains, or None; source texture needs ``conditioning=source``."""
    if not cfg.enabled or cfg.placement == "none":
        return None
    channels = latent_channels if cfg.texture and conditioning == "source" else 0
    max_log_gain = cfg.max_log_gain if cfg.gain else 0.0
    if max_log_gain == 0 and channels == 0 and not cfg.decoder:
        raise ConfigError(
            "this enhancement brings back the source photo's texture, but conditioning=none shows none: use "
            "enhancement=gain, or conditioning=source."
        )
    return EnhancementModule(
        cfg.levels, cfg.hidden, max_log_gain, channels, cfg.decoder, cfg.gate_inputs,
        sourced=conditioning == "source", placement=cfg.placement, registered=cfg.registered,
    )  # fmt: skip
