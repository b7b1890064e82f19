"""Cloth: seamless tiles of the ten patterns.

A tile covers a whole number of periods and is drawn at several times the size at which it is shown,
then averaged down, so that fine patterns keep their contrast instead of aliasing.
"""

from __future__ import annotations

import cv2
import numpy as np

from lora_dae.data.studio.attributes import COLORS, Garment

_DETAIL = 48  # pixels per period while drawing


def colors_of(garment: Garment) -> tuple[np.ndarray, np.ndarray]:
    """Main and second color, float32 RGB in [0, 1]; the main one covers most of the cloth."""
    main = np.clip(np.array(COLORS[garment.color], np.float32) + np.array(garment.shade, np.float32), 8, 248)
    second = {
        "white": (78, 88, 112),
        "beige": (116, 86, 58),
        "yellow": (250, 246, 226),
        "black": (186, 184, 180),
        "gray": (236, 236, 236),
    }.get(garment.color)
    light = np.array(second if second else 0.22 * main + 0.78 * np.array((252, 248, 240)), np.float32)
    return main / 255, light / 255


def _mix(main: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    a = amount[..., None].astype(np.float32)
    return main * (1 - a) + second * a


def _step(x: np.ndarray, edge: float) -> np.ndarray:
    return (x < edge).astype(np.float32)


def tile(garment: Garment, pixels_per_period: float) -> tuple[np.ndarray, int]:
    """Draw the garment's cloth.

    Returns an RGB tile, float32 (n, n, 3) in [0, 1], that repeats seamlessly, and the number of pattern
    periods along its side; it has about ``pixels_per_period`` pixels per period.
    """
    rng = np.random.default_rng(garment.seed)
    main, second = colors_of(garment)
    periods = {"floral": 2, "plaid": 1, "knit": 4, "denim": 8}.get(garment.pattern, 2)
    n = _DETAIL * periods
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / _DETAIL
    fx, fy = x % 1, y % 1
    p = garment.pattern
    if p == "solid":
        cloth = _mix(main, second, np.zeros((n, n)))
    elif p == "stripes":
        cloth = _mix(main, second, _step(fy, 0.42))
    elif p == "gingham":
        cloth = _mix(main, second, 0.5 * (_step(fx, 0.5) + _step(fy, 0.5)))
    elif p == "plaid":
        cloth = _plaid(main, second, fx, fy, rng)
    elif p == "dots":
        d = np.minimum(np.hypot(fx - 0.25, fy - 0.25), np.hypot(fx - 0.75, fy - 0.75))
        cloth = _mix(main, second, _step(d, 0.2))
    elif p == "herringbone":
        zigzag = fy * 2 + np.where(fx < 0.5, fx, 1 - fx) * 4
        cloth = _mix(main, second, _step(zigzag % 1, 0.42))
    elif p == "houndstooth":
        cloth = _houndstooth(main, second, fx, fy)
    elif p == "knit":
        cloth = _knit(main, fx, fy)
    elif p == "floral":
        cloth = _floral(main, second, n, rng)
    else:
        cloth = _denim(main, x, y, n, rng)
    size = max(8, round(pixels_per_period * periods))
    interpolation = cv2.INTER_AREA if size <= n else cv2.INTER_LINEAR
    return cv2.resize(cloth.astype(np.float32), (size, size), interpolation=interpolation), periods


def _plaid(main, second, fx, fy, rng: np.random.Generator) -> np.ndarray:
    """Tartan: the same bands along both directions, crossed half and half."""
    dark = main * 0.42
    accent = second if rng.uniform() < 0.6 else np.array((0.86, 0.2, 0.16), np.float32) * 0.7 + second * 0.3
    width = float(rng.uniform(0.26, 0.34))

    def bands(t: np.ndarray) -> np.ndarray:
        c = np.broadcast_to(main, (*t.shape, 3)).copy()
        c[t < width] = dark
        c[(t > width + 0.30) & (t < width + 0.39)] = accent
        c[(t > width * 0.42) & (t < width * 0.58)] = second
        return c

    return 0.5 * (bands(fx) + bands(fy))


def _houndstooth(main, second, fx, fy) -> np.ndarray:
    """The real weave: four dark and four light threads both ways in a 2/2 twill."""
    warp, weft = np.floor(fx * 8).astype(int), np.floor(fy * 8).astype(int)
    warp_on_top = (warp + weft) % 4 < 2
    dark = np.where(warp_on_top, warp < 4, weft < 4)
    return _mix(main, second, (~dark).astype(np.float32) * 0.95)


def _knit(main, fx, fy) -> np.ndarray:
    """Aran cables: two ropes that cross over each other, on a ground of ribs in the shade."""
    swing, width = 0.15 * np.cos(2 * np.pi * fy), 0.17
    ropes = [np.clip(1 - ((fx - 0.36 - way * swing) / width) ** 2, 0, 1) for way in (1, -1)]
    first_above = np.sin(2 * np.pi * fy) > 0
    above, below = np.where(first_above, ropes[0], ropes[1]), np.where(first_above, ropes[1], ropes[0])
    cable = np.where(above > 0, above**0.6, 0.75 * below**0.6)
    rib = 0.5 * np.clip(1 - ((fx - 0.86) / 0.10) ** 2, 0, 1)
    light = 0.50 + 0.58 * np.maximum(cable, rib)
    bright = float(main.mean())
    return np.clip(main * light[..., None] + (0.12 if bright < 0.25 else 0.0) * light[..., None], 0, 1)


def _floral(main, second, n: int, rng: np.random.Generator) -> np.ndarray:
    cloth = np.broadcast_to(main, (n, n, 3)).astype(np.float32).copy()
    flower = second if rng.uniform() < 0.5 else 0.45 * second + 0.55 * np.array((0.96, 0.56, 0.62), np.float32)
    leaf = np.array((0.30, 0.52, 0.30), np.float32)
    if np.abs(leaf - main).sum() < 0.5:
        leaf = np.array((0.80, 0.86, 0.56), np.float32)
    heart = np.array((0.98, 0.82, 0.28), np.float32)
    cell = n // 4
    spots = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    for i, j in spots:
        cx = (i + 0.5 + rng.uniform(-0.2, 0.2)) * cell
        cy = (j + 0.5 + rng.uniform(-0.2, 0.2)) * cell
        radius = cell * rng.uniform(0.5, 0.62)
        turn = rng.uniform(0, 2 * np.pi)
        for shift_x in (-n, 0, n):
            for shift_y in (-n, 0, n):
                _flower(cloth, cx + shift_x, cy + shift_y, radius, turn, flower, leaf, heart)
    return cloth


def _flower(cloth, cx, cy, radius, turn, flower, leaf, heart) -> None:
    if not (-2 * radius < cx < cloth.shape[1] + 2 * radius and -2 * radius < cy < cloth.shape[0] + 2 * radius):
        return
    for k in (0, 2):
        a = turn + 0.6 + k
        end = (int(cx + 1.5 * radius * np.cos(a)), int(cy + 1.5 * radius * np.sin(a)))
        cv2.line(cloth, (int(cx), int(cy)), end, leaf.tolist(), max(2, int(radius * 0.32)))
    for k in range(5):
        a = turn + k * 2 * np.pi / 5
        center = (int(cx + 0.55 * radius * np.cos(a)), int(cy + 0.55 * radius * np.sin(a)))
        cv2.circle(cloth, center, int(radius * 0.44), flower.tolist(), -1)
    cv2.circle(cloth, (int(cx), int(cy)), int(radius * 0.3), heart.tolist(), -1)


def _denim(main, x, y, n: int, rng: np.random.Generator) -> np.ndarray:
    """A 3/1 twill: steep diagonal lines in undyed weft, mottled by wear."""
    diagonal = ((x + y) % 1 < 0.38).astype(np.float32)
    wear = np.tile(rng.normal(0, 1, (n // 16, n // 16)).astype(np.float32), (3, 3))  # so that it wraps around
    mottle = cv2.resize(wear, (3 * n, 3 * n), interpolation=cv2.INTER_CUBIC)[n : 2 * n, n : 2 * n]
    pale = 0.45 * main + 0.55 if main.mean() < 0.8 else main * 0.62
    return np.clip(_mix(main * 0.92, pale, 0.62 * diagonal) + 0.045 * mottle[..., None], 0, 1)
