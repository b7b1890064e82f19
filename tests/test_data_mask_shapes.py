"""A mask has the shape of its photo, or it is none of it."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.catalog import Facts, check_shape
from lora_dae.data.sources import load_photos


@pytest.mark.parametrize(
    ("photo", "mask", "why"),
    [
        ((3000, 4000), (768, 1024), ""),
        ((1000, 1000), (1000, 985), ""),
        ((10, 4000), (3, 1024), ""),  # 2.56 pixels, rounded
        ((3000, 4000), (1024, 768), "turned by 90 degrees it fits"),
        ((1000, 1000), (1000, 900), "has 1000x900 pixels, another shape than its photo's 1000x1000"),
        ((768, 1024), (1024, 1024), "another shape"),
    ],
)
def test_a_smaller_mask_is_one_and_another_shape_is_none(
    photo: tuple[int, int], mask: tuple[int, int], why: str
) -> None:
    found = check_shape({"image": Facts("a", *photo), "mask": Facts("b", *mask)})
    assert found["image"] == Facts("a", *photo)
    assert why in found["mask"].reason and bool(why) == bool(found["mask"].reason)
    assert ("turned" in found["mask"].reason) == ("turned" in why)


def phone_photos(root: Path, turned: int) -> None:
    """Twelve upright portraits that lie on their side in the file; the masks of the first few lie there, too."""
    (root / "mask").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to look at it
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.jpg", exif=exif)
        (root / f"{number:02d}.txt").write_text("a dress")
        mask = np.zeros((60, 80), np.uint8)
        mask[10:30, 20:50] = 255
        drawn = Image.fromarray(mask)
        upright = drawn if number < turned else drawn.transpose(Image.Transpose.ROTATE_270)
        upright.save(root / "mask" / f"{number:02d}.png")


def test_a_mask_that_was_drawn_without_the_photos_turn_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stretched, it would lie beside the garment."""
    root = tmp_path / "photos"
    phone_photos(root, turned=2)
    cfg = DataConfig(name="folder", root=str(root), resolution=64, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"2 unusable of 24 files.*00.png has 80x60 pixels.*turned by 90 degrees"):
        load_photos(cfg)
    cfg.max_bad_fraction = 0.2
    splits = load_photos(cfg)
    assert sum(map(len, splits.values())) == 10
    assert "so 2 of 12 pairs are left out" in " ".join(capsys.readouterr().err.split())
    with (tmp_path / "cache" / "bad_files.csv").open(newline="") as file:
        assert [Path(row["file"]).name for row in csv.DictReader(file)] == ["00.png", "01.png"]
