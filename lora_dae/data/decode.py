"""From the bytes of any image file to upright sRGB pixels."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps

from lora_dae.config import ConfigError

# Above it Pillow itself speaks of a decompression bomb: a few kilobytes that unfold to gigabytes.
MAX_PIXELS = 178_956_970
ORIENTATION = ExifTags.Base.Orientation
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
Image.init()
# Pillow opens more, and for some of that (EPS) it starts other programs.
FORMATS = tuple(f for f in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF") if f in Image.OPEN)
_SRGB = ImageCms.createProfile("sRGB")


class BadImageError(ValueError):
    """A file that gives no pixels; the message is the reason, in words that follow the file's name."""


def open_image(data: bytes) -> Image.Image:
    """The image of a file's bytes, header read, pixels not. Raises BadImageError."""
    if not data:
        raise BadImageError("is empty")
    try:
        photo = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError("is a decompression bomb (far more pixels than a photo has)") from error
    except Exception as error:  # as in _reading
        raise BadImageError("cannot be read as an image") from error
    if photo.width * photo.height > MAX_PIXELS:
        raise BadImageError(f"has {photo.width}x{photo.height} pixels, above the limit of {MAX_PIXELS}")
    return photo


def decode(data: bytes, draft: int | None = None, background: str = "white") -> Image.Image:
    """A file's bytes as an upright RGB image, large JPEGs at a fraction of their size but above ``draft`` pixels.

    Raises BadImageError for what is no image, cut short, or has float pixels.
    """
    photo = open_image(data)
    with _reading():
        if draft is not None:
            photo.draft("RGB", (draft, draft))
        return upright_rgb(photo, background)


@contextmanager
def _reading() -> Iterator[None]:
    """Pillow's readers raise whatever a broken file leads them to; all of it says the same."""
    try:
        yield
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError(f"cannot be read as an image ({str(error) or type(error).__name__})") from error


@_reading()
def remarks(photo: Image.Image) -> list[str]:
    """What a person should know about a readable file: that it moves, has an alpha channel, and so on."""
    found = []
    if getattr(photo, "is_animated", False) and photo.format != "MPO":  # MPO: a phone's JPEG with a preview
        found.append(f"animated, {getattr(photo, 'n_frames', '?')} frames: the first is used")
    if photo.mode in SIXTEEN_BIT:
        found.append("16 bits a channel, scaled to 8")
    if photo.mode == "CMYK":
        found.append("CMYK, converted to sRGB")
    if _foreign_profile(photo):
        found.append("color profile converted to sRGB")
    return found


@_reading()
def upright_size(photo: Image.Image) -> tuple[int, int]:
    """(width, height) after the turn that EXIF asks for; of a photo that ``decode`` can read."""
    if photo.format == "TIFF":
        photo.load()  # Pillow turns these itself, and their size says so from the start
    quarter_turn = photo.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (photo.height, photo.width) if quarter_turn else photo.size


def upright_rgb(photo: Image.Image, background: str = "white") -> Image.Image:
    """The photo as 8-bit sRGB: turned as EXIF says, its color profile applied, transparent parts on ``background``."""
    if getattr(photo, "is_animated", False):
        photo.seek(0)
    profile = photo.info.get("icc_profile") if _foreign_profile(photo) else None
    photo.load()
    if photo.getexif().get(ORIENTATION, 1) != 1:
        photo = ImageOps.exif_transpose(photo)
    if photo.mode in SIXTEEN_BIT:
        # Pillow's own conversion cuts off everything above 255.
        values = np.asarray(photo).astype(np.int64)
        photo = Image.fromarray((np.clip(values, 0, 65535) / 257).round().astype(np.uint8))
    if photo.mode == "F":
        raise BadImageError("has floating-point pixels, whose white is not known")
    if photo.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in photo.info:
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, background), photo)
    if profile:
        return _to_srgb(photo, profile)
    return photo if photo.mode == "RGB" else photo.convert("RGB")  # no copy of what is right already


def check_background(color: str) -> None:
    """Raises ConfigError unless Pillow knows the color."""
    try:
        ImageColor.getrgb(color)
    except ValueError as error:
        raise ConfigError(f"data.background={color} is no color: give a name such as white, or #f0f0f0.") from error


def _foreign_profile(photo: Image.Image) -> bool:
    """Whether there is a color profile of another space than sRGB."""
    profile = photo.info.get("icc_profile")
    if not profile:
        return False
    try:
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return False  # a broken profile says nothing
    return "srgb" not in name.lower()


def _to_srgb(photo: Image.Image, profile: bytes) -> Image.Image:
    if photo.mode not in ("RGB", "CMYK", "L"):
        photo = photo.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(photo, source, _SRGB, outputMode="RGB")
    except ImageCms.PyCMSError:  # the profile is of another kind of image than the one it is in
        return photo.convert("RGB")
    assert converted is not None
    return converted
