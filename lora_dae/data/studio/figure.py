"""Who wears it: people (skin, face, hair, hands, plain trousers) and headless mannequins."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from lora_dae.data.studio import draw
from lora_dae.data.studio.attributes import HAIR_COLORS, SKIN_TONES, Garment, Person
from lora_dae.data.studio.draw import Array, closed_spline
from lora_dae.data.studio.pose import ARM_RADII, Body, limb

_TROUSERS = (
    (0.16, 0.17, 0.20),
    (0.22, 0.28, 0.42),
    (0.62, 0.55, 0.44),
    (0.36, 0.37, 0.38),
    (0.86, 0.85, 0.81),
)
_MANNEQUINS = ((0.88, 0.85, 0.79), (0.93, 0.93, 0.92), (0.30, 0.30, 0.31), (0.72, 0.58, 0.42))


def _legs(canvas: Array, body: Body, color: tuple[float, ...], light: tuple[float, float], loose: float = 0.0) -> None:
    for side in (-1, 1):
        rows = body.leg(side)
        left = [(x - w - loose, y) for y, x, w in rows]
        right = [(x + w + loose, y) for y, x, w in rows]
        mask = draw.fill(body.n, body.px(np.array(left + right[::-1])))
        draw.darken(canvas, draw.blur(mask, 0.06 * body.scale), 0.25)
        draw.over(canvas, draw.tint(color, draw.rounded(mask, 0.16 * body.scale, light), mask), mask)


def draw_trunk(canvas: Array, body: Body, color: tuple[float, ...], light: tuple[float, float]) -> None:
    ys = np.linspace(1.9, 3.9, 18, dtype=np.float32)
    c, w = body.center(ys), body.half_width(ys)
    neck = 0.20 if body.build == "woman" else 0.26
    tip = 0.66 if body.build == "woman" else 0.83
    left = [(-neck, 0.9), (-neck, 1.14), (-neck - 0.1, 1.30), (-tip, 1.44), (-tip - 0.02, 1.62)]
    left += list(zip((c - w).tolist(), ys.tolist(), strict=True))
    right = [(neck, 0.9), (neck, 1.14), (neck + 0.1, 1.30), (tip, 1.44), (tip + 0.02, 1.62)]
    right += list(zip((c + w).tolist(), ys.tolist(), strict=True))
    mask = draw.fill(body.n, body.px(np.array(left + right[::-1])))
    draw.over(canvas, draw.tint(color, draw.rounded(mask, 0.14 * body.scale, light), mask), mask)


def _hand(body: Body, side: int) -> Array:
    """A relaxed hand: palm, four fingers, thumb."""
    _, elbow, wrist = body.arm(side)
    d = (wrist - elbow) / np.hypot(*(wrist - elbow))
    p = np.array((-d[1], d[0]), np.float32) * side  # towards the thumb (the body side)
    r = ARM_RADII[body.build][2]
    palm = closed_spline(np.array([
        wrist - 0.9 * r * p - 0.04 * d, wrist + 0.9 * r * p - 0.04 * d, wrist + 1.15 * r * p + 0.16 * d,
        wrist + 1.0 * r * p + 0.30 * d, wrist - 1.0 * r * p + 0.30 * d, wrist - 1.15 * r * p + 0.16 * d,
    ]))  # fmt: skip
    mask = draw.fill(body.n, body.px(palm))
    s = body.scale
    for k, length in zip((-0.78, -0.27, 0.25, 0.75), (0.20, 0.25, 0.265, 0.235), strict=True):
        a = wrist + k * r * p + 0.26 * d
        b = a + length * d + 0.10 * k * r * p + 0.03 * p
        mask = np.maximum(mask, draw.stroke(body.n, body.px(np.array([a, b])), 0.058 * s))
    thumb = np.array([wrist + 0.9 * r * p + 0.08 * d, wrist + 1.6 * r * p + 0.22 * d, wrist + 1.55 * r * p + 0.34 * d])
    return np.maximum(mask, draw.stroke(body.n, body.px(thumb), 0.062 * s))


def draw_arms(canvas: Array, body: Body, color: tuple[float, ...], light: tuple[float, float]) -> None:
    """Arms and hands, over the trunk."""
    for side in (-1, 1):
        mask, _, _ = limb(body, body.arm(side), ARM_RADII[body.build])
        hand = _hand(body, side)
        both = np.maximum(mask, hand)
        draw.darken(canvas, draw.blur(both, 0.05 * body.scale), 0.28)
        shaded = draw.rounded(mask, 0.09 * body.scale, light) * (1 - 0.10 * hand)
        draw.over(canvas, draw.tint(color, shaded, both), both)
        edge = np.clip(draw.blur(hand, 0.02 * body.scale) * (1 - hand) * 2, 0, 1)
        draw.darken(canvas, edge * (1 - mask), 0.25)


def draw_under(canvas: Array, body: Body, garment: Garment, seed: int, skin: tuple, light: tuple) -> None:
    """Legs and trunk; plain trousers under a top, a plain top over a skirt."""
    rng = np.random.default_rng(seed)
    draw_trunk(canvas, body, skin, light)
    if garment.kind in ("dress", "skirt"):
        _legs(canvas, body, skin, light)
    else:
        _legs(canvas, body, _TROUSERS[int(rng.integers(len(_TROUSERS)))], light, 0.05)


def draw_plain_top(canvas: Array, body: Body, garment: Garment, seed: int, light: tuple[float, float]) -> None:
    """The fitted plain top that goes with a skirt."""
    rng = np.random.default_rng(seed)
    pale = garment.color not in ("white", "beige", "yellow")
    tone = (0.94, 0.93, 0.91) if pale and rng.uniform() < 0.75 else (0.17, 0.17, 0.19)
    if garment.color == "black":
        tone = (0.94, 0.93, 0.91)
    ys = np.linspace(1.9, 2.95, 12, dtype=np.float32)
    c, w = body.center(ys), body.half_width(ys) + 0.015
    rows = list(zip(c.tolist(), w.tolist(), ys.tolist(), strict=True))
    left = [(-0.34, 1.33), (-0.50, 1.40), (-0.50, 1.70)] + [(cc - ww, y) for cc, ww, y in rows]
    right = [(0.34, 1.33), (0.50, 1.40), (0.50, 1.70)] + [(cc + ww, y) for cc, ww, y in rows]
    t = np.linspace(np.pi, 0, 9, dtype=np.float32)[1:-1]
    neck = np.stack([0.34 * np.cos(t), 1.33 + 0.30 * np.sin(t)], 1)
    outline = np.concatenate([np.array(left), np.array(right[::-1]), neck[::-1]])
    mask = draw.fill(body.n, body.px(outline))
    folds = draw.noise(rng, body.n, 6, 6) * 0.03
    lit = draw.rounded(mask, 0.18 * body.scale, light) + folds
    draw.over(canvas, draw.tint(tone, lit, mask), mask)


def skin_of(person: Person) -> tuple[float, ...]:
    return tuple(c / 255 for c in SKIN_TONES[person.skin])


def mannequin_color(seed: int) -> tuple[float, ...]:
    return _MANNEQUINS[int(np.random.default_rng(seed).integers(len(_MANNEQUINS)))]


def draw_stand(canvas: Array, body: Body) -> None:
    """The pole below a mannequin."""
    c = float(body.center(3.8))
    pole = draw.fill(body.n, body.px(np.array([(c - 0.05, 3.6), (c + 0.05, 3.6), (c + 0.05, 9), (c - 0.05, 9)])))
    x, _ = body.grid()
    metal = 0.62 + 0.3 * np.exp(-(((x - c + 0.015) / 0.018) ** 2))
    draw.over(canvas, draw.tint((1.0, 1.0, 1.0), np.broadcast_to(metal, pole.shape), pole), pole)


def draw_neck_cap(canvas: Array, body: Body, color: tuple[float, ...]) -> None:
    """The flat end of a headless neck."""
    r = 0.205 if body.build == "woman" else 0.265
    t = np.linspace(0, 2 * np.pi, 20, dtype=np.float32)
    cap = draw.fill(body.n, body.px(np.stack([r * np.cos(t), 0.92 + 0.07 * np.sin(t)], 1)))
    draw.over(canvas, np.clip(np.array(color) * 0.72, 0, 1), cap)


class Head:
    """A head with hair, in a frame tilted about the base of the neck."""

    def __init__(self, body: Body, person: Person, light: tuple[float, float]):
        self.body, self.person, self.light = body, person, light
        self.skin = np.array(skin_of(person))
        self.hair = np.array(HAIR_COLORS[person.hair_color]) / 255
        self.rng = np.random.default_rng(person.seed)
        self.wide = 0.355 if person.gender == "woman" else 0.385

    def _px(self, points: ArrayLike) -> Array:
        p = np.asarray(points, np.float32) - np.array((0.0, 1.15), np.float32)
        c, s = np.cos(self.body.pose.tilt), np.sin(self.body.pose.tilt)
        turned = np.stack([c * p[..., 0] - s * p[..., 1], s * p[..., 0] + c * p[..., 1]], -1)
        return self.body.px(turned + np.array((0.0, 1.15), np.float32))

    def _mask(self, points: ArrayLike) -> Array:
        return draw.fill(self.body.n, self._px(closed_spline(np.array(points, np.float32))))

    def _paint_hair(self, canvas: Array, mask: Array, shade: float = 1.0) -> None:
        n, s = self.body.n, self.body.scale
        rng = np.random.default_rng(self.person.seed)
        curly = self.person.hair_style == "curly"
        strands = draw.noise(rng, n, 60, 60) if curly else draw.noise(rng, n, 70, 9)
        lit = draw.rounded(mask, 0.13 * s, self.light) + (0.14 if curly else 0.10) * strands
        lit = shade * lit + 0.05 * np.clip(strands, 0, 2) / max(float(self.hair.mean()), 0.15)
        draw.over(canvas, draw.tint(self.hair, lit, mask), mask)

    def draw_back(self, canvas: Array) -> None:
        """Hair behind the head and shoulders."""
        style, w = self.person.hair_style, self.wide
        if style == "long":
            self._paint_hair(canvas, self._mask([
                (0, -0.06), (w + 0.06, 0.18), (w + 0.10, 0.7), (w + 0.16, 1.3), (w + 0.02, 1.75), (0, 1.7),
                (-w - 0.02, 1.75), (-w - 0.16, 1.3), (-w - 0.10, 0.7), (-w - 0.06, 0.18)]), 0.72)  # fmt: skip
        elif style == "bob":
            self._paint_hair(canvas, self._mask([
                (0, -0.07), (w + 0.07, 0.16), (w + 0.13, 0.6), (w + 0.10, 1.02), (0, 1.0), (-w - 0.10, 1.02),
                (-w - 0.13, 0.6), (-w - 0.07, 0.16)]), 0.72)  # fmt: skip
        elif style == "bun":
            self._paint_hair(canvas, self._mask([(0, -0.32), (0.2, -0.14), (0.15, 0.1), (-0.15, 0.1), (-0.2, -0.14)]))
        elif style == "curly":
            big = 0.16 if self.person.gender == "woman" else 0.07
            t = np.linspace(0, 2 * np.pi, 22, endpoint=False)
            r = 1 + 0.05 * self.rng.normal(size=22)
            low = 0.82 if self.person.gender == "woman" else 0.55
            blob = [((w + big) * rr * np.cos(a), 0.36 + (low - 0.36 if np.sin(a) > 0 else 0.42 + big) * rr * np.sin(a))
                    for a, rr in zip(t, r, strict=True)]  # fmt: skip
            self._paint_hair(canvas, self._mask(blob), 0.85)

    def draw_front(self, canvas: Array) -> None:
        """Face, then the hair that frames it."""
        s, w, n = self.body.scale, self.wide, self.body.n
        man = self.person.gender == "man"
        jaw = 0.27 if man else 0.225
        face = self._mask([
            (0, 0.03), (w * 0.72, 0.13), (w, 0.42), (w * 0.93, 0.66), (jaw, 0.90), (0.09, 1.0), (-0.09, 1.0),
            (-jaw, 0.90), (-w * 0.93, 0.66), (-w, 0.42), (-w * 0.72, 0.13)])  # fmt: skip
        below = np.clip(draw.blur(np.roll(face, round(0.10 * s), 0), 0.05 * s), 0, 1) * (1 - face)
        neck = draw.fill(n, self._px([(-0.2, 0.9), (0.2, 0.9), (0.24, 1.2), (-0.24, 1.2)]))
        draw.darken(canvas, below * neck, 0.38)
        if self.person.hair_style not in ("long", "bob"):
            for side in (-1, 1):
                ear = self._mask([(side * (w - 0.01), 0.42), (side * (w + 0.055), 0.46), (side * (w + 0.03), 0.62),
                                  (side * (w - 0.02), 0.64)])  # fmt: skip
                draw.over(canvas, self.skin * 0.9, ear)
        lit = draw.rounded(face, 0.15 * s, self.light)
        draw.over(canvas, draw.tint(self.skin, lit, face), face)
        self._features(canvas, man)
        self._front_hair(canvas, man)

    def _features(self, canvas: Array, man: bool) -> None:
        n, s, turn = self.body.n, self.body.scale, 0.075 * self.body.pose.turn
        dark = np.clip(self.hair * 0.6 + 0.02, 0, 0.42)
        cheek = draw.blur(
            draw.fill(n, *[self._px(np.array((turn + x, 0.68)) + 0.07 * _DISC) for x in (-0.2, 0.2)]),
            0.05 * s,
        )
        draw.over(canvas, self.skin * np.array((0.98, 0.78, 0.76)), 0.45 * cheek)
        for side in (-1, 1):
            x = turn + side * 0.155 * (1 - 0.15 * side * turn / 0.075)
            socket = draw.blur(draw.fill(n, self._px(np.array((x, 0.50)) + np.array((0.10, 0.06)) * _DISC)), 0.03 * s)
            draw.darken(canvas, socket, 0.10)
            eye = draw.fill(n, self._px(np.array((x, 0.515)) + np.array((0.082, 0.040)) * _DISC))
            draw.over(canvas, (0.95, 0.94, 0.93), eye)
            iris = draw.fill(n, self._px(np.array((x + 0.3 * turn, 0.512)) + 0.040 * _DISC)) * eye
            draw.over(canvas, (0.17, 0.12, 0.09), iris)
            lid = draw.stroke(
                n,
                self._px([(x - 0.09, 0.505), (x - 0.03, 0.473), (x + 0.04, 0.473), (x + 0.09, 0.505)]),
                0.030 * s,
            )
            draw.over(canvas, dark * 0.6, 0.85 * lid)
            brow = draw.stroke(
                n, self._px([(x - 0.10, 0.425), (x, 0.395), (x + 0.10, 0.42)]), (0.045 if man else 0.032) * s
            )
            draw.over(canvas, dark, 0.8 * brow)
        nose = draw.stroke(
            n,
            self._px([(turn * 1.3 + 0.02, 0.50), (turn * 1.5 + 0.045, 0.66), (turn * 1.4, 0.70)]),
            0.022 * s,
        )
        draw.darken(canvas, draw.blur(nose, 0.018 * s), 0.30)
        nostrils = draw.fill(n, *[self._px(np.array((turn * 1.4 + x, 0.705)) + 0.017 * _DISC) for x in (-0.045, 0.045)])
        draw.darken(canvas, nostrils, 0.5)
        lip = self.skin * np.array((0.84, 0.58, 0.56)) if man else np.array((0.72, 0.30, 0.32)) * 0.6 + self.skin * 0.3
        mouth = self._mask([(turn - 0.125, 0.815), (turn - 0.04, 0.785), (turn, 0.795), (turn + 0.04, 0.785),
                            (turn + 0.125, 0.815), (turn + 0.05, 0.865), (turn - 0.05, 0.865)])  # fmt: skip
        draw.over(canvas, np.clip(lip, 0, 1), 0.9 * mouth)
        line = draw.stroke(n, self._px([(turn - 0.12, 0.816), (turn, 0.822), (turn + 0.12, 0.816)]), 0.02 * s)
        draw.darken(canvas, line, 0.45)
        if man and self.rng.uniform() < 0.4:
            beard = self._mask(
                [
                    (-0.27, 0.72),
                    (-0.1, 0.77),
                    (0.1, 0.77),
                    (0.27, 0.72),
                    (0.22, 0.93),
                    (0, 1.02),
                    (-0.22, 0.93),
                ]
            )
            draw.over(canvas, self.hair * 0.8, 0.5 * beard * (1 - mouth))

    def _front_hair(self, canvas: Array, man: bool) -> None:
        style, w = self.person.hair_style, self.wide
        part = 0.12 if self.rng.uniform() < 0.5 else -0.12
        if style == "buzzed":
            cap = self._mask([(-w - 0.005, 0.40), (-w - 0.01, 0.2), (-0.2, -0.02), (0.2, -0.02), (w + 0.01, 0.2),
                              (w + 0.005, 0.40), (w - 0.06, 0.24), (0.15, 0.15), (-0.15, 0.15),
                              (-w + 0.06, 0.24)])  # fmt: skip
            draw.over(canvas, self.hair * 0.9, 0.75 * cap)
            return
        top = -0.10 if style in ("short", "curly") else -0.06
        side_low = {"short": 0.46, "curly": 0.48, "bun": 0.42, "long": 1.0, "bob": 0.9}[style]
        inner = 0.075 if style in ("long", "bob") else 0.035
        outline = [(-w - 0.05, side_low), (-w - 0.06, 0.25), (-0.24, top + 0.03), (0.0, top - 0.02), (0.24, top + 0.03),
               (w + 0.06, 0.25), (w + 0.05, side_low), (w - inner, side_low - 0.05), (w - 0.03, 0.38),
               (part + 0.2, 0.21), (part, 0.13), (part - 0.2, 0.21), (-w + 0.03, 0.38),
               (-w + inner, side_low - 0.05)]  # fmt: skip
        self._paint_hair(canvas, self._mask(outline))
        if style == "long":
            for side in (-1, 1):
                lock = self._mask([(side * (w + 0.02), 0.7), (side * (w + 0.10), 1.1), (side * (w + 0.09), 1.72),
                                   (side * (w - 0.04), 1.86), (side * (w - 0.12), 1.5), (side *
                                   (w - 0.08), 1.0)])  # fmt: skip
                draw.darken(canvas, draw.blur(lock, 0.04 * self.body.scale), 0.3)
                self._paint_hair(canvas, lock)


_T = np.linspace(0, 2 * np.pi, 14, endpoint=False, dtype=np.float32)
_DISC = np.stack([np.cos(_T), np.sin(_T)], 1)
