"""Photos become squares without losing the garment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lora_dae.data.decode import upright_rgb
from lora_dae.data.square import fill, fit_mask, fit_square, has_plain_backdrop, kept_box, median_color, resample


def plain_portrait() -> Image.Image:
    """30x60: a red block on a green backdrop."""
    pixels = np.full((60, 30, 3), (10, 200, 30), np.uint8)
    pixels[2:58, 8:22] = (250, 0, 0)
    return Image.fromarray(pixels)


def busy(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_plain_backdrops_are_told_from_busy_ones() -> None:
    assert has_plain_backdrop(plain_portrait())
    assert not has_plain_backdrop(busy((30, 60)))


@pytest.mark.parametrize("count", [1, 2, 7, 768])
def test_the_median_color_is_numpys(count: int) -> None:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 3), dtype=np.uint8)
    np.testing.assert_array_equal(median_color(pixels), np.median(pixels, axis=0))


@pytest.mark.parametrize(("size", "missing"), [((7, 4), 3), ((4, 7), 3), ((8, 2), 6)])
def test_what_is_missing_is_shared_out_to_both_sides(size: tuple[int, int], missing: int) -> None:
    """An odd line goes to the lower or right side; whole lines of the edge's median color on either."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    square = fill(pixels, (max(size), max(size)))
    lines, photo = (square, pixels) if size[0] < size[1] else (square.transpose(1, 0, 2), pixels.transpose(1, 0, 2))
    first, last = missing // 2, missing - missing // 2
    np.testing.assert_array_equal(lines[first:-last], photo)
    assert (lines[:first] == np.median(photo[0], axis=0).round()).all()
    assert (lines[-last:] == np.median(photo[-1], axis=0).round()).all()


def test_padding_continues_a_plain_backdrop_and_keeps_the_whole_photo() -> None:
    square = fit_square(plain_portrait(), 60, whole=True)
    assert square.shape == (60, 60, 3) and square.dtype == np.uint8
    assert (square[:, :15] == (10, 200, 30)).all() and (square[:, 45:] == (10, 200, 30)).all()
    np.testing.assert_array_equal(square[:, 15:45], np.asarray(plain_portrait()))


def test_each_side_is_padded_in_its_own_color() -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10], pixels[10:] = 50, 200
    square = fit_square(Image.fromarray(pixels), 40, whole=True)
    assert (square[:20] == 50).all() and (square[20:] == 200).all()


@pytest.mark.parametrize(
    ("size", "whole", "box"),
    [
        ((60, 80), False, (0, 10, 60, 70)),  # 3:4 becomes square
        ((80, 60), False, (10, 0, 70, 60)),
        ((90, 160), False, (0, 20, 90, 140)),  # 9:16 keeps three quarters of its height
        ((60, 80), True, (0, 0, 60, 80)),
        ((50, 50), False, (0, 0, 50, 50)),
    ],
)
def test_kept_box(size: tuple[int, int], whole: bool, box: tuple[int, ...]) -> None:
    assert kept_box(size, whole) == box


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (3, 5), (128, 128), (37, 41)])
@pytest.mark.parametrize("whole", [True, False])
def test_any_size_becomes_the_square(size: tuple[int, int], whole: bool) -> None:
    assert fit_square(busy(size), 32, whole).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [(256, 256), (341, 256), (192, 250), (96, 128), (50, 31)])
def test_scaling_is_lanczos_as_pillow_has_it(size: tuple[int, int]) -> None:
    """Up and down, on noise and on smooth photos: the same to one level of rounding in each direction."""
    smooth = busy((24, 32)).resize((192, 256), Image.Resampling.BICUBIC)
    for photo in (busy((192, 256)), smooth):
        expected = np.asarray(photo.resize(size, Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(resample(photo, (0, 0, 192, 256), size) - expected).max() <= 2


def test_without_torchs_lanczos_pillow_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._nn, "_upsample_lanczos2d_aa", raising=False)
    expected = busy((60, 80)).resize((30, 40), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(resample(busy((60, 80)), (0, 0, 60, 80), (30, 40)), np.asarray(expected))


def test_a_box_between_pixels_is_moved_to_the_nearest() -> None:
    photo = busy((60, 81))  # its middle 60 rows begin at 10.5
    np.testing.assert_array_equal(resample(photo, (0, 10.5, 60, 70.5), (60, 60)), np.asarray(photo)[11:71])


def test_a_square_photo_of_the_right_size_is_untouched() -> None:
    np.testing.assert_array_equal(fit_square(busy((32, 32)), 32, whole=False), np.asarray(busy((32, 32))))


def test_mask_lies_where_its_object_lies() -> None:
    pixels = np.zeros((60, 30, 3), np.uint8)
    pixels[20:40, 8:22] = 255
    photo = Image.fromarray(pixels)
    for mask in (photo.convert("L"), photo.convert("1"), photo.convert("L").resize((60, 120))):
        for whole in (True, False):
            square = fit_mask(mask, photo, 120, whole)
            assert set(np.unique(square)) == {0, 255}
            expected = fit_square(photo, 120, whole)[..., 0] >= 128
            assert ((square == 255) == expected).mean() > 0.98


def test_transparent_parts_are_white_and_gray_becomes_rgb() -> None:
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (np.asarray(upright_rgb(transparent)) == 255).all()
    assert upright_rgb(Image.new("L", (4, 4))).mode == "RGB"


def test_a_photo_is_turned_as_its_camera_says() -> None:
    photo = Image.new("RGB", (20, 10))
    photo.getexif()[0x0112] = 6  # orientation: turn by 90 degrees
    assert upright_rgb(photo).size == (10, 20)
