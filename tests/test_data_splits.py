"""Splits: the same file is the same garment, and what is published for testing is neither lost nor trained on."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import permutations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data import sources
from lora_dae.data.catalog import Facts
from lora_dae.data.entry import Entry, FileBlob
from lora_dae.data.formats.files import split_of
from lora_dae.data.pair import Pair
from lora_dae.data.sources import load_photos, read_entries
from lora_dae.data.splits import split_entries, unite
from lora_dae.evaluation.heldout import HeldOut, training_pairs

GARMENTS, VIEWS = 8, 3  # photos of each


def png(seed: int) -> bytes:
    """A file of noise: the same bytes for the same seed."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(seed))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path: Path, rows: list[dict[str, Any]], **kinds: Any) -> None:
    """Rows of image, text and further columns of ``kinds``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": datasets.Image(), "text": datasets.Value("string"), **kinds}
    ordered = [{name: row[name] for name in columns} for row in rows]
    datasets.Dataset.from_list(ordered, features=datasets.Features(columns)).to_parquet(path)


def config(name: str, root: Path, **changes: Any) -> DataConfig:
    given = {"name": name, "root": str(root), "cache_dir": str(root.parent / "cache"), **changes}
    return DataConfig(resolution=32, val_fraction=0.2, test_fraction=0.2, **given)


def write_garments(layout: str, root: Path) -> None:
    """Photos ``hat <k>`` of garments ``k // VIEWS``, whose source photo is stored anew for each of them."""
    pairs = [(k, png(k), png(100 + k // VIEWS)) for k in range(GARMENTS * VIEWS)]
    if layout == "webdataset":
        files = [{f"{k}.png": a, f"{k}.source.png": b, f"{k}.txt": f"hat {k}".encode()} for k, a, b in pairs]
        write_tar(root / "photos.tar", {name: data for record in files for name, data in record.items()})
    elif layout == "hf":
        rows = [{"image": a, "source": b, "text": f"hat {k}"} for k, a, b in pairs]
        write_parquet(root / "photos.parquet", rows, source=datasets.Image())
    else:
        image, source = {"folder": ("images", "source"), "fashion_mannequin": ("model", "mannequin")}[layout]
        for k, _, _ in pairs:
            save(root / image / f"{k}.png", k)
            save(root / source / f"{k}.png", 100 + k // VIEWS)
        rows = [{"id": str(k), "file_name": f"{k}.png", "text": f"hat {k}"} for k, _, _ in pairs]
        write_rows(root / ("metadata.jsonl" if layout == "folder" else "captions.jsonl"), rows)


@pytest.mark.parametrize("layout", ["folder", "fashion_mannequin", "webdataset", "hf"])
def test_copies_of_a_source_photo_are_one_garment(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_garments(layout, tmp_path / "data")
    sources.say_once.cache_clear()  # what was said once is not said again
    splits = load_photos(config(layout, tmp_path / "data"))
    shown = [[int(entry.caption.split()[1]) // VIEWS for entry in split.entries] for split in splits.values()]
    assert sorted(sum(shown, [])) == sorted(VIEWS * list(range(GARMENTS)))
    train, val, test = map(set, shown)
    assert train and val and test and not (train & val or train & test or val & test)
    assert f"24 groups are split as 8 garments (the largest has {VIEWS} photos, " in capsys.readouterr().err


def test_a_photo_under_two_names_is_in_one_split(tmp_path: Path) -> None:
    for k in range(12):
        for folder in ("front", "again"):
            save(tmp_path / "data" / folder / f"{k}.png", k)
            (tmp_path / "data" / folder / f"{k}.txt").write_text(f"hat {k}")
    places: dict[str, list[str]] = {}
    for name, split in load_photos(config("folder", tmp_path / "data")).items():
        for entry in split.entries:
            places.setdefault(entry.caption, []).append(name)
    assert len(places) == 12 and all(len(names) == 2 and len(set(names)) == 1 for names in places.values())


def test_files_unite_groups_over_chains_and_in_any_order() -> None:
    """By target or source; not where one photo's target is another one's source, and not by masks."""
    files = {
        "a": {"image": "1", "source": "s"}, "b": {"image": "2", "source": "s"}, "c": {"image": "2", "source": "t"},
        "d": {"image": "s", "source": "1", "mask": "m"}, "e": {"image": "5", "mask": "m"},
    }  # fmt: skip
    facts = {id: {part: Facts(digest) for part, digest in parts.items()} for id, parts in files.items()}
    entries = [Entry(id, id, ("a hat",), FileBlob(Path(id))) for id in files]
    for listed in permutations(entries):
        found = {entry.id: entry.group_id for entry in unite(list(listed), facts)}
        assert found == {"a": "a", "b": "a", "c": "a", "d": "d", "e": "e"}
    assert unite(entries, {}) == entries


def test_published_splits_are_kept_and_what_they_share_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for k in range(12):  # the last three have the source photos of the first three
        save(tmp_path / "data" / f"{k}.png", k)
        save(tmp_path / "data" / "source" / f"{k}.png", 100 + k % 9)
        split = "test" if k < 3 else "val" if k < 5 else "train"
        rows.append({"file_name": f"{k}.png", "text": "a hat", "split": split})
    write_rows(tmp_path / "data" / "metadata.jsonl", rows)
    sources.say_once.cache_clear()
    splits = load_photos(config("folder", tmp_path / "data"))
    assert [sorted((e.id for e in split.entries), key=lambda id: int(id[:-4])) for split in splits.values()] == [
        [f"{k}.png" for k in range(5, 12)], ["3.png", "4.png"], ["0.png", "1.png", "2.png"],
    ]  # fmt: skip
    assert "3 of 7 training photos are the same file as a held-out photo or have" in capsys.readouterr().err
    load_photos(config("folder", tmp_path / "data"))
    assert "training photos" not in capsys.readouterr().err


def test_validation_photos_out_of_a_published_training_split_show_other_garments() -> None:
    def listed(split: str, count: int) -> list[Entry]:
        return [Entry(f"{split}{k}", f"{split}{k}", ("a",), FileBlob(Path("x")), split=split) for k in range(count)]

    entries = listed("train", 60) + listed("test", 3)
    garments = {entry.id: f"{entry.split} {k // VIEWS}" for k, entry in enumerate(entries)}
    facts = {entry.id: {"image": Facts(entry.id), "source": Facts(garments[entry.id])} for entry in entries}
    parts = split_entries(entries, 0.2, 0.2, 0, facts)
    train, val = ({garments[entry.id] for entry in parts[name]} for name in ("train", "val"))
    assert val and not train & val and len(train | val) == 20 and len(parts["test"]) == 3


def test_the_first_pairs_of_held_out_splits_and_the_floors_are_a_sample_of_all(tmp_path: Path) -> None:
    """A source lists one category after the other; fewer pairs than its first one has, whichever way it is listed."""
    kinds, rows = ("dress", "hat", "shirt"), []
    for k in range(90):
        save(tmp_path / "data" / f"{k:03d}.png", k)
        kind, split = kinds[k // 30], ("train", "val", "test")[k % 3]
        rows.append({"file_name": f"{k:03d}.png", "text": f"a {kind}", "category": kind, "split": split})
    write_rows(tmp_path / "data" / "metadata.jsonl", rows)
    splits: dict[str, Any] = dict(load_photos(config("folder", tmp_path / "data")))
    first = {name: HeldOut.take(splits[name], 8, "none") for name in ("val", "test")}
    training = training_pairs(splits["train"], first["test"])
    assert training is not None and len({pair.id for pair in training.pairs}) == 8
    for taken in (*first.values(), training):
        assert {pair.category for pair in taken.pairs} == set(kinds)
    write_rows(tmp_path / "data" / "metadata.jsonl", rows[::-1])
    again: dict[str, Any] = dict(load_photos(config("folder", tmp_path / "data")))
    for name, taken in first.items():
        assert [again[name][k].id for k in taken.numbers] == [pair.id for pair in taken.pairs]


def test_training_pairs_are_all_different_and_as_many_as_there_are() -> None:
    """Photos that are repeated in training lie behind each other, and those of other sizes between them."""
    small, large = (np.zeros((side, side, 3), np.uint8) for side in (8, 16))
    train: Any = [Pair(str(k // 3), "g", "a hat", large if k // 3 == 4 else small) for k in range(30)]
    found = training_pairs(train, HeldOut([train[0]] * 9))
    assert found is not None and sorted(pair.id for pair in found.pairs) == list("012356789")
    assert training_pairs(train, HeldOut([train[0]] * 10)) is None


def test_other_names_of_splits_are_known() -> None:
    names = ("training-0.tar", "testing", "evaluation_1", "eval-00000-of-00001", "holdout")
    assert [split_of(name) for name in names] == ["train", "test", "val", "val", None]


def test_parquet_files_of_unknown_splits_are_not_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for place, name in enumerate(("train-0", "holdout")):
        write_parquet(root / f"{name}.parquet", [{"image": png(10 * place + k), "text": name} for k in range(2)])
    with pytest.raises(ConfigError, match="holdout.parquet, whose name begins with no split as those of others do"):
        read_entries(config("hf", root))
    (root / "holdout.parquet").rename(root / "eval-0.parquet")
    found = {entry.caption: entry.split for entry in read_entries(config("hf", root))}
    assert found == {"train-0": "train", "holdout": "val"}


def test_tars_folders_and_lines_without_a_split_beside_others_are_refused(tmp_path: Path) -> None:
    for name in ("train-0", "holdout"):
        write_tar(tmp_path / "tars" / f"{name}.tar", {"0.png": png(0), "0.txt": b"a hat"})
    with pytest.raises(ConfigError, match=r"holdout\.tar 0 belongs to no split, but .*train-0\.tar 0 to train"):
        read_entries(config("webdataset", tmp_path / "tars"))
    for name in ("test/0", "eval/1", "holdout/2"):
        save(tmp_path / "photos" / f"{name}.png", 0)
        (tmp_path / "photos" / f"{name}.txt").write_text("a hat")
    with pytest.raises(ConfigError, match=r"holdout/2\.png belongs to no split, but eval/1\.png to val") as caught:
        read_entries(config("folder", tmp_path / "photos"))
    assert "\n" not in str(caught.value)
    rows = [{"file_name": "test/0.png", "text": "a", "split": "test"}, {"file_name": "holdout/2.png", "text": "a"}]
    write_rows(tmp_path / "photos" / "metadata.jsonl", rows)
    with pytest.raises(ConfigError, match=r"metadata\.jsonl line 2 belongs to no split"):
        read_entries(config("folder", tmp_path / "photos"))
    write_rows(tmp_path / "photos" / "metadata.jsonl", rows[1:])  # nobody names one: all are split here
    assert [entry.split for entry in read_entries(config("folder", tmp_path / "photos"))] == [None]


def test_a_table_over_folders_of_splits_keeps_them(tmp_path: Path) -> None:
    names = [f"{folder}/{k}.png" for folder in ("train", "Test") for k in range(2)]
    for k, name in enumerate(names):
        save(tmp_path / "data" / name, k)
    lines = ["file_name,text", *(f"{name},a hat" for name in names)]
    (tmp_path / "data" / "metadata.csv").write_text("\n".join(lines))
    assert [entry.split for entry in read_entries(config("folder", tmp_path / "data"))] == ["train"] * 2 + ["test"] * 2
    rows = [{"file_name": name, "text": "a hat", "split": "val"} for name in names]  # the column is more exact
    write_rows(tmp_path / "data" / "metadata.jsonl", rows)
    assert {entry.split for entry in read_entries(config("folder", tmp_path / "data"))} == {"val"}


def test_names_of_source_photos_may_begin_anew_in_each_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    for place, split in enumerate(("train", "val", "test")):
        rows = []
        for k in range(4):
            save(root / split / f"{k}.png", 10 * place + k)
            save(root / split / "source" / f"{k}.png", 100 + 10 * place + k)
            rows.append({"file_name": f"{k}.png", "text": "a hat", "source": f"source/{k}.png"})
        write_rows(root / split / "metadata.jsonl", rows)
    assert [len(split) for split in load_photos(config("folder", root)).values()] == [4, 4, 4]
    assert "left out" not in capsys.readouterr().err
    save(root / "garments" / "7.png", 99)
    row = {"file_name": "0.png", "text": "a hat", "source": "../garments/7.png"}
    for split in ("train", "test"):
        write_rows(root / split / "metadata.jsonl", [row])
    groups = {entry.split: entry.group_id for entry in read_entries(config("folder", root))}
    assert groups["train"] == groups["test"] == "garments/7.png"  # the very same file
