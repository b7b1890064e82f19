"""From a photo of any size and aspect to a square of pixels that keeps the garment whole."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

# A backdrop counts as plain when its edge strips stray from their own median by less than this (of 255).
PLAIN_DEVIATION = 10.0
# Of a photo without a plain backdrop, at least this share of the long side stays: 3:4 becomes square.
KEPT_SHARE = 0.75


def has_plain_backdrop(photo: Image.Image) -> bool:
    """Whether the two short edges that padding would extend are each of about one color."""
    edges = _edges(photo, photo.width < photo.height)
    return all(float(np.abs(strip - np.median(strip, axis=0)).mean()) < PLAIN_DEVIATION for strip in edges)


def kept_box(size: tuple[int, int], whole: bool) -> tuple[float, float, float, float]:
    """The centered box (left, top, right, bottom; pixels) of a photo of ``size`` = (width, height) to use.

    ``whole`` keeps everything; otherwise the long side is cropped towards a square, but never below
    ``KEPT_SHARE`` of its length.
    """
    width, height = size
    short, long = min(size), max(size)
    kept = long if whole else max(short, math.ceil(KEPT_SHARE * long))
    margin = (long - kept) / 2
    return (margin, 0, width - margin, height) if width > height else (0, margin, width, height - margin)


def fit_square(photo: Image.Image, resolution: int, whole: bool) -> np.ndarray:
    """An RGB photo as uint8 (resolution, resolution, 3).

    The box of ``kept_box`` is scaled with Lanczos; what is then missing on the short side is filled, on
    either side, with the median color of that edge. Padding a plain backdrop does not show, and product
    photos keep head and hem; padding a busy one teaches the model to draw bars, so callers pass
    ``whole=has_plain_backdrop(photo)``.
    """
    scaled = _scale(photo, resolution, whole, Image.Resampling.LANCZOS)
    if scaled.size == (resolution, resolution):
        return np.array(scaled)
    first, last = edge_colors(scaled, sideways=scaled.width < scaled.height)
    canvas = np.empty((resolution, resolution, 3), np.uint8)
    canvas[:] = last
    if scaled.width < scaled.height:
        canvas[:, : resolution // 2] = first
    else:
        canvas[: resolution // 2] = first
    return paste(canvas, np.asarray(scaled))


def fit_mask(mask: Image.Image, photo: Image.Image, resolution: int, whole: bool) -> np.ndarray:
    """A mask of ``photo`` (any mode, bright = garment) as uint8 (resolution, resolution) of 0 and 255.

    It goes the way of its photo: stretched to the photo's size if it differs, then the same box.
    """
    mask = ImageOps.exif_transpose(mask).convert("L").resize(photo.size, Image.Resampling.NEAREST)
    scaled = np.asarray(_scale(mask, resolution, whole, Image.Resampling.BOX))
    return paste(np.zeros((resolution, resolution), np.uint8), np.where(scaled >= 128, 255, 0))


def _scale(photo: Image.Image, resolution: int, whole: bool, filter: Image.Resampling) -> Image.Image:
    left, top, right, bottom = box = kept_box(photo.size, whole)
    scale = resolution / max(right - left, bottom - top)
    width, height = round((right - left) * scale), round((bottom - top) * scale)
    return photo.resize((max(width, 1), max(height, 1)), filter, box=box)


def edge_colors(photo: Image.Image, sideways: bool) -> list[np.ndarray]:
    """Median color, uint8 (3,), of the left and right (``sideways``) or upper and lower edge."""
    return [np.median(strip, axis=0).round().astype(np.uint8) for strip in _edges(photo, sideways)]


def _edges(photo: Image.Image, sideways: bool) -> list[np.ndarray]:
    """The two outer strips (2 % of that side) beyond which padding goes, each as (n, 3) float32."""
    pixels = np.asarray(photo)
    if sideways:
        pixels = pixels.transpose(1, 0, 2)  # so that the edges in question are the first and last rows
    thick = max(1, pixels.shape[0] // 50)
    return [strip.reshape(-1, 3).astype(np.float32) for strip in (pixels[:thick], pixels[-thick:])]


def paste(canvas: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """``pixels`` in the middle of ``canvas``, which is changed and returned."""
    top, left = (canvas.shape[0] - pixels.shape[0]) // 2, (canvas.shape[1] - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas
