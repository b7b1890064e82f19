"""Traps in photos of others: names that lead elsewhere or tell a split, groups, transparent masks, broken tables."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from conftest import write_photos
from PIL import Image

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data import sources
from lora_dae.data.__main__ import main
from lora_dae.data.entry import Entry, FileBlob
from lora_dae.data.formats import folder
from lora_dae.data.pair import Pair
from lora_dae.data.sources import load_photos
from lora_dae.data.splits import split_entries


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
    noise = np.random.default_rng(sum(os.fsencode(path.name))).integers(0, 256, (32, 32, 3), dtype=np.uint8)
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


def test_a_garment_in_two_published_splits_is_only_tested_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(split: str, *groups: str) -> list[Entry]:
        return [Entry(f"{split} {g}", g, ("a hat",), FileBlob(Path("x")), split=split) for g in groups]

    entries = listed("train", *"abcd") + listed("val", *"cde") + listed("test", *"dfg")
    parts = split_entries(entries, 0.1, 0.1, 0)
    assert {name: "".join(e.group_id for e in part) for name, part in parts.items()} == {
        "train": "ab", "val": "ce", "test": "dfg"
    }  # fmt: skip

    write_photos(tmp_path / "data", 12)
    table = tmp_path / "data" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows = [row | {"split": "test" if k < 3 else "train", "group_id": str(k % 10)} for k, row in enumerate(rows)]
    table.write_text("\n".join(map(json.dumps, rows)))
    splits = load_photos(config(tmp_path / "data"))
    assert len(splits["test"]) == 3 and sum(map(len, splits.values())) == 10
    assert "2 photos are left out" in capsys.readouterr().err


def test_names_that_are_no_text_are_spelled_so_that_they_can_be_kept(tmp_path: Path) -> None:
    """Bytes that are no UTF-8 in a file's name: used, and listed under a name that can be printed."""
    for number in range(5):
        save_photo(tmp_path / "data" / os.fsdecode(b"\xff%d.png" % number))
    cfg = config(tmp_path / "data")
    cfg.captions = CaptionConfig(missing="file_name")
    splits = load_photos(cfg)
    assert sorted(e.id for part in splits.values() for e in part.entries) == [f"\\xff{k}.png" for k in range(5)]
    pair = splits["train"][0]
    assert pair.image.shape == (32, 32, 3) and (pair.id + pair.caption + splits["train"].fingerprint).encode()
    Path(os.fsdecode(os.fsencode(tmp_path / "data") + b"/\xff0.png")).write_bytes(b"no photo")
    with pytest.raises(ConfigError, match=r"\\xff0.png cannot be read as an image"):
        load_photos(cfg)


def test_half_a_character_in_a_list_is_one_sentence(tmp_path: Path) -> None:
    write_photos(tmp_path / "data", 3)
    with (tmp_path / "data" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "000.png", "text": "a \\ud83d hat"}\n')
    with pytest.raises(ConfigError, match=r"line 4 holds \\ud83d, which is half of a character"):
        load_photos(config(tmp_path / "data"))
    whole = '{"file_name": "000.png", "text": "a \\ud83d\\udc57"}\n'
    (tmp_path / "data" / "metadata.jsonl").write_text(whole)
    assert folder.read(config(tmp_path / "data"))[0].caption == "a \N{DRESS}"


@pytest.mark.parametrize("command", ["inspect", "export --layout hf", "shards", "caption --model m", "masks --model m"])
def test_no_command_writes_into_the_data(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "data", 4)
    monkeypatch.chdir(tmp_path / "data")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--to", "new", "data=folder", "data.root=.", f"data.cache_dir={tmp_path / 'cache'}"])
    assert caught.value.code == 2 and "--to=new lies in data.root=." in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_buckets_mean_for_drawing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path / "data", 4)
    cfg = config(tmp_path / "data")
    cfg.buckets = ["auto"]
    sources.say_once.cache_clear()  # what was said once is not said again
    load_photos(cfg)
    assert "drawn and measured in squares of 32 x 32" in " ".join(capsys.readouterr().err.split())
