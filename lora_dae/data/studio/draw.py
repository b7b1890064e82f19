"""Drawing primitives on float32 canvases: anti-aliased masks, soft light, noise, composition."""

from __future__ import annotations

import cv2
import numpy as np

Array = np.ndarray
_SHIFT = 4  # fractional bits of cv2's polygon coordinates


def smooth_interp(y: Array | float, knots: list[tuple[float, float]]) -> Array:
    """Interpolate knots (position, value) with zero-slope easing between them; clamped outside."""
    ys = np.array([k[0] for k in knots], np.float32)
    vs = np.array([k[1] for k in knots], np.float32)
    y = np.clip(np.asarray(y, np.float32), ys[0], ys[-1])
    i = np.clip(np.searchsorted(ys, y, side="right") - 1, 0, len(ys) - 2)
    # Catmull-Rom tangents: smooth outlines without overshoot at this spacing.
    tangents = np.gradient(vs, ys)
    tangents[0] = tangents[-1] = 0.0
    h = ys[i + 1] - ys[i]
    t = (y - ys[i]) / h
    t2, t3 = t * t, t * t * t
    return (
        (2 * t3 - 3 * t2 + 1) * vs[i]
        + (t3 - 2 * t2 + t) * h * tangents[i]
        + (-2 * t3 + 3 * t2) * vs[i + 1]
        + (t3 - t2) * h * tangents[i + 1]
    )


def closed_spline(points: Array, per_segment: int = 8) -> Array:
    """Closed Catmull-Rom curve through (n, 2) points; returns (n * per_segment, 2)."""
    p = np.asarray(points, np.float32)
    a, b, c, d = np.roll(p, 1, 0), p, np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = (np.arange(per_segment, dtype=np.float32) / per_segment)[:, None, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.transpose(1, 0, 2).reshape(-1, 2)


def fill(n: int, *polygons: Array) -> Array:
    """Anti-aliased mask, float32 (n, n) in [0, 1], of polygons given in pixels."""
    mask = np.zeros((n, n), np.uint8)
    for points in polygons:
        fixed = np.round(np.asarray(points) * (1 << _SHIFT)).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, _SHIFT)
    return mask.astype(np.float32) / 255


def stroke(n: int, points: Array, thickness: float, closed: bool = False) -> Array:
    """Anti-aliased line mask through points in pixels."""
    mask = np.zeros((n, n), np.uint8)
    fixed = np.round(np.asarray(points) * (1 << _SHIFT)).astype(np.int32)
    cv2.polylines(mask, [fixed], closed, 255, max(1, round(thickness)), cv2.LINE_AA, _SHIFT)
    return mask.astype(np.float32) / 255


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur; wide ones run at half resolution, where they look the same and cost a quarter."""
    if sigma > 3:
        h, w = image.shape[:2]
        half = cv2.resize(image, (w // 2, h // 2), interpolation=cv2.INTER_AREA)
        return cv2.resize(blur(half, sigma / 2), (w, h), interpolation=cv2.INTER_LINEAR)
    return cv2.GaussianBlur(image, (0, 0), sigma)


def noise(rng: np.random.Generator, n: int, cells_x: int, cells_y: int) -> Array:
    """Smooth noise of about unit variance with the given number of cells across the canvas."""
    grid = rng.normal(0, 1, (cells_y + 3, cells_x + 3)).astype(np.float32)
    return cv2.resize(grid, (n, n), interpolation=cv2.INTER_CUBIC)


def rounded(mask: Array, radius: float, light: tuple[float, float], strength: float = 1.0) -> Array:
    """Shading of a mask as if it were inflated: multiplier around 1, lit from ``light`` (x, y)."""
    height = blur(mask, radius)
    gx = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3) * (radius / 8)
    gy = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3) * (radius / 8)
    toward = gx * light[0] + gy * light[1]
    rim = np.clip((height - 0.5) * 2, 0, 1)
    return 1 - strength * (0.55 * toward + 0.22 * (1 - rim) ** 2)


def box_of(mask: Array) -> tuple[slice, slice]:
    """The rectangle that holds all of the mask: most parts cover little of the picture."""
    x, y, w, h = cv2.boundingRect((mask > 1e-3).astype(np.uint8))
    return slice(y, y + h), slice(x, x + w)


def tint(color: Array | tuple[float, ...], light: Array, mask: Array) -> Array:
    """A flat color times a light field, RGB in [0, 1], computed only where the mask is set."""
    box = box_of(mask)
    image = np.zeros((*mask.shape, 3), np.float32)
    image[box] = np.clip(np.asarray(color, np.float32) * light[box][..., None], 0, 1)
    return image


def over(canvas: Array, color: Array | tuple[float, ...], mask: Array) -> None:
    """Composite ``color`` (RGB or image) over the canvas in place."""
    box = box_of(mask)
    m, c = mask[box][..., None], np.asarray(color, np.float32)
    region = canvas[box]
    region += m * ((c[box] if c.ndim == 3 else c) - region)


def changed(before: Array, after: Array, threshold: float) -> Array:
    """Mask, float32 0 or 1, of the pixels whose gray value changed by more than ``threshold``."""
    difference = cv2.cvtColor(cv2.absdiff(before, after), cv2.COLOR_RGB2GRAY)
    return (difference > threshold).astype(np.float32)


def darken(canvas: Array, mask: Array, amount: float) -> None:
    """Multiply the canvas by 1 - amount where the mask is set, in place."""
    box = box_of(mask)
    canvas[box] *= (1 - amount * mask[box])[..., None]
