"""Aspect-ratio buckets: photos keep their shape, and a batch still is one tensor.

A bucket is a size (width, height) whose sides are multiples of what VAE and UNet take. A photo goes to the
bucket that it fits with at most ``MAX_CROP`` cut off, of the area nearest to resolution squared; what is
missing then is filled with the color of that edge.
"""

from __future__ import annotations

import math
import re

import numpy as np
from PIL import Image, ImageOps

from lora_dae.config import ConfigError
from lora_dae.data.square import Box, Photo, fill, paste, resample, resample_mask, size_of

MAX_CROP = 0.05
AREA_RANGE = (0.7, 1.4)  # of resolution squared
SIDE_RANGE = (0.5, 2.0)  # of the resolution
Size = tuple[int, int]  # width, height


def default_step(resolution: int) -> int:
    """64 pixels from 512 up, as SD 1.x and SDXL take; an eighth of smaller resolutions."""
    return 64 if resolution >= 512 else max(resolution // 8, 1)


def parse_buckets(names: list[str], resolution: int, step: int | None = None) -> list[Size]:
    """``[]`` (square), ``[auto]``, or sizes like ``512x704`` (width x height). Raises ConfigError."""
    step = step or default_step(resolution)
    if not names:
        return []
    if names == ["auto"]:
        return _all_sizes(resolution, step)
    sizes = []
    for name in names:
        match = re.fullmatch(r"(\d+)x(\d+)", name)
        if match is None:
            raise ConfigError(f"data.buckets={name} is no size: give auto, or width x height such as 512x704.")
        width, height = int(match[1]), int(match[2])
        if not width or not height or width % step or height % step:
            raise ConfigError(f"data.buckets={name} is not a multiple of {step}: change it, or set data.bucket_step.")
        sizes.append((width, height))
    return sizes


def choose_bucket(size: Size, buckets: list[Size], resolution: int) -> Size:
    """The bucket of a photo of ``size``: the nearest in area of those that cut little, else the one that cuts least."""
    fitting = [b for b in buckets if cut_share(size, b) <= MAX_CROP]
    if not fitting:
        return min(buckets, key=lambda b: (cut_share(size, b), b))
    return min(fitting, key=lambda b: (abs(math.log(b[0] * b[1] / resolution**2)), cut_share(size, b), b))


def choose_buckets(sizes: np.ndarray, buckets: list[Size], resolution: int) -> np.ndarray:
    """``choose_bucket`` of many: sizes (N, 2) as (width, height) to int (N,), numbers in ``buckets``."""
    wide, tall = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    chosen = np.full(len(sizes), -1)
    best_far, best_cut = np.full(len(sizes), np.inf), np.full(len(sizes), np.inf)
    for number in sorted(range(len(buckets)), key=lambda k: buckets[k]):  # of equal ones the smallest
        width, height = buckets[number]
        cut = 1 - np.minimum(wide / width, tall / height) / np.maximum(wide / width, tall / height)
        # What cuts little counts by its area first; nothing else is as near as that.
        far = np.where(cut <= MAX_CROP, abs(math.log(width * height / resolution**2)), np.finfo(np.float64).max)
        better = (far < best_far) | ((far == best_far) & (cut < best_cut))
        chosen[better], best_far[better], best_cut[better] = number, far[better], cut[better]
    return chosen


def cut_share(size: Size, bucket: Size) -> float:
    """The share of a photo that covering the bucket would cut off."""
    wide, tall = size[0] / bucket[0], size[1] / bucket[1]
    return 1 - min(wide, tall) / max(wide, tall)


def crop_box(size: Size, bucket: Size) -> Box:
    """The centered box (left, top, right, bottom) that is kept: as much as the bucket takes, never below 95 %."""
    width, height = size
    scale = min(width / bucket[0], height / bucket[1])
    kept_width = max(min(bucket[0] * scale, width), (1 - MAX_CROP) * width)
    kept_height = max(min(bucket[1] * scale, height), (1 - MAX_CROP) * height)
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, left + kept_width, top + kept_height


def origin_of(size: Size, bucket: Size) -> tuple[int, int, int, int]:
    """``Pair.origin`` of a photo of ``size`` (width, height) in its bucket; the crop is centered, also if mirrored."""
    left, top, right, bottom = crop_box(size, bucket)
    scale = min(bucket[0] / (right - left), bucket[1] / (bottom - top))
    return size[1], size[0], round(top * scale), round(left * scale)


def fit_bucket(photo: Photo, bucket: Size) -> np.ndarray:
    """An RGB photo as uint8 (height, width, 3) of the bucket."""
    return fill(resample(photo, *_target(size_of(photo), bucket)), bucket)


def fit_bucket_mask(mask: Image.Image, photo: Image.Image, bucket: Size) -> np.ndarray:
    """A mask of ``photo`` (bright = garment) as uint8 (height, width) of 0 and 255, cropped like its photo."""
    mask = ImageOps.exif_transpose(mask).convert("L").resize(photo.size, Image.Resampling.NEAREST)
    scaled = resample_mask(mask, *_target(photo.size, bucket))
    return paste(np.zeros((bucket[1], bucket[0]), np.uint8), scaled)


def _target(size: Size, bucket: Size) -> tuple[Box, Size]:
    """The box to use, and the size that it gets."""
    left, top, right, bottom = box = crop_box(size, bucket)
    scale = min(bucket[0] / (right - left), bucket[1] / (bottom - top))
    width, height = round((right - left) * scale), round((bottom - top) * scale)
    return box, (min(max(width, 1), bucket[0]), min(max(height, 1), bucket[1]))


def _all_sizes(resolution: int, step: int) -> list[Size]:
    low, high = (share * resolution for share in SIDE_RANGE)
    sides = [side for side in range(step, int(high) + 1, step) if side >= low]
    area = resolution**2
    sizes = [(w, h) for w in sides for h in sides if AREA_RANGE[0] <= w * h / area <= AREA_RANGE[1]]
    if not sizes:
        raise ConfigError(f"data.bucket_step={step} leaves no bucket at data.resolution={resolution}: lower it.")
    return sizes
