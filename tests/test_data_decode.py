"""Every kind of image file becomes upright 8-bit sRGB, or a reason why it does not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_dae.config import ConfigError
from lora_dae.data.catalog import Catalog, Facts, difference_hash, examine
from lora_dae.data.decode import BadImageError, check_background, decode, open_image, remarks
from lora_dae.data.entry import FileBlob, RowBlob, pixels_as_file
from lora_dae.data.square import fit_square

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_large_jpegs_read_at_a_fraction_look_the_same() -> None:
    """Against the whole file: what is read is at least twice what is kept of it, so that Lanczos has what it needs."""
    y, x = np.mgrid[0:1200, 0:900]
    scene = np.stack([127 + 60 * np.sin(x / 19 + k) + 60 * np.sin(y / 13 + x / 31) for k in range(3)], axis=-1)
    data = encoded(Image.fromarray(scene.clip(0, 255).astype(np.uint8)), "JPEG", quality=95)
    whole, fraction = decode(data), decode(data, draft=2 * 256)
    assert whole.size == (900, 1200) and fraction.size == (900, 1200)  # half would be 450, below 512
    for side, size in ((224, (450, 600)), (112, (225, 300)), (512, (900, 1200))):
        fraction = decode(data, draft=2 * side)
        assert fraction.size == size
        error = fit_square(whole, side, whole=True).astype(float) - fit_square(fraction, side, whole=True)
        assert 10 * np.log10(255**2 / np.square(error).mean()) > 40


def test_exif_turns_the_photo() -> None:
    """A TIFF, which Pillow turns by itself, once and not twice."""
    for format, turn, undone in (
        ("PNG", 3, Image.Transpose.ROTATE_180),
        ("PNG", 6, Image.Transpose.ROTATE_270),
        ("TIFF", 6, Image.Transpose.ROTATE_270),
    ):
        exif = Image.Exif()
        exif[0x0112] = turn
        data = encoded(noise(), format, exif=exif)
        got = decode(data)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(noise().transpose(undone)))
        facts = examine(RowBlob("x", "1", lambda data=data: data))
        assert (facts.width, facts.height) == got.size


def test_transparent_parts_lie_on_the_background() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 255, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255])
    for data in (encoded(clear), encoded(palette, transparency=0), encoded(clear.convert("LA"))):
        assert decode(data).getpixel((0, 0)) == WHITE
        assert decode(data, background="#ff0000").getpixel((0, 0)) == RED
    with pytest.raises(ConfigError, match="data.background=pinkish"):
        check_background("pinkish")


def test_sixteen_bits_keep_their_brightness() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    got = np.asarray(decode(encoded(Image.fromarray(ramp))))
    np.testing.assert_array_equal(got[..., 0].ravel(), np.arange(256))  # 65535 / 255 = 257 exactly
    assert "16 bits" in remarks(open_image(encoded(Image.fromarray(ramp))))[0]


def test_gray_palette_and_cmyk_become_rgb() -> None:
    flat = Image.new("RGB", (8, 8), (200, 200, 200))
    for mode, tolerance in (("L", 0), ("P", 4), ("1", 255), ("CMYK", 1)):
        format = "TIFF" if mode == "CMYK" else "PNG"
        got = decode(encoded(flat.convert(mode), format))
        assert got.mode == "RGB" and abs(got.getpixel((3, 3))[0] - 200) <= tolerance


def test_color_profiles_are_converted_and_srgb_is_left_alone() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(np.asarray(decode(encoded(noise(), icc_profile=srgb))), np.asarray(noise()))
    # Lab is a profile that certainly gives other numbers than sRGB; stored in an RGB file it does not fit
    # and is ignored. XYZ with gamma 1 would need a built profile: patch sRGB's name and curves instead.
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(np.asarray(decode(encoded(noise(), icc_profile=lab))), np.asarray(noise()))
    got = decode(encoded(noise(), icc_profile=linear_profile()))
    # IEC 61966-2-1: linear light 0.5 is 0.7354 in sRGB.
    half = Image.new("RGB", (2, 2), (128, 128, 128))
    value = decode(encoded(half, icc_profile=linear_profile())).getpixel((0, 0))[0]
    assert abs(value - 255 * (1.055 * (128 / 255) ** (1 / 2.4) - 0.055)) <= 1.5
    assert np.abs(np.asarray(got).astype(int) - np.asarray(noise())).max() > 20
    assert "color profile converted" in remarks(open_image(encoded(noise(), icc_profile=linear_profile())))[0]


def linear_profile() -> bytes:
    """sRGB's primaries with a straight tone curve, as a version 2 matrix profile (ICC.1:2001-04)."""

    def s15(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + s15(*values)

    name = b"linear"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + b"\0" * 78,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4360, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        **{curve: b"curv\0\0\0\0\0\0\0\0" for curve in (b"rTRC", b"gTRC", b"bTRC")},
        b"cprt": b"text\0\0\0\0none\0",
    }
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + s15(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def test_of_moving_pictures_the_first_is_used_and_said() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 255, 0), (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data).getpixel((0, 0)) == RED
    assert remarks(open_image(data)) == ["animated, 3 frames: the first is used"]


def test_files_without_pixels_say_why() -> None:
    reasons = {
        b"": "is empty",
        b"<html>404</html>": "cannot be read as an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n": "cannot be read as an image",
        encoded(noise(200, 200))[:9000]: "cannot be read as an image (",
        encoded(noise(200, 200), "JPEG")[:4000]: "cannot be read as an image (",
        encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"): "has floating-point pixels",
        bomb(): "decompression bomb",
    }
    for data, reason in reasons.items():
        with pytest.raises(BadImageError) as caught:
            decode(data)
        assert reason in str(caught.value)
        assert examine(RowBlob("x", "1", lambda data=data: data)).reason == str(caught.value)


def test_however_a_file_is_broken_it_is_a_picture_or_a_reason() -> None:
    """Bytes changed and cut at random: nothing else than BadImageError ever comes out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [noise(), noise().transpose(Image.Transpose.ROTATE_180)]
    whole = [
        encoded(noise(), "JPEG", exif=exif, icc_profile=linear_profile()),
        encoded(noise(), "PNG", exif=exif, icc_profile=linear_profile()),
        encoded(noise(), "TIFF", compression="tiff_lzw"),
        encoded(noise(), "WEBP", exif=exif),
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        encoded(noise().convert("CMYK"), "JPEG"),
        encoded(noise(), "BMP"),
    ]
    rng = np.random.default_rng(0)
    broken = 0
    for data in whole:
        assert decode(data).mode == "RGB"
        for _ in range(60):
            wrong = bytearray(data)
            head = 200 if rng.random() < 0.7 else len(data)  # where headers, EXIF and profiles are
            for at in rng.integers(0, min(head, len(data)), 4):
                wrong[at] = rng.integers(0, 256)
            end = rng.integers(40, len(data) + 1) if rng.random() < 0.3 else len(data)
            facts = examine(RowBlob("x", "1", lambda wrong=wrong, end=end: bytes(wrong[:end])))
            assert facts.reason or (facts.width > 0 and facts.hash)
            broken += bool(facts.reason)
    assert 100 < broken < 420


def bomb() -> bytes:
    """A PNG of a hundred bytes that says it is 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_raw_pixels_go_the_way_of_files() -> None:
    np.testing.assert_array_equal(np.asarray(decode(pixels_as_file(np.asarray(noise())))), np.asarray(noise()))


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    read: list[str] = []

    def counting(blob: Any) -> Any:
        read.append(blob.name)
        return examine(blob)

    for name in "ab":
        noise().save(tmp_path / f"{name}.png")
    blobs = [FileBlob(tmp_path / f"{name}.png") for name in "ab"]
    first = Catalog(tmp_path / "cache", counting).facts(blobs)
    assert Catalog(tmp_path / "cache", counting).facts(blobs) == first and len(read) == 2
    Image.new("RGB", (5, 7)).save(tmp_path / "b.png")
    changed = Catalog(tmp_path / "cache", counting).facts(blobs)
    assert read[2:] == [str(tmp_path / "b.png")] and changed[0] == first[0]
    assert (changed[1].width, changed[1].height) == (5, 7) and changed[1].digest != first[1].digest


def test_a_file_that_could_not_be_read_is_asked_for_again(tmp_path: Path) -> None:
    """A network drive that failed for a moment does not make a photo bad for good."""

    def fails() -> bytes:
        raise OSError(5, "Input/output error")

    blobs = [RowBlob("photo", "1", fails)]
    assert Catalog(tmp_path).facts(blobs)[0].reason == "cannot be read (Input/output error)"
    blobs = [RowBlob("photo", "1", lambda: encoded(noise()))]
    assert (Catalog(tmp_path).facts(blobs)[0].width, Catalog(tmp_path).facts(blobs)[0].reason) == (24, "")


def test_a_file_that_an_older_pillow_could_not_read_is_looked_at_again(tmp_path: Path) -> None:
    blobs = [RowBlob("photo", "1", lambda: encoded(noise()))]
    older = Catalog(tmp_path, lambda blob: Facts("digest", reason="cannot be read as an image"))
    assert older.facts(blobs)[0].reason
    assert (Catalog(tmp_path).facts(blobs)[0].width, Catalog(tmp_path).facts(blobs)[0].reason) == (24, "")


def test_difference_hash_is_near_for_resized_photos_and_far_for_others() -> None:
    y, x = np.mgrid[0:120, 0:120]
    scene = np.stack([127 + 120 * np.sin(x / 17 + y / 23), 127 + 120 * np.cos(y / 11), x + y], -1).clip(0, 255)
    photo = Image.fromarray(scene.astype(np.uint8))

    def bits(image: Image.Image) -> int:
        return int(difference_hash(image), 16)

    assert (bits(photo) ^ bits(photo.resize((64, 64)))).bit_count() <= 4
    assert (bits(photo) ^ bits(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT))).bit_count() > 16
