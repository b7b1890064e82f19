"""From a photo of any size and aspect to a square of pixels that keeps the garment whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from lora_dae.data.decode import upright_rgb

# A backdrop counts as plain when its edge strips stray from their own median by less than this (of 255).
PLAIN_DEVIATION = 10.0
# Of a photo without a plain backdrop, at least this share of the long side stays: 3:4 becomes square.
KEPT_SHARE = 0.75
Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels
Photo = Image.Image | np.ndarray  # RGB, as Pillow's image or as uint8 (height, width, 3)


@dataclass(frozen=True)
class Framing:
    """How training made squares of most of its photos and their sources: what is done with a source photo later.

    ``mixed``: the share that went the way of most, in words, where many went the other way; else empty.
    """

    whole: bool = True
    background: str = "white"
    mixed: str = ""

    def fit(self, photo: Image.Image, resolution: int) -> np.ndarray:
        """Any photo as uint8 (resolution, resolution, 3)."""
        return fit_square(upright_rgb(photo, self.background), resolution, self.whole)

    def header(self) -> dict[str, str]:
        """As it is kept in a file's header."""
        return {"framing": "whole" if self.whole else "cropped", "background": self.background, "mixed": self.mixed}

    @classmethod
    def of(cls, header: Mapping[str, str]) -> Framing:
        """The reverse; of files that do not tell, the whole photo on white."""
        return cls(header.get("framing") != "cropped", header.get("background", "white"), header.get("mixed", ""))


def has_plain_backdrop(photo: Photo) -> bool:
    """Whether the two short edges that padding would extend are each of about one color."""
    pixels = np.asarray(photo)
    lines = pixels.transpose(1, 0, 2) if pixels.shape[1] < pixels.shape[0] else pixels  # across the edges in question
    thick = _thickness(len(lines))
    strips = (edge.reshape(-1, 3) for edge in (lines[:thick], lines[-thick:]))
    return all(float(np.abs(strip - median_color(strip)).mean()) < PLAIN_DEVIATION for strip in strips)


def kept_box(size: tuple[int, int], whole: bool) -> Box:
    """The centered box (left, top, right, bottom; pixels) of a photo of ``size`` = (width, height) to use.

    ``whole`` keeps everything; otherwise the long side is cropped towards a square, but never below
    ``KEPT_SHARE`` of its length.
    """
    width, height = size
    short, long = min(size), max(size)
    kept = long if whole else max(short, math.ceil(KEPT_SHARE * long))
    margin = (long - kept) / 2
    return (margin, 0, width - margin, height) if width > height else (0, margin, width, height - margin)


def fit_square(photo: Photo, resolution: int, whole: bool) -> np.ndarray:
    """A photo as uint8 (resolution, resolution, 3).

    The box of ``kept_box`` is scaled by ``resample``; what is then missing on the short side is filled, on
    either side, with the median color of that edge. Padding a plain backdrop does not show, and product
    photos keep head and hem; padding a busy one teaches the model to draw bars, so callers pass
    ``whole=has_plain_backdrop(photo)``.
    """
    scaled = resample(photo, *_target(size_of(photo), resolution, whole))
    return fill(scaled, (resolution, resolution))


def fit_mask(mask: Image.Image, photo: Image.Image, resolution: int, whole: bool) -> np.ndarray:
    """A mask of ``photo`` (any mode, bright = garment) as uint8 (resolution, resolution) of 0 and 255.

    It goes the way of its photo: stretched to the photo's size if it differs, then the same box.
    """
    mask = ImageOps.exif_transpose(mask).convert("L").resize(photo.size, Image.Resampling.NEAREST)
    scaled = resample_mask(mask, *_target(photo.size, resolution, whole))
    return paste(np.zeros((resolution, resolution), np.uint8), scaled)


def _target(size: tuple[int, int], resolution: int, whole: bool) -> tuple[Box, tuple[int, int]]:
    """The box to use, and the size (width, height) that it gets."""
    left, top, right, bottom = box = kept_box(size, whole)
    scale = resolution / max(right - left, bottom - top)
    return box, (max(round((right - left) * scale), 1), max(round((bottom - top) * scale), 1))


def size_of(photo: Photo) -> tuple[int, int]:
    """(width, height)"""
    return photo.size if isinstance(photo, Image.Image) else (photo.shape[1], photo.shape[0])


def resample(photo: Photo, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The ``box`` of a photo, to whole pixels, at ``size`` (width, height), as uint8 (height, width, 3).

    With Lanczos: torch's where it has one, which gives what Pillow's gives up to rounding in a fraction of the time.
    """
    left, top, right, bottom = whole_pixels(box)
    pixels = photo if isinstance(photo, np.ndarray) else np.array(photo)
    pixels = np.ascontiguousarray(pixels[top:bottom, left:right])
    if size == (right - left, bottom - top):
        return pixels
    import torch  # here, because listing and checking photos needs none

    if not hasattr(torch._C._nn, "_upsample_lanczos2d_aa"):
        return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    # The batch's dimension comes before the permutation: only so torch sees pixels and not planes, and keeps them.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    scaled = torch.nn.functional.interpolate(planes, size[::-1], mode="lanczos", antialias=True)
    return scaled.permute(0, 2, 3, 1)[0].contiguous().numpy()


def resample_mask(mask: Image.Image, box: Box, size: tuple[int, int]) -> np.ndarray:
    """The same part of a gray mask, as uint8 (height, width) of 0 and 255."""
    scaled = mask.resize(size, Image.Resampling.BOX, box=whole_pixels(box))
    return np.where(np.asarray(scaled) >= 128, 255, 0).astype(np.uint8)


def whole_pixels(box: Box) -> tuple[int, int, int, int]:
    """``box`` with its edges at the nearest pixel borders."""
    left, top, right, bottom = (math.floor(edge + 0.5) for edge in box)
    return left, top, right, bottom


def fill(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``pixels``, which lack one side of ``size`` (width, height) at most, in the middle of the colors of that edge."""
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    canvas = np.empty((height, width, 3), np.uint8)
    # Both so that the edges in question are the outer lines.
    wide, lines = (x.transpose(1, 0, 2) if pixels.shape[1] < width else x for x in (canvas, pixels))
    thick, start = _thickness(len(lines)), (len(wide) - len(lines)) // 2
    end = start + len(lines)
    wide[:start] = median_color(lines[:thick].reshape(-1, 3)).round()
    wide[start:end] = lines
    wide[end:] = median_color(lines[-thick:].reshape(-1, 3)).round()
    return canvas


def median_color(pixels: np.ndarray) -> np.ndarray:
    """The median of each channel of uint8 (N, 3), float32 (3,)."""
    ordered = np.sort(pixels, axis=0, kind="stable")  # of bytes that is a radix sort: faster than np.median
    return ordered[[(len(pixels) - 1) // 2, len(pixels) // 2]].mean(axis=0, dtype=np.float32)


def _thickness(side: int) -> int:
    """Of the outer strips, 2 % of the side, that tell the color beyond them."""
    return max(1, side // 50)


def paste(canvas: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """``pixels`` in the middle of ``canvas``, which is changed and returned."""
    top, left = (canvas.shape[0] - pixels.shape[0]) // 2, (canvas.shape[1] - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return canvas
