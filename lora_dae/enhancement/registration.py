"""A source photo that is not in place is moved to where the picture's garment is, once in a chain.

Where a photo shows its garment elsewhere, no place of it is found by its own features: what is drawn from a caption
has none of the photo's texture yet. From afar both show the same garment, so the photo is moved and scaled as a whole
until its colors cover the picture's (Dice's coefficient of soft matches, robust as in Geman and McClure 1985), in the
first step where gates may open. It is moved in pixels and encoded again: latents that are moved by fractions of a
place lose the texture that they are moved for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_dae.config import ConfigError
from lora_dae.enhancement.match import Match, warp

SIDE = 64  # of what is registered, at most
_COARSE = 16  # of what every shift is tried on
_SHIFTS = (5, 3)  # of those, to each side: x, y
_SCALES = (-0.24, -0.16, -0.08, 0.0, 0.08, 0.16, 0.24)  # natural log
# Moves are numbers (x, y, log scale, half the log of width over height); x and y in image sides. How far they are
# expected to go, what they are changed by in turn (halved every second round), rounds; on half the side, on all of it.
_EXPECTED = (0.06, 0.04, 0.12, 0.05)
_FAR_COSTS = 0.005
_SEARCHES = (((0.03, 0.02, 0.06, 0.02), 4), ((0.01, 0.01, 0.02, 0.01), 6))
_ALIKE = 0.05  # squared color distance, in shares of how far the source's subject is from its background
_NEAR = 0.15  # the same, from afar, where a place counts as showing what the source shows
_SUBJECT = 0.25  # salience of a picture's subject
_NOT_OTHERS, _SURE = 0.1, 0.5  # how well places agree that may be trusted; that surely show the same
# Log odds that a photo shows what the caption says: what a subject that agrees all over adds to the caption's own, and
# what is taken off. Nearly all right photos of validation pairs keep their trust.
_FITTING, _ASKED = 10.0, 11.4
_EPS = 1e-8

Encode = Callable[[Tensor], Tensor]  # photos (B, 3, H, W) in [0, 1] -> latents (B, C, h, w)


class Preview(nn.Module):
    """Latents as small pictures, two pixels to a place, by one linear map of 3 x 3 places.

    ``weight`` (9 * channels + 1, 12), a buffer: fitted, not trained.
    """

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(9 * channels + 1, 12))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, 2h, 2w), about in [-1, 1]."""
        maps = (_columns(latents.float()) @ self.weight.to(latents.device)).transpose(1, 2)
        return functional.pixel_shuffle(maps.unflatten(2, latents.shape[2:]), 2)

    @torch.no_grad()
    def fit(self, examples: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Least squares on ``examples`` of latents (B, C, h, w) and their photos (B, 3, H, W) in [0, 1]."""
        size = len(self.weight)
        squares, products = torch.zeros(size, size).double(), torch.zeros(size, 12).double()
        for latents, photos in examples:
            sides = [2 * side for side in latents.shape[2:]]
            wanted = functional.pixel_unshuffle(functional.interpolate(photos.float() * 2 - 1, sides, mode="area"), 2)
            x = _columns(latents.float()).flatten(0, 1).cpu().double()
            squares, products = (
                squares + x.T @ x,
                products + x.T @ wanted.flatten(2).transpose(1, 2).flatten(0, 1).to(x),
            )
        ridge = 1e-4 * squares.diagonal().mean() * torch.eye(size).double()
        self.weight.copy_(torch.linalg.solve(squares + ridge, products).float())


class RegisteredSource:
    """Source photos (S, 3, H, W) in [0, 1] and their latents, moved to where each chain's garments are.

    One photo per image, or per prompt. ``encode`` gives latents of photos, scaled as the UNet sees them. ``moved``: the
    photos as the present chain's first step has moved them.
    """

    def __init__(self, preview: Preview, photos: Tensor, latents: Tensor, encode: Encode) -> None:
        self.preview, self.photos, self.latents, self.encode = preview, photos, latents, encode
        self.moved, self.motion = photos, latents.new_zeros(len(photos), 4)
        self.shown, self.fit = latents.new_zeros(len(photos), 1, *latents.shape[2:]), latents.new_zeros(len(photos))
        self._carried, self._level = latents, -1.0

    @torch.no_grad()
    def at(self, x0: Tensor, noise: float) -> Tensor:
        """Latents for the predictions ``x0`` (B, C, h, w) at ``noise`` = sigma / alpha, which falls in a chain."""
        begins = noise > self._level or len(self._carried) != len(x0)
        self._level = noise
        if begins:
            photos, latents = for_images(self.photos, x0), for_images(self.latents, x0)
            assert photos is not None and latents is not None
            with torch.autocast(x0.device.type, enabled=False):
                target, given = self.preview(x0), self.preview(latents)
                self.motion = register(target, given)
                agreed, self.fit = agreeing(target, given, self.motion)
                self.shown = shown_where(target, agreed)[0]
                self.moved = (move(photos, self.motion) * 255).round() / 255  # as photos are
                self._carried = self.encode(self.moved).float().to(x0.device)
        return self._carried

    def trusted(self, trust: Tensor | None) -> Tensor:
        """Where the moved photos are to be trusted, (B, 1, h, w); ``trust`` (B,) in each of them, None = whole.

        ``trust`` is one witness, how well a photo fits the picture another: their log odds add up.
        """
        if trust is None:
            return self.shown
        each = max(self.shown, trust, key=len)  # a source of several images that has not been placed is one still
        shown, fit, share = (for_images(x, each) for x in (self.shown, self.fit, trust))
        assert shown is not None and fit is not None and share is not None
        odds = torch.logit(share, eps=1e-5) + _FITTING * fit - _ASKED
        return shown * odds.sigmoid().view(-1, 1, 1, 1)

    def match(self, x0: Tensor) -> Match:
        """The present motion in the places of ``x0``, and where the photos from afar show what it shows."""
        latents = for_images(self.latents, x0)
        assert latents is not None
        sure = agreeing(self.preview(x0), self.preview(latents), self.motion)[0]
        return Match(flow(self.motion, *x0.shape[2:]), functional.avg_pool2d(sure, 2))


def for_images(source: Tensor | None, x0: Tensor) -> Tensor | None:
    """One source (or trust in it) per image; several images of a prompt share its source."""
    if source is None:
        return None
    source = source.to(x0.device)
    if len(source) == len(x0):
        return source
    if len(x0) % len(source):
        raise ConfigError(f"source has {len(source)} photos for {len(x0)} images: give one per prompt, or one.")
    return source.repeat_interleave(len(x0) // len(source), dim=0)


@torch.no_grad()
def register(target: Tensor, source: Tensor) -> Tensor:
    """How ``source`` has to be moved to cover ``target``: (B, 4) for ``flow``; small pictures (B, 3, h, w).

    Every shift and scale is tried coarsely, then each number is changed as long as that helps. A source without a
    subject stays where it is.
    """
    target, source = (_blur(_at_most(x, SIDE)) for x in (target, source))
    salient, spread = _salience(source)
    tolerance = _ALIKE * spread
    covered = _seen_in(target, source, salient, tolerance)
    small = [_at_most(x, _COARSE) for x in (target, source, salient, covered)]
    best = _try_all(small[0], torch.cat(small[1:3], 1), small[3], tolerance)
    both = torch.cat([source, salient], 1)
    for divided, (steps, rounds) in zip((2, 1), _SEARCHES, strict=True):
        t, b, c = (functional.avg_pool2d(x, divided) for x in (target, both, covered))
        best = _improved(best, t, b, c, tolerance, steps, rounds)
    return _motion(best)


def flow(motion: Tensor, height: int, width: int) -> Tensor:
    """(B, 2, height, width): (x, y) displacement into the source of a ``motion`` (B, 4).

    That is x and y in shares of width and height, and the logs of both scales about the middle.
    """
    rows = torch.arange(height, device=motion.device, dtype=motion.dtype)[:, None] - (height - 1) / 2
    columns = torch.arange(width, device=motion.device, dtype=motion.dtype)[None, :] - (width - 1) / 2
    x, y, wide, high = (motion[:, k, None, None] for k in range(4))
    across = columns * torch.expm1(wide) + x * width
    down = rows * torch.expm1(high) + y * height
    return torch.stack([across.expand(-1, height, -1), down.expand(-1, -1, width)], 1)


def move(photos: Tensor, motion: Tensor) -> Tensor:
    """Photos (B, 3, H, W) in [0, 1] read where ``motion`` says, cubic between pixels."""
    return warp(photos, flow(motion.to(photos), *photos.shape[2:]), "bicubic").clamp(0, 1)


def shown_where(target: Tensor, agreed: Tensor) -> tuple[Tensor, Tensor]:
    """Where a moved source may be trusted, and where it surely shows the same: (B, 1, h / 2, w / 2), 0 to 1.

    By how well it is ``agreed`` (B, 1, h, w) with ``target``; borders are soft. It may be trusted where the target has
    a subject too (not beside it, where a mannequin in another pose has its arms), and colors are no farther off
    than the source's subject is from its background, about.
    """
    subject = _salience(_blur(target))[0] > _SUBJECT
    return _softened(subject & (agreed > _NOT_OTHERS)), _softened(agreed > _SURE)


def agreeing(target: Tensor, source: Tensor, motion: Tensor) -> tuple[Tensor, Tensor]:
    """Where the moved ``source`` shows its subject, and ``target`` the same colors from afar: (B, 1, h, w), 0 to 1.

    And the share of the subject of which that holds, (B,).
    """
    full, (target, source) = target.shape[2:], (_at_most(x, SIDE) for x in (target, source))
    salient, spread = _salience(_blur(source))
    moved = warp(torch.cat([source, salient], 1), flow(motion, *source.shape[2:]))
    gap = (_blur(_blur(target, 5), 5) - _blur(_blur(moved[:, :-1], 5), 5)).square().sum(1, keepdim=True)
    agreed = _NEAR * spread / (gap + _NEAR * spread) * moved[:, -1:]
    fit = agreed.mean((1, 2, 3)) / (moved[:, -1:].mean((1, 2, 3)) + _EPS)
    return agreed if agreed.shape[2:] == full else functional.interpolate(agreed, full, mode="bilinear"), fit


def _softened(places: Tensor) -> Tensor:
    """(B, 1, h, w), bool, on half the sides."""
    return functional.avg_pool2d(functional.avg_pool2d(places.float(), 2), 3, 1, 1)


def _columns(latents: Tensor) -> Tensor:
    """(B, h * w, 9 C + 1): each place's 3 x 3 neighbors, and 1."""
    x = functional.unfold(latents, 3, padding=1).transpose(1, 2)
    return torch.cat([x, torch.ones_like(x[..., :1])], 2)


def _salience(source: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, h, w) in [0, 1): unlike the frame's median color; (B, 1, 1, 1): the subject's squared distance from it."""
    border = [source[:, :, :2].flatten(2), source[:, :, 2:-2, :2].flatten(2), source[:, :, 2:-2, -2:].flatten(2)]
    background = torch.cat(border, 2).median(2).values[:, :, None, None]
    away = (source - background).square().sum(1, keepdim=True)
    # Its mean where it counts by itself: a small subject's as well as a large one's.
    spread = (away.square().sum((1, 2, 3), keepdim=True) / (away.sum((1, 2, 3), keepdim=True) + _EPS)) + _EPS
    return away / (away + 0.15 * spread), spread


def _seen_in(target: Tensor, source: Tensor, salient: Tensor, tolerance: Tensor) -> Tensor:
    """(B, 1, h, w): how much a place of ``target`` looks like any salient one of ``source``."""
    small = [_at_most(x, SIDE // 2) for x in (target, source, salient)]
    t, s = (x.flatten(2).transpose(1, 2) for x in small[:2])
    away = torch.cdist(t, s).square() / tolerance[:, :, 0] + 4 * (1 - small[2].flatten(2))
    found = (-away.amin(2)).exp().view(len(t), 1, *small[0].shape[2:])
    return functional.interpolate(found, target.shape[2:], mode="bilinear", align_corners=False)


def _try_all(target: Tensor, both: Tensor, covered: Tensor, tolerance: Tensor) -> Tensor:
    height, width = target.shape[2:]
    right, down = _SHIFTS
    lowest, best = torch.full_like(target[:, 0, 0, 0], torch.inf), target.new_zeros(len(target), 4)
    for scale in _SCALES:
        scaled = warp(both, flow(target.new_tensor([[0, 0, scale, scale]]).expand(len(both), 4), height, width))
        scaled = functional.pad(scaled, (right, right, down, down), mode="replicate")
        for y in range(-down, down + 1):
            for x in range(-right, right + 1):
                moved = scaled[:, :, down + y : down + y + height, right + x : right + x + width]
                tried = target.new_tensor([x / width, y / height, scale, 0]).expand_as(best)
                lowest, best = _better(lowest, best, _cost(target, moved, covered, tolerance, tried), tried)
    return best


def _improved(
    best: Tensor, target: Tensor, both: Tensor, covered: Tensor, tolerance: Tensor, steps: Iterable[float], rounds: int
) -> Tensor:
    def cost(tried: Tensor) -> Tensor:
        return _cost(target, warp(both, flow(_motion(tried), *target.shape[2:])), covered, tolerance, tried)

    step, lowest = target.new_tensor(list(steps)), cost(best)
    still = torch.zeros_like(best)
    lowest, best = _better(lowest, best, cost(still), still)
    for turn in range(rounds):
        for change in (step * sign for step in torch.diag(step) for sign in (1, -1)):
            lowest, best = _better(lowest, best, cost(best + change), best + change)
        if turn % 2:
            step = step / 2
    return best


def _cost(target: Tensor, moved: Tensor, covered: Tensor, tolerance: Tensor, tried: Tensor) -> Tensor:
    """1 - Dice's coefficient of the source's subject and what looks like it, and what it costs to go far, (B,)."""
    gap = (target - moved[:, :-1]).square().sum(1, keepdim=True)
    both = tolerance / (gap + tolerance) * moved[:, -1:] * covered
    sums = [x.sum((1, 2, 3)) for x in (both, covered, moved[:, -1:])]
    far = (tried / tried.new_tensor(_EXPECTED)).square().sum(1)
    return 1 - 2 * sums[0] / (sums[1] + sums[2] + _EPS) + _FAR_COSTS * far


def _better(lowest: Tensor, best: Tensor, cost: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
    lower = cost < lowest
    return torch.where(lower, cost, lowest), torch.where(lower[:, None], tried, best)


def _motion(tried: Tensor) -> Tensor:
    """Mean scale and aspect as the two scales."""
    x, y, scale, aspect = tried.unbind(1)
    return torch.stack([x, y, scale + aspect, scale - aspect], 1)


def _at_most(x: Tensor, side: int) -> Tensor:
    factor = -(-max(x.shape[2:]) // side)
    return x if factor == 1 else functional.avg_pool2d(x, factor, ceil_mode=True)


def _blur(x: Tensor, size: int = 3) -> Tensor:
    return functional.avg_pool2d(functional.pad(x, (size // 2,) * 4, mode="replicate"), size, 1)
