"""A folder of photos: its two layouts, its splits, and a sentence for everything that can be wrong."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_photos
from PIL import Image

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data.entry import Entry, FileBlob
from lora_dae.data.formats.folder import read
from lora_dae.data.sources import load_photos, read_entries
from lora_dae.data.splits import split_entries


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder is relative to the working directory, never inside the data."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def config(root: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="folder", root=str(root), resolution=32, **changes)


def refusal(root: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_photos(config(root, **changes))
    return str(caught.value)


def save_photo(path: Path, seed: int = 0, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def write_rows(root: Path, rows: list[dict]) -> None:
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def test_splits_cover_everything_once(tiny_folder: Path) -> None:
    splits = load_photos(config(tiny_folder, val_fraction=0.2, test_fraction=0.2))
    ids = [entry.id for split in splits.values() for entry in split.entries]
    assert sorted(ids) == [f"{number:03d}.png" for number in range(24)]
    assert list(splits) == ["train", "val", "test"]


def test_a_pair_is_what_the_metadata_says(tiny_folder: Path) -> None:
    splits = load_photos(config(tiny_folder))
    pairs = {pair.id: pair for split in splits.values() for pair in (split[i] for i in range(len(split)))}
    pair = pairs["001.png"]
    assert (pair.caption, pair.category) == ("a blue shirt in a plaid pattern", "dress")
    assert pair.image.shape == (32, 32, 3) and pair.image.dtype == np.uint8
    assert pair.source is None and pair.mask is None


def test_csv_with_a_byte_order_mark_and_sidecars_give_the_same_as_jsonl(tmp_path: Path) -> None:
    for name in ("jsonl", "csv", "sidecar"):
        for number in range(4):
            save_photo(tmp_path / name / f"{number}.png", number)
    captions = ["a dress", "a shirt, blue", "a hat", "a skirt"]
    write_rows(tmp_path / "jsonl", [{"file_name": f"{i}.png", "text": captions[i]} for i in range(4)])
    lines = ["file_name,text", *(f'{i}.png,"{captions[i]}"' for i in range(4))]
    (tmp_path / "csv" / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    for number, caption in enumerate(captions):
        (tmp_path / "sidecar" / f"{number}.txt").write_text(caption + "\n")
    found = [
        [(entry.id, entry.group_id, entry.caption) for entry in read(config(tmp_path / name))]
        for name in ("jsonl", "csv", "sidecar")
    ]
    assert found[0] == found[1] == found[2]
    assert found[0][1] == ("1.png", "1.png", "a shirt, blue")


def test_source_and_mask_columns_make_pairs(tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        target = save_photo(tmp_path / "images" / f"{number}.png", number)
        save_photo(tmp_path / "sources" / f"{number}.png", number + 10)
        Image.fromarray(target[..., 0] // 128 * 255).save(tmp_path / f"{number}_mask.png")
        rows.append(
            {
                "file_name": f"{number}.png",
                "text": "a dress",
                "source": f"sources/{number}.png",
                "mask": f"{number}_mask.png",
            }
        )
    write_rows(tmp_path, rows)
    train = load_photos(config(tmp_path))["train"]
    assert train.has_source and train.has_mask
    pair = train[0]
    np.testing.assert_array_equal(pair.source, source_of(tmp_path, pair.id))
    assert pair.mask is not None
    np.testing.assert_array_equal(pair.mask, np.where(pair.image[..., 0] >= 128, 255, 0))

    write_rows(tmp_path, [*rows[:3], {key: rows[3][key] for key in ("file_name", "text", "source")}])
    assert "line 4 has no mask but other lines do" in refusal(tmp_path)


def source_of(root: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(root / "sources" / name))


def entries(groups: list[str]) -> list[Entry]:
    return [Entry(str(i), group, ("text",), FileBlob(Path("x"))) for i, group in enumerate(groups)]


def test_a_group_is_never_split() -> None:
    parts = split_entries(entries([f"garment {i // 5}" for i in range(500)]), 0.2, 0.2, seed=0)
    groups = [{entry.group_id for entry in part} for part in parts.values()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert 5 * sum(map(len, groups)) == 500


def test_added_photos_leave_the_others_in_their_split() -> None:
    few, many = (split_entries(entries([str(i) for i in range(count)]), 0.1, 0.1, 0) for count in (500, 1000))
    for name in few:
        assert {entry.group_id for entry in few[name]} <= {entry.group_id for entry in many[name]}
    assert abs(len(many["val"]) - 100) < 4 * np.sqrt(1000 * 0.1 * 0.9)  # binomial, 4 sigma


def test_another_seed_is_another_split() -> None:
    first, second = (split_entries(entries([str(i) for i in range(200)]), 0.1, 0.1, seed) for seed in (0, 1))
    assert first["test"] != second["test"]


def test_three_photos_are_enough_and_two_are_not(tmp_path: Path) -> None:
    write_photos(tmp_path / "three", 3)
    assert [len(split) for split in load_photos(config(tmp_path / "three")).values()] == [1, 1, 1]
    write_photos(tmp_path / "two", 2)
    assert "too few different photos (2)" in refusal(tmp_path / "two")


def test_max_images_takes_the_first(tiny_folder: Path) -> None:
    splits = load_photos(config(tiny_folder, max_images=5))
    assert sorted(e.id for split in splits.values() for e in split.entries) == [f"00{i}.png" for i in range(5)]


def test_fingerprint_follows_photo_caption_resolution_and_mirroring(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)

    def fingerprint(resolution: int = 32) -> str:
        cfg = config(tmp_path)
        cfg.resolution = resolution
        return load_photos(cfg)["train"].fingerprint

    first = fingerprint()
    assert fingerprint() == first
    seen = {first, fingerprint(64)}
    photo = Path(load_photos(config(tmp_path))["train"].entries[0].image.name)
    os.utime(photo, ns=(0, 0))  # touched, with the same pixels
    assert fingerprint() == first
    save_photo(photo, seed=99)  # edited
    seen.add(fingerprint())
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"text": "a', '"text": "my'))
    seen.add(fingerprint())
    metadata.write_text(metadata.read_text().replace('"category"', '"mirror": false, "category"'))
    seen.add(fingerprint())
    assert len(seen) == 5


def test_no_root_and_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give data.root"):
        load_photos(DataConfig(name="folder"))
    assert "is not a folder" in refusal(tmp_path / "nowhere")


def test_empty_folder_and_photos_without_captions(tmp_path: Path) -> None:
    assert "holds no photos" in refusal(tmp_path)
    save_photo(tmp_path / "a.png")
    assert "1 photos but no captions" in refusal(tmp_path)
    save_photo(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("a dress")
    assert "b.png has no caption: write b.txt" in refusal(tmp_path)
    (tmp_path / "b.txt").write_text(" \n")
    assert "b.txt is empty" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "gone.png", "text": "a"}', "gone.png is missing (named by"),
        ('{"file_name": "001.png"}', "line 25 has no text"),
        ('{"file_name": "001.png", "text": " "}', "line 25 has no text"),
        ('{"text": "a"}', "line 25 has no file_name"),
        ('{"file_name": ', "line 25 is not JSON"),
        ("[1]", "line 25 must be an object"),
    ],
)
def test_names_the_line_of_the_metadata(tmp_path: Path, line: str, message: str) -> None:
    write_photos(tmp_path, 24)
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write(line)
    assert message in refusal(tmp_path)


def test_metadata_that_lists_nothing_or_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("\n")
    assert "lists no photos" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe{")
    assert "is not UTF-8" in refusal(tmp_path)


def test_names_photos_that_are_none_before_training(tmp_path: Path) -> None:
    write_photos(tmp_path, 4)
    (tmp_path / "images" / "002.png").write_bytes(b"not a photo")
    assert "002.png cannot be read as an image" in refusal(tmp_path)
    (tmp_path / "images" / "002.png").write_bytes(b"")
    assert "002.png is empty" in refusal(tmp_path)


def test_a_few_unusable_files_are_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path, 12, size=(40, 40))
    cut = tmp_path / "images" / "003.png"
    cut.write_bytes(cut.read_bytes()[:2000])  # the header is fine, the pixels end early
    (tmp_path / "images" / "005.png").unlink()
    assert "has 2 unusable of 12 files, a share of 16.7% above" in refusal(tmp_path, max_bad_fraction=0.1)
    splits = load_photos(config(tmp_path, max_bad_fraction=0.2))
    ids = sorted(entry.id for split in splits.values() for entry in split.entries)
    assert len(ids) == 10 and "003.png" not in ids and "005.png" not in ids
    assert "2 files cannot be used" in capsys.readouterr().err
    table = Path("cache/bad_files.csv").read_text()
    assert "003.png,cannot be read as an image (" in table and "005.png,is missing" in table


def test_a_photo_that_breaks_later_is_named_when_it_is_looked_at(tmp_path: Path) -> None:
    write_photos(tmp_path, 3, size=(300, 300))
    train = load_photos(config(tmp_path))["train"]
    photo = Path(train.entries[0].image.name)
    photo.write_bytes(photo.read_bytes()[:5000])
    pair = train[0]  # decodes nothing
    assert pair.caption
    with pytest.raises(ConfigError, match=f"{photo.name} cannot be read"):
        assert pair.image is not None


def test_nothing_is_written_into_the_data(tmp_path: Path) -> None:
    write_photos(tmp_path, 4)
    (tmp_path / "images" / "000.png").write_bytes(b"broken")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    load_photos(config(tmp_path, max_bad_fraction=0.5))
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_kohya_folders_repeat_and_name_their_photos(tmp_path: Path) -> None:
    for number in range(8):
        save_photo(tmp_path / "3_red dress" / f"{number}.png", number)
    (tmp_path / "3_red dress" / "5.txt").write_text("a crimson gown")
    entries = read(config(tmp_path))
    assert [entry.caption for entry in entries] == [*["red dress"] * 5, "a crimson gown", *["red dress"] * 2]
    splits = load_photos(config(tmp_path))
    ids = [entry.id for entry in splits["train"].entries]
    assert len(ids) == 3 * len(set(ids)) and len(splits["val"]) + len(splits["test"]) + len(set(ids)) == 8


@pytest.mark.parametrize("metadata", [True, False])
def test_sibling_folders_are_sources_and_masks(tmp_path: Path, metadata: bool) -> None:
    rows = []
    for number in range(3):
        save_photo(tmp_path / "images" / f"{number}.png", number)
        (tmp_path / "images" / f"{number}.txt").write_text("a dress")
        save_photo(tmp_path / "source" / f"{number}.jpg", number + 10)
        save_photo(tmp_path / "mask" / f"{number}.png", number + 20)
        rows.append({"file_name": f"images/{number}.png", "text": "a dress"})
    if metadata:
        write_rows(tmp_path, rows)
    found = read_entries(config(tmp_path))
    assert [entry.id for entry in found] == [f"images/{number}.png" for number in range(3)]
    assert [Path(entry.source.name).name for entry in found if entry.source] == ["0.jpg", "1.jpg", "2.jpg"]
    assert [Path(entry.mask.name).parent.name for entry in found if entry.mask] == ["mask"] * 3


def test_published_splits_are_kept(tmp_path: Path) -> None:
    write_photos(tmp_path, 20)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    write_rows(tmp_path, [{**row, "split": "test" if i < 5 else "train"} for i, row in enumerate(lines)])
    splits = load_photos(config(tmp_path, val_fraction=0.2))
    assert sorted(entry.id for entry in splits["test"].entries) == [f"00{i}.png" for i in range(5)]
    assert len(splits["train"]) + len(splits["val"]) == 15 and len(splits["val"]) > 0


def test_metadata_may_lie_in_folders_named_after_splits(tmp_path: Path) -> None:
    """The layout of Hugging Face's imagefolder; ids and files are those of the folder."""
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        write_photos(tmp_path / split, count)
        if split == "test":
            (tmp_path / split / "metadata.jsonl").unlink()
            lines = ["file_name,text", *(f'{k:03d}.png,"a hat,\nblue"' for k in range(count))]
            (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
            for number in range(count):
                save_photo(tmp_path / split / "source" / f"{number:03d}.png", number)
    found = read(config(tmp_path))
    assert [entry.split for entry in found] == ["train"] * 6 + ["val"] * 2 + ["test"] * 3
    assert found[6].id == "validation/000.png" and found[6].image.name == str(tmp_path / "validation/images/000.png")
    assert found[8].caption == "a hat,\nblue" and found[8].source is not None and found[0].source is None


def test_a_published_validation_split_is_tested_on_where_there_is_no_test_split() -> None:
    def listed(split: str | None, count: int) -> list[Entry]:
        return [Entry(f"{split}{k}", f"{split}{k}", ("a",), FileBlob(Path("x")), split=split) for k in range(count)]

    parts = split_entries(listed("train", 40) + listed("val", 5), 0.1, 0.1, 0)
    assert {entry.split for entry in parts["test"]} == {"val"} and len(parts["test"]) == 5
    assert {entry.split for entry in parts["val"]} == {"train"}
    only = split_entries(listed("train", 40), 0.1, 0.1, 0)  # a publisher's training split alone is split like others
    assert all(only.values()) and sum(map(len, only.values())) == 40


def test_the_cache_is_never_kept_in_the_data(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    assert "data.cache_dir=" in refusal(tmp_path, cache_dir=str(tmp_path / "cache"))
    (tmp_path.parent / "link").symlink_to(tmp_path, target_is_directory=True)
    assert "which is only read" in refusal(tmp_path, cache_dir=str(tmp_path.parent / "link" / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photos(tmp_path, 3)
    (tmp_path / "metadata.jsonl").unlink()
    scandir = os.scandir

    def refuses(path: Any) -> Any:
        if Path(path).name == "images":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    assert "images cannot be read (Permission denied)" in refusal(tmp_path)


def test_several_captions_and_other_columns(tmp_path: Path) -> None:
    write_photos(tmp_path, 3)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    rows[1] |= {"text": ["one", "two"], "captions": ["two", "three"], "color": "red", "mirror": False}
    write_rows(tmp_path, rows)
    entry = read(config(tmp_path))[1]
    assert entry.captions == ("one", "two", "three")
    assert entry.attributes == {"color": "red"} and not entry.mirror


def test_names_spelled_by_another_system_are_found(tmp_path: Path) -> None:
    save_photo(tmp_path / unicodedata.normalize("NFD", "rób.png"))  # as macOS writes it
    save_photo(tmp_path / "Hat.PNG")
    save_photo(tmp_path / "source" / "HAT.png")
    save_photo(tmp_path / "a.png")
    save_photo(tmp_path / "A.PNG")
    names = [unicodedata.normalize("NFC", "rób.png"), "hat.png", "a.Png", "x" * 300 + ".png"]
    write_rows(tmp_path, [{"file_name": name, "text": "a"} for name in names])
    found = [Path(entry.image.name) for entry in read(config(tmp_path))]
    assert found[0].is_file() and found[1].name == "Hat.PNG"
    source = read(config(tmp_path))[1].source
    assert source is not None and source.name.endswith("HAT.png")
    assert found[2].name == "a.Png"  # could be either: not guessed
    (tmp_path / "source" / "HAT.png").unlink()
    assert "is missing" in refusal(tmp_path)


def test_folders_that_link_in_circles_are_entered_once(tmp_path: Path) -> None:
    write_photos(tmp_path / "real", 3)
    (tmp_path / "real" / "metadata.jsonl").unlink()
    (tmp_path / "real" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    entries = read(config(tmp_path, captions=CaptionConfig(missing="file_name")))
    assert [entry.id for entry in entries] == ["loop.png", *(f"real/images/00{i}.png" for i in range(3))]
    assert "loop.png cannot be read" in refusal(tmp_path, captions=CaptionConfig(missing="file_name"))


def test_enlarged_and_moving_pictures_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(6):
        save_photo(tmp_path / f"{number}.png", number, size=(20, 24) if number < 2 else (40, 20))
    frames = [Image.new("RGB", (64, 64), (k, 0, 0)) for k in (10, 200)]
    frames[0].save(tmp_path / "9.gif", save_all=True, append_images=frames[1:])
    load_photos(config(tmp_path, captions=CaptionConfig(missing="file_name")))
    said = capsys.readouterr().err
    assert "2 of 7 photos are smaller than they are trained at" in said
    assert "1 of 7 photos: animated, 2 frames: the first is used" in said
