"""Traps in photos of others: names that lead elsewhere or tell a split, groups, transparent masks, broken tables."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.formats import folder
from lora_dae.data.pair import Pair
from lora_dae.data.sources import load_photos


class Named:
    """Pairs of an (id, group) each, with source and mask; captions end in the id."""

    has_source, has_mask, fingerprint = True, True, ""

    def __init__(self, *names: tuple[str, str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        id, group = self.names[index]
        pixels = np.zeros((16, 16, 3), np.uint8)
        return Pair(id, group, f"a hat, {id}", pixels, pixels, pixels[..., 0], category="hat")


def config(root: Path, name: str = "folder") -> DataConfig:
    return DataConfig(name=name, root=str(root), resolution=32, cache_dir=str(root.parent / "cache"))


def save_photo(path: Path, pixels: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(sum(path.name.encode())).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise if pixels is None else pixels).save(path)


def test_a_photo_listed_by_its_whole_path_is_not_its_own_mask_or_source(tmp_path: Path) -> None:
    data, photo = tmp_path / "data", tmp_path / "photos" / "a.png"
    save_photo(photo)
    save_photo(data / "mask" / "a.png")
    (data / "source").mkdir()
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": str(photo), "text": "a hat"}))
    (entry,) = folder.read(config(data))
    assert entry.image.name == str(photo)
    assert entry.mask is not None and entry.mask.name == str(data / "mask" / "a.png") and entry.source is None


def test_photos_with_sidecars_have_the_split_that_their_folder_is_named_after(tmp_path: Path) -> None:
    for name in ("Train/0", "test/1", "2", "more/3"):
        save_photo(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a hat")
    found = {entry.id: entry.split for entry in folder.read(config(tmp_path))}
    assert found == {"Train/0.png": "train", "test/1.png": "test", "2.png": None, "more/3.png": None}


@pytest.mark.parametrize("layout", ["folder", "fashion_mannequin"])
def test_no_id_leads_out_of_the_folder_that_is_written(layout: str, tmp_path: Path) -> None:
    module, out = import_module(f"lora_dae.data.formats.{layout}"), tmp_path / "deep" / "out"
    pairs = Named(("../../x", "one"), (str(tmp_path / "p" / "a.jpg"), "two"))
    module.write({"train": pairs}, out)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 6 and all(path.is_relative_to(out) for path in written)
    captions = {entry.caption for entry in module.read(config(out, layout))}
    assert captions == {pairs[0].caption, pairs[1].caption}


@pytest.mark.parametrize("layout", ["deepfashion_multimodal", "fashion_gen"])
def test_exported_photos_of_one_garment_stay_together(layout: str, tmp_path: Path) -> None:
    if layout == "fashion_gen":
        pytest.importorskip("h5py")
    module = import_module(f"lora_dae.data.formats.{layout}")
    module.write({"train": Named(("0", "one"), ("1", "two"), ("2", "one")), "test": Named(("3", "two"))}, tmp_path)
    groups: dict[str, str] = {}
    for entry in module.read(config(tmp_path, layout)):
        groups[entry.group_id] = groups.get(entry.group_id, "") + entry.caption[-1]
    assert sorted("".join(sorted(ids)) for ids in groups.values()) == ["02", "13"]


def test_what_is_transparent_in_a_mask_is_no_garment(tmp_path: Path) -> None:
    mask = np.full((32, 32, 4), 255, np.uint8)
    mask[:16, :, 3] = 0
    for name in "abc":
        save_photo(tmp_path / "data" / f"{name}.png")
        save_photo(tmp_path / "data" / "mask" / f"{name}.png", mask)
        (tmp_path / "data" / f"{name}.txt").write_text("a hat")
    pair = load_photos(config(tmp_path / "data"))["train"][0]
    np.testing.assert_array_equal(pair.mask, np.where(np.arange(32)[:, None] < 16, 0, 255).repeat(32, 1))


def test_a_quote_that_is_never_closed_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a hat\n')
    with pytest.raises(ConfigError, match=r"metadata.csv line \d is no CSV"):
        folder.read(config(tmp_path))
