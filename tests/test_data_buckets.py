"""Buckets keep a photo's shape, cut at most 5 %, and treat pairs alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.buckets import (
    choose_bucket,
    choose_buckets,
    crop_box,
    cut_share,
    fit_bucket,
    fit_bucket_mask,
    parse_buckets,
)
from lora_dae.data.photos import Fit
from lora_dae.data.sources import load_photos

AUTO = parse_buckets(["auto"], 512)


def test_sizes_are_what_the_backbone_takes() -> None:
    assert {(512, 512), (448, 576), (512, 704), (704, 512)} <= set(AUTO)
    assert all(w % 64 == 0 and h % 64 == 0 and 0.7 <= w * h / 512**2 <= 1.4 for w, h in AUTO)
    assert all(w % 16 == 0 for w, _ in parse_buckets(["auto"], 128))
    assert all(w % 64 == 0 for w, _ in parse_buckets(["auto"], 1024))
    assert parse_buckets(["512x704", "704x512"], 512) == [(512, 704), (704, 512)]
    assert parse_buckets([], 512) == []
    with pytest.raises(ConfigError, match="width x height"):
        parse_buckets(["portrait"], 512)
    with pytest.raises(ConfigError, match="multiple of 64"):
        parse_buckets(["500x700"], 512)


def test_each_photo_has_a_bucket_of_its_shape() -> None:
    assert choose_bucket((1000, 1000), AUTO, 512) == (512, 512)
    assert choose_bucket((768, 1024), AUTO, 512) == (448, 576)
    assert choose_bucket((1024, 768), AUTO, 512) == (576, 448)
    assert choose_bucket((768, 1024), [(512, 704), (512, 512)], 512) == (512, 704)


@pytest.mark.parametrize("buckets", [AUTO, [(704, 512), (512, 704), (512, 512)]])
def test_many_sizes_at_once_get_the_buckets_that_each_gets_alone(buckets: list[tuple[int, int]]) -> None:
    sizes = np.random.default_rng(0).integers(1, 3000, (3000, 2))
    sizes[:1000] = sizes[:1000, :1] * [[2, 2]] + np.arange(1000)[:, None] % [
        [7, 1]
    ]  # nearly square: ties and near ties
    alone = [buckets.index(choose_bucket((w, h), buckets, 512)) for w, h in sizes.tolist()]
    assert choose_buckets(sizes, buckets, 512).tolist() == alone
    labels = Fit(512, tuple(buckets)).buckets_of(np.repeat(sizes, 2, 0).astype(np.uint32))
    assert labels is not None and labels.tolist() == np.repeat(alone, 2).tolist()
    assert Fit(512).buckets_of(sizes) is None


def test_never_more_than_five_percent_is_cut() -> None:
    rng = np.random.default_rng(0)
    within = 0
    for width, height in rng.integers(30, 2000, (2000, 2)).tolist():
        bucket = choose_bucket((width, height), AUTO, 512)
        left, top, right, bottom = crop_box((width, height), bucket)
        assert (right - left) * (bottom - top) >= 0.95 * width * height - 1e-6
        assert left == pytest.approx(width - right) and top == pytest.approx(height - bottom)
        if 0.5 < width / height < 2:
            within += cut_share((width, height), bucket) > 0.06
    assert within == 0  # photos of usual shapes hardly need filling


def test_pixels_of_a_photo_that_fits_are_only_scaled() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))
    np.testing.assert_array_equal(fit_bucket(photo, (64, 96)), np.asarray(photo))
    wide = Image.new("RGB", (400, 50), (10, 200, 30))
    filled = fit_bucket(wide, (64, 64))
    assert filled.shape == (64, 64, 3) and (filled == (10, 200, 30)).all()


def test_the_mask_stays_on_its_garment() -> None:
    pixels = np.zeros((100, 70, 3), np.uint8)
    pixels[30:60, 20:50] = 255
    photo, mask = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    for bucket in ((64, 96), (64, 64), (96, 64)):
        image, fitted = fit_bucket(photo, bucket), fit_bucket_mask(mask, photo, bucket)
        assert fitted.shape == (bucket[1], bucket[0]) and set(np.unique(fitted)) == {0, 255}
        assert ((image[..., 0] > 127) == (fitted > 0)).mean() > 0.99


def test_a_folder_in_buckets(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "source").mkdir(parents=True)
    for number in range(9):
        size = (90, 120) if number % 2 else (120, 90)
        photo = Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        photo.save(root / f"{number}.png")
        photo.save(root / "source" / f"{number}.png")
        (root / f"{number}.txt").write_text("a shirt with a logo" if number < 4 else "a shirt")
    cfg = DataConfig(
        name="folder", root=str(root), resolution=64, buckets=["auto"], flip=True, cache_dir=str(tmp_path / "cache")
    )
    splits = load_photos(cfg)
    for pair in (splits["train"][i] for i in range(len(splits["train"]))):
        tall = int(pair.id[0]) % 2
        assert pair.size == pair.image.shape[:2] == ((72, 56) if tall else (56, 72))
        np.testing.assert_array_equal(pair.image, pair.source)  # alike photos are cropped alike
        assert pair.mirror == (int(pair.id[0]) >= 4)  # writing is not mirrored
    held_out = splits["test"][0]  # drawn and measured in squares, validated on as it would be trained on
    assert held_out.size == (64, 64) and not held_out.mirror
    trained = splits["test"].as_trained()[0]
    assert trained.id == held_out.id and trained.size in ((72, 56), (56, 72)) and not trained.mirror
