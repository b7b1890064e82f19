"""The procedural studio: deterministic, disjoint splits, pairs that agree on the garment."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.sources import load_split, load_splits
from lora_dae.data.studio.attributes import COLORS, GARMENTS, PATTERNS, draw_look, stream
from lora_dae.data.studio.captions import caption
from lora_dae.data.studio.dataset import SPLIT_START, StudioDataset
from lora_dae.data.studio.patterns import tile
from lora_dae.data.studio.pose import draw_pose
from lora_dae.data.studio.scene import model_photo, photo, source_photo


def test_same_seed_and_index_same_pixels() -> None:
    look = draw_look(0, 5, "target")
    assert np.array_equal(photo(look, 0, 5, 64).image, photo(look, 0, 5, 64).image)
    assert not np.array_equal(photo(look, 0, 5, 64).image, photo(draw_look(0, 6, "target"), 0, 6, 64).image)


def test_streams_are_independent() -> None:
    """Other hair leaves the garment's pixels alone: every part has a random stream of its own."""
    look = draw_look(0, 8, "target")
    other = replace(look, person=replace(look.person, hair_color="red", skin=0, seed=look.person.seed))
    a, b = (
        model_photo(v, draw_pose(stream(0, 8, "pose")), stream(0, 8, "drape"), stream(0, 8, "photo"), 64)
        for v in (look, other)
    )
    inside = (a.mask > 0) & (b.mask > 0)
    assert inside.sum() > 200
    inner = inside & np.roll(inside, 2, 0) & np.roll(inside, -2, 0) & np.roll(inside, 2, 1) & np.roll(inside, -2, 1)
    assert np.array_equal(a.image[inner], b.image[inner])


def test_aligned_pair_shows_the_same_garment_pixels() -> None:
    equal = []
    for index in range(6):
        look = draw_look(0, index, "target")
        target, source = photo(look, 0, index, 64), source_photo(look, 0, index, 64, "aligned")
        both = (target.mask > 0) & (source.mask > 0)
        gap = np.abs(target.image.astype(int) - source.image)[both]
        equal.append(np.median(gap))
    assert np.max(equal) <= 3


def test_harder_pairs_move_the_garment() -> None:
    look = draw_look(0, 2, "target")
    target = photo(look, 0, 2, 64).mask > 0
    overlap = {}
    for difficulty in ("aligned", "shifted", "reposed"):
        source = source_photo(look, 0, 2, 64, difficulty).mask > 0
        overlap[difficulty] = (target & source).sum() / (target | source).sum()
    assert overlap["aligned"] > 0.85 > max(overlap["shifted"], overlap["reposed"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tiles_are_seamless(pattern: str) -> None:
    """Across the border a tile changes no more than it does inside."""
    garment = replace(draw_look(0, 3, "target").garment, pattern=pattern, color="red")
    cloth, _ = tile(garment, 24)
    inside = np.abs(np.diff(cloth, axis=0)).mean((1, 2)).max(), np.abs(np.diff(cloth, axis=1)).mean((0, 2)).max()
    seam = np.abs(cloth[0] - cloth[-1]).mean(), np.abs(cloth[:, 0] - cloth[:, -1]).mean()
    assert seam[0] <= 1.5 * inside[0] + 1e-3 and seam[1] <= 1.5 * inside[1] + 1e-3


def test_main_color_covers_most_of_the_cloth() -> None:
    """The caption's color is nearer to the cloth's mean than any other of the twelve, in Lab-like terms."""
    for color in ("red", "green", "blue", "purple", "orange"):
        for pattern in ("stripes", "dots", "houndstooth"):
            garment = replace(draw_look(0, 3, "target").garment, pattern=pattern, color=color, shade=(0, 0, 0))
            cloth, _ = tile(garment, 24)
            main = np.array(COLORS[color]) / 255
            assert (np.abs(cloth - main).sum(-1) < 0.25).mean() > 0.4


def test_captions_name_the_facts() -> None:
    words = {"stripes": "striped", "dots": "polka dot", "solid": ""}
    for domain in ("base", "target"):
        for index in range(200):
            look = draw_look(0, index, domain)
            text = caption(look, stream(0, index, "caption"))
            assert look.garment.color in text and look.garment.kind in text
            assert words.get(look.garment.pattern, look.garment.pattern) in text
            assert " a orange" not in text and "a an " not in text


def test_domains_differ_as_documented() -> None:
    base = [draw_look(0, i, "base") for i in range(600)]
    target = [draw_look(0, i, "target") for i in range(600)]
    assert {look.garment.kind for look in target} == set(GARMENTS)
    assert all(look.view == "model" and look.garment.pattern != "solid" for look in target)
    assert 0.35 < np.mean([look.view == "model" for look in base]) < 0.55
    coarse = np.mean([look.garment.period for look in base]) / np.mean([look.garment.period for look in target])
    assert coarse > 1.5


def test_dataset_is_rendered_once_and_read_back(tmp_path: Path) -> None:
    made = StudioDataset(tmp_path, "target", "val", 3, seed=1, resolution=32, workers=1)
    pair = made[1]
    index = SPLIT_START["val"] + 1
    look = draw_look(1, index, "target")
    assert np.array_equal(pair.image, photo(look, 1, index, 32).image)
    assert pair.source is not None and pair.mask is not None and pair.attributes == look.words()
    stamp = (made.directory / "images.npy").stat().st_mtime_ns
    again = StudioDataset(tmp_path, "target", "val", 3, seed=1, resolution=32)
    assert (again.directory / "images.npy").stat().st_mtime_ns == stamp
    assert again.fingerprint == made.fingerprint
    assert StudioDataset(tmp_path, "target", "val", 2, seed=1, resolution=32, workers=1).fingerprint != made.fingerprint


def test_one_split_alone_renders_no_other(tmp_path: Path) -> None:
    cfg = DataConfig(cache_dir=str(tmp_path), resolution=64, train_size=2, val_size=2, test_size=2)
    one = load_split(cfg, "test")
    assert len({path.parent for path in tmp_path.rglob("images.npy")}) == 1
    assert one.fingerprint == load_splits(cfg)["test"].fingerprint
    assert len({path.parent for path in tmp_path.rglob("images.npy")}) == 3


def test_what_a_killed_rendering_left_stands_in_nobodys_way(tmp_path: Path) -> None:
    """In a container the next process has the number of the killed one."""
    directory = StudioDataset(tmp_path, "target", "val", 2, resolution=32, workers=1).directory
    shutil.rmtree(directory)
    directory.with_name(f"{directory.name}.partial{os.getpid()}").mkdir()
    again = StudioDataset(tmp_path, "target", "val", 2, resolution=32, workers=1)
    assert again[1].image.any()
    (tmp_path / "any").mkdir()
    assert directory.stat().st_mode == (tmp_path / "any").stat().st_mode  # open to whom any folder is


def test_unknown_difficulty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="impossible"):
        StudioDataset(tmp_path, "target", "val", 1, difficulty="impossible")
