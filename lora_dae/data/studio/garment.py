"""A garment on a body: its shape, its cloth coordinates, its folds and seams."""

from __future__ import annotations

import cv2
import numpy as np

from lora_dae.data.studio import draw
from lora_dae.data.studio.attributes import Garment
from lora_dae.data.studio.draw import Array, smooth_interp
from lora_dae.data.studio.patterns import tile
from lora_dae.data.studio.pose import ARM_RADII, CHEST_Y, SHOULDER, WAIST_Y, Body, limb

_HEM = {"t-shirt": 3.78, "shirt": 3.92, "sweater": 3.62, "jacket": 3.85}
_SKIRT_HEM = {"mini": 4.75, "knee": 5.5, "midi": 6.25}
_LOOSE = {"t-shirt": 0.45, "shirt": 0.5, "sweater": 0.6, "jacket": 0.65, "dress": 0.0}


class Tailor:
    """Draws one garment on one body; ``drape`` is the random stream of its folds."""

    def __init__(self, garment: Garment, body: Body, drape: np.random.Generator, light: tuple[float, float]):
        self.garment, self.body, self.light = garment, body, light
        self.rng = np.random.default_rng(int(drape.integers(2**31)))
        cloth, self.periods = tile(garment, 1.1 * garment.period * body.scale)
        self.tile_size = cloth.shape[0]
        self.cloth = np.pad(cloth, ((0, 1), (0, 1), (0, 0)), mode="wrap")
        self.x, self.y = body.grid()
        self.mask = np.zeros((body.n, body.n), np.float32)

    # -- cloth ---------------------------------------------------------------------------------
    def _texture(self, u: Array, v: Array) -> Array:
        """Look the cloth up at coordinates in hu, wrapping around the tile."""
        g, k = self.garment, self.tile_size / self.periods
        u, v = np.broadcast_arrays(u, v)
        tu = np.mod((u / g.period + g.phase[0]) * k, self.tile_size).astype(np.float32)
        tv = np.mod((v / g.period + g.phase[1]) * k, self.tile_size).astype(np.float32)
        return cv2.remap(self.cloth, tu, tv, cv2.INTER_LINEAR)

    def _part(
        self,
        canvas: Array,
        mask: Array,
        u: Array,
        v: Array,
        folds: Array,
        radius: float,
        shadow: float = 0.35,
    ) -> None:
        """Composite one panel: texture, bent by its folds, shaded by folds and roundness."""
        s, box = self.body.scale, draw.box_of(mask)
        gx = cv2.Sobel(folds, cv2.CV_32F, 1, 0, ksize=3)[box] * (s / 27)
        gy = cv2.Sobel(folds, cv2.CV_32F, 0, 1, ksize=3)[box] * (s / 27)
        u, v = (np.broadcast_to(x, mask.shape)[box] for x in (u, v))
        color = self._texture(u + 0.10 * gx, v + 0.10 * gy)
        lit = draw.rounded(mask, radius * s, self.light)[box]
        lit = lit * np.clip(1 - 1.5 * (gx * self.light[0] + gy * self.light[1]), 0.62, 1.3)
        draw.darken(canvas, draw.blur(mask, 0.05 * s), shadow)
        draw.over(canvas[box], np.clip(color * lit[..., None], 0, 1), mask[box])
        self.mask = np.maximum(self.mask, mask)

    def _folds(self, vertical: int, amount: float) -> Array:
        n = self.body.n
        long_ones = draw.noise(self.rng, n, 3 * vertical, max(2, vertical))
        soft = draw.noise(self.rng, n, vertical, 2 * vertical)
        return draw.blur((amount * (long_ones + 0.8 * soft)).astype(np.float32), 0.05 * self.body.scale)

    # -- trunk ---------------------------------------------------------------------------------
    def _width(self, y: Array) -> Array:
        """Half width of the garment around the trunk at height y."""
        g, body = self.garment, self.body
        w = body.half_width(y)
        loose = _LOOSE.get(g.kind, 0.0)
        chest = float(body.half_width(CHEST_Y))
        boxy = np.where(y > CHEST_Y, np.maximum(w, chest), w)
        return (1 - loose) * w + loose * boxy + g.ease * (0.35 if g.kind == "dress" else 1.0)

    def _outline(self, hem: float, flare: float = 0.0) -> Array:
        """Closed outline, hu, from the neck over the shoulders down to the hem."""
        g, body = self.garment, self.body
        ys = np.linspace(1.95, hem, 24, dtype=np.float32)
        w = self._width(ys) + flare * np.clip((ys - WAIST_Y) / (hem - WAIST_Y), 0, 1) ** 0.9
        c = body.center(ys)
        neck = 0.24 if body.build == "woman" else 0.29
        tip = SHOULDER[body.build] + 0.25 * g.ease
        if g.sleeve == "none":
            tip -= 0.24
        drop = 0.35 * body.pose.lean
        side = []
        for s in (-1, 1):
            top = [
                (s * neck, 1.25),
                (s * (neck + tip) / 2, 1.33 - 0.5 * s * drop),
                (s * tip, 1.46 - s * drop),
            ]
            pit = [(s * (tip + 0.01), 1.62 - s * drop)] if g.sleeve != "none" else [(s * (tip - 0.03), 1.72)]
            trunk = [(float(cc + s * ww), float(yy)) for cc, ww, yy in zip(c, w, ys, strict=True)]
            side.append(np.array(top + pit + trunk, np.float32))
        left, right = side
        bend = np.linspace(-1, 1, 9, dtype=np.float32)[1:-1]
        hem_line = np.stack([c[-1] + bend * w[-1], hem + 0.07 * (1 - bend**2) + (0.05 if flare else 0)], 1)
        return np.concatenate([left, hem_line, right[::-1]])

    def _neck_hole(self) -> Array:
        shape = self.garment.neckline
        neck = 0.27 if self.body.build == "woman" else 0.32
        deep = {"v-neck": 0.62, "scoop": 0.5, "collar": 0.42, "lapel": 0.3}.get(shape, 0.24)
        if shape in ("v-neck", "collar"):
            points = [(-neck, 1.1), (neck, 1.1), (neck, 1.24), (0, 1.26 + deep), (-neck, 1.24)]
            return np.array(points, np.float32)
        wide = neck + (0.1 if shape == "scoop" else 0.0)
        t = np.linspace(0, np.pi, 12, dtype=np.float32)
        bowl = np.stack([wide * np.cos(t), 1.24 + deep * np.sin(t)], 1)
        return np.concatenate([np.array([(-wide, 1.05), (wide, 1.05)], np.float32), bowl])

    def _trunk_uv(self, flare_scale: Array | float = 1.0) -> tuple[Array, Array]:
        """Cloth coordinates around the trunk: foreshortened towards the sides, level around it."""
        w = np.maximum(self._width(self.y) * 1.12, 0.2)
        across = (self.x - self.body.center(self.y)) / (w * flare_scale)
        u = 0.62 * np.arcsin(np.clip(across, -0.97, 0.97)) * 1.1 + 0.12 * self.body.pose.turn
        v = self.y + 0.06 * across**2
        return u, v

    def draw_trunk(self, canvas: Array) -> None:
        """The panel over chest and belly (for a dress: down to the hem)."""
        g, body = self.garment, self.body
        if g.kind == "skirt":
            self._draw_skirt(canvas, 2.62)
            return
        dress = g.kind == "dress"
        hem = _SKIRT_HEM[g.length] if dress else _HEM[g.kind]
        outline = self._outline(hem, {"mini": 0.26, "knee": 0.36, "midi": 0.44}[g.length] if dress else 0.0)
        mask = draw.fill(body.n, body.px(outline))
        if g.neckline not in ("turtleneck",):
            mask = mask * (1 - draw.fill(body.n, body.px(self._neck_hole())))
        if g.kind == "jacket":
            mask = self._open_front(canvas, mask, hem)
        u, v = self._trunk_uv()
        folds = self._folds(3, 0.16)
        if dress:
            below = np.clip((self.y - WAIST_Y) / (hem - WAIST_Y), 0, 1)
            spread = 1 + 0.75 * below
            u2, _ = self._trunk_uv(spread)
            u = np.where(self.y > WAIST_Y, u2 * (1 + 0.25 * below), u)
            folds = folds + self._pleats(u2, below)
        self._part(canvas, mask, u, v, folds, 0.24)
        self._details(canvas, mask, hem)

    def _pleats(self, u: Array, below: Array) -> Array:
        """Vertical waves that open towards the hem."""
        count = self.rng.uniform(1.5, 2.4)
        wave = np.sin(2 * np.pi * (count * u + self.rng.uniform() + 0.1 * self._folds(2, 1.0)))
        return (0.42 * below**0.8 * wave).astype(np.float32)

    def _draw_skirt(self, canvas: Array, top: float) -> None:
        body, g = self.body, self.garment
        hem = _SKIRT_HEM[g.length]
        ys = np.linspace(top, hem, 26, dtype=np.float32)
        t = (ys - top) / (hem - top)
        w = np.maximum(body.half_width(np.minimum(ys, 3.5)) + 0.03, 0.0)
        w = np.where(ys > 3.4, np.maximum(w, 0.66), w) + (0.16 + 1.6 * g.ease) * t * (hem - top) / 2.2
        c = body.center(ys)
        bend = np.linspace(-1, 1, 9, dtype=np.float32)[1:-1]
        hem_line = np.stack([c[-1] + bend * w[-1], hem + 0.13 * (1 - bend**2)], 1)
        outline = np.concatenate([np.stack([c - w, ys], 1), hem_line, np.stack([c + w, ys], 1)[::-1]])
        mask = draw.fill(body.n, body.px(outline))
        below = np.clip((self.y - top) / (hem - top), 0, 1)
        wy = smooth_interp(self.y, list(zip(ys[::5].tolist(), w[::5].tolist(), strict=True)))
        across = (self.x - body.center(self.y)) / (wy * 1.08)
        u = 0.66 * np.arcsin(np.clip(across, -0.97, 0.97)) * (1 + 0.45 * below)
        folds = self._folds(2, 0.1) + self._pleats(u, below)
        self._part(canvas, mask, u, self.y + 0.05 * across**2, folds, 0.26)
        band = mask * (self.y < top + 0.16)
        draw.darken(canvas, band, 0.16)

    def _open_front(self, canvas: Array, mask: Array, hem: float) -> Array:
        """Part a jacket: a plain top shows between the fronts."""
        body = self.body
        c = body.center(np.array([1.5, WAIST_Y, hem], np.float32))
        opening = np.array(
            [(-0.30, 1.12), (0.30, 1.12), (0.31, 1.4), (c[1] + 0.10, WAIST_Y), (c[2] + 0.17, hem + 0.3),
             (c[2] - 0.11, hem + 0.3), (c[1] - 0.03, WAIST_Y), (-0.31, 1.4)], np.float32,
        )  # fmt: skip
        gap = draw.fill(body.n, body.px(opening))
        inner = mask * gap * (1 - draw.fill(body.n, body.px(self._neck_hole())))
        tone = (0.93, 0.93, 0.92) if self.garment.color not in ("white", "beige") else (0.24, 0.26, 0.32)
        draw.over(canvas, draw.tint(tone, draw.rounded(mask, 0.2 * body.scale, self.light), inner), inner)
        draw.darken(canvas, inner * draw.blur(1 - gap, 0.06 * body.scale), 0.5)
        return mask * (1 - gap)

    def _details(self, canvas: Array, mask: Array, hem: float) -> None:
        """Seams, ribs, plackets, collars, lapels: what tells one kind of garment from another."""
        g, body, s = self.garment, self.body, self.body.scale
        n, c = body.n, float(body.center(2.4))
        thin = max(1.0, 0.028 * s)
        if g.kind == "dress":
            waist = mask * np.exp(-(((self.y - WAIST_Y) / 0.05) ** 2))
            draw.darken(canvas, waist, 0.3)
        if g.kind == "sweater":
            rib = 0.5 + 0.5 * np.sin(self.x * 2 * np.pi / 0.085)
            draw.darken(canvas, mask * (self.y > hem - 0.24) * rib, 0.28)
            draw.darken(canvas, mask * np.exp(-(((self.y - hem + 0.24) / 0.03) ** 2)), 0.25)
        if g.neckline in ("crew", "v-neck", "scoop"):
            hole = body.px(self._neck_hole())[2:]
            width = 0.12 if g.kind == "sweater" else 0.05
            edge = draw.stroke(n, hole, width * s * 2) * mask
            draw.darken(canvas, edge, 0.24)
        if g.neckline == "turtleneck":
            wide = 0.30 if body.build == "woman" else 0.35
            roll = draw.fill(n, body.px(draw.closed_spline(np.array(
                [(-wide, 1.0), (0, 1.05), (wide, 1.0), (wide + 0.04, 1.28), (0, 1.38),
                 (-wide - 0.04, 1.28)]))))  # fmt: skip
            self._part(canvas, roll, self.x, self.y, self._folds(2, 0.05), 0.08)
            draw.darken(canvas, roll * (0.5 + 0.5 * np.sin(self.x * 2 * np.pi / 0.085)), 0.2)
        if g.kind == "shirt":
            placket = draw.stroke(n, body.px([(c * 0.3 - 0.06, 1.6), (c - 0.06, 2.5), (c - 0.06, hem)]), thin)
            draw.darken(canvas, placket * mask, 0.42)
            for y in np.arange(1.85, hem - 0.15, 0.36):
                button = draw.fill(n, body.px(np.array((float(body.center(y)), y)) + 0.034 * _CIRCLE))
                tone = 0.96 if g.color not in ("white", "beige", "yellow") else 0.42
                draw.over(canvas, (tone, tone, tone * 0.97), button * mask)
            for side in (-1, 1):
                leaf = np.array([(side * 0.25, 1.13), (side * 0.38, 1.34), (side * 0.22, 1.60), (side * 0.01, 1.52)])
                collar = draw.fill(n, body.px(leaf))
                self._part(canvas, collar, self.x + 0.3, self.y, self._folds(2, 0.03), 0.05, 0.5)
        if g.kind == "jacket":
            for side in (-1, 1):
                leaf = np.array([(side * 0.22, 1.17), (side * 0.50, 1.52), (side * 0.44, 1.78),
                                 (c + side * 0.13 + 0.03, 2.62), (side * 0.20, 1.62)])  # fmt: skip
                lapel = draw.fill(n, body.px(leaf))
                self._part(canvas, lapel, self.x + 0.15 * side, self.y, self._folds(2, 0.03), 0.06, 0.45)
                pocket = draw.stroke(n, body.px([(c + side * 0.30, 3.02), (c + side * 0.62, 3.06)]), 2 * thin)
                draw.darken(canvas, pocket * mask, 0.45)

    # -- sleeves -------------------------------------------------------------------------------
    def draw_sleeves(self, canvas: Array) -> None:
        if self.garment.sleeve == "none":
            return
        for side in (-1, 1):
            self._sleeve(canvas, side)

    def _sleeve(self, canvas: Array, side: int) -> None:
        g, body = self.garment, self.body
        joints = body.arm(side)
        arm = ARM_RADII[body.build]
        extra = 0.05 + 0.6 * g.ease + (0.03 if g.kind in ("sweater", "jacket") else 0.0)
        short = g.sleeve == "short"
        radii = (arm[0] + 0.6 * extra, arm[1] + extra * (1.5 if short else 1.0), arm[2] + 0.75 * extra)
        mask, along, across = limb(body, joints, radii)
        upper = float(np.hypot(*(joints[1] - joints[0])))
        total = upper + float(np.hypot(*(joints[2] - joints[1])))
        end = 0.72 * upper if short else total - 0.04
        mask = mask * np.clip((end + 0.05 * across**2 - along) * body.scale, 0, 1)
        u = 0.30 * np.arcsin(np.clip(across, -0.97, 0.97)) + 0.4 * side
        wobble = float(self.rng.uniform(0, 6)) + self._folds(3, 2.0)
        elbow = np.exp(-(((along - upper) / 0.3) ** 2)) * np.sin(along * 2 * np.pi / 0.27 + 1.8 * across + wobble)
        folds = self._folds(4, 0.10) + (0.0 if short else 0.016) * elbow.astype(np.float32)
        self._part(canvas, mask, u, along, folds, 0.12, 0.42)
        if g.kind == "sweater":
            rib = 0.5 + 0.5 * np.sin(across * 9)
            draw.darken(canvas, mask * (along > end - 0.2) * rib, 0.3)
        else:
            hem = mask * np.exp(-(((along - end + 0.09) / 0.025) ** 2))
            draw.darken(canvas, hem, 0.28)


_ANGLES = np.linspace(0, 2 * np.pi, 12, endpoint=False, dtype=np.float32)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)
