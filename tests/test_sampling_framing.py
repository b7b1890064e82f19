"""A source photo that a finished run is given is framed as training framed those that it learned from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_models import tiny_unet
from compose import config
from PIL import Image

from lora_dae.adapter import source_input
from lora_dae.adapter.source_input import attach_source_input, load_framing, save_source_input
from lora_dae.config import DataConfig
from lora_dae.data import sources
from lora_dae.data.entry import FileBlob
from lora_dae.data.formats import shards
from lora_dae.data.sources import FRAMED, framing_of, load_photos, load_splits
from lora_dae.data.square import Framing
from lora_dae.training import run as training


def write_pairs(root: Path, busy: list[bool]) -> None:
    """Portraits before noise (busy) or one color, with source photos that are partly transparent; two are held out."""
    rows = []
    for number, noisy in enumerate([*busy, busy[0], busy[0]]):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)
        if not noisy:
            pixels[:, :10] = pixels[:, -10:] = (200, 190, 180)
        source = rng.integers(0, 256, (64, 48, 4), dtype=np.uint8)
        source[..., 3] = 255
        source[:20, :, 3] = 0
        for folder, photo in (("images", pixels), ("source", source)):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo).save(root / folder / f"{number}.png")
        split = ["train"] * len(busy) + ["val", "test"]
        rows.append({"file_name": f"images/{number}.png", "text": "a red dress", "split": split[number]})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def data(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="folder", root=str(root), resolution=32, cache_dir=str(root.parent / "cache"), **changes)


def save(framing: Framing, folder: Path) -> None:
    unet = tiny_unet()
    attach_source_input(unet)
    save_source_input(unet, folder, framing.header())


@pytest.mark.parametrize("busy", [True, False])
def test_a_source_photo_becomes_the_pixels_that_training_saw(busy: bool, tmp_path: Path) -> None:
    """To the bit: cropped beside busy photos, padded beside plain ones, on data.background."""
    write_pairs(tmp_path / "photos", [busy] * 6)
    train = load_photos(data(tmp_path / "photos", background="blue"))["train"]
    save(framing_of(train), tmp_path)
    framing = load_framing(tmp_path)
    assert framing == Framing(whole=not busy, background="blue", mixed="")
    assert len(train) == 6
    for pair in (train[k] for k in range(len(train))):
        with Image.open(tmp_path / "photos" / "source" / Path(pair.id).name) as source:
            np.testing.assert_array_equal(framing.fit(source, 32), pair.source)


def test_shards_tell_it_as_the_photos_do(tmp_path: Path) -> None:
    write_pairs(tmp_path / "photos", [True] * 5)
    shards.write(dict(load_photos(data(tmp_path / "photos"))), tmp_path / "shards", per_shard=2)
    cfg = DataConfig(name="shards", root=str(tmp_path / "shards"), resolution=32, cache_dir=str(tmp_path / "cache"))
    assert framing_of(load_splits(cfg)["train"]) == Framing(whole=False, background="white", mixed="")


def test_files_that_do_not_tell_keep_the_whole_photo_on_white(tmp_path: Path) -> None:
    unet = tiny_unet()
    attach_source_input(unet)
    save_source_input(unet, tmp_path)
    portrait = Image.new("RGBA", (48, 64), (0, 0, 0, 0))
    portrait.paste((255, 0, 0, 255), (0, 0, 48, 8))  # cropping would cut it off
    for folder in (tmp_path, tmp_path / "nowhere"):
        square = load_framing(folder).fit(portrait, 64)
        assert (square[:8, 8:56] == (255, 0, 0)).all() and (square[8:] == 255).all()


def test_two_ways_of_framing_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pairs(tmp_path / "photos", [True] * 7 + [False] * 3)
    framing = framing_of(load_photos(data(tmp_path / "photos"))["train"])
    assert (framing.whole, framing.mixed) == (False, "70%")
    save(framing, tmp_path)
    source_input.say_once.cache_clear()
    assert load_framing(tmp_path) == load_framing(tmp_path) == framing
    assert capsys.readouterr().err.count("70% of the training photos were cropped and the others padded") == 1


def test_a_large_set_is_not_decoded_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path / "photos", [True] * (2 * FRAMED + 2))
    train = load_photos(data(tmp_path / "photos"))["train"]
    read: list[str] = []
    original = FileBlob.read

    def counted(self: FileBlob) -> bytes:
        read.append(self.name)
        return original(self)

    monkeypatch.setattr(FileBlob, "read", counted)
    assert not framing_of(train).whole
    assert 0 < len(read) <= FRAMED


def test_photos_that_are_gone_cost_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may be, once their latents are in the cache."""
    write_pairs(tmp_path / "photos", [True] * 3)
    train = load_photos(data(tmp_path / "photos", background="blue"))["train"]
    shutil.rmtree(tmp_path / "photos" / "images")
    sources.say_once.cache_clear()
    assert framing_of(train) == Framing(whole=True, background="blue", mixed="")
    assert "cannot be read any more: source photos will be padded" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["adapter.rank=2", "adapter.full_finetune=true"])
def test_a_training_writes_it_beside_the_adapter(adapter: str, tiny_backbone: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "photos", [True] * 6)
    options = (
        "backbone=folder", "data=folder", f"data.root={tmp_path / 'photos'}", "conditioning=source",
        "data.background=blue", "enhancement=none", "logger=none", "trainer.max_steps=1", adapter,
    )  # fmt: skip
    training.train(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    assert load_framing(tmp_path / "run" / "adapter") == Framing(whole=False, background="blue", mixed="")
