"""Shards: read by others, from anywhere, in any order, without holding the index."""

from __future__ import annotations

import json
import shutil
import tarfile
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset as wds
from conftest import write_photos
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.__main__ import data_config
from lora_dae.data.catalog import examine
from lora_dae.data.entry import Entry, RowBlob, pixels_as_file
from lora_dae.data.formats import shards
from lora_dae.data.formats.shards import read_range
from lora_dae.data.photos import Fit, PhotoPairs
from lora_dae.data.sampler import StepBatchSampler
from lora_dae.data.sources import load_photos, load_splits


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """24 photos in shards of 4."""
    write_photos(tmp_path / "photos", 24)
    cfg = DataConfig(name="folder", root=str(tmp_path / "photos"), resolution=32, cache_dir=str(tmp_path / "cache"))
    shards.write(dict(load_photos(cfg)), tmp_path / "shards", per_shard=4)
    return tmp_path


def config(root: object) -> DataConfig:
    return DataConfig(name="shards", root=str(root), resolution=32, cache_dir="unused")


def test_any_record_in_any_order_is_the_photo_that_went_in(written: Path) -> None:
    folder = DataConfig(name="folder", root=str(written / "photos"), resolution=32, cache_dir=str(written / "cache"))
    before, after = load_splits(folder), load_splits(config(written / "shards"))
    assert {name: len(split) for name, split in before.items()} == {name: len(split) for name, split in after.items()}
    for index in (13, 0, 7, 11, 3):
        one, two = before["train"][index], after["train"][index]
        assert (one.id, one.caption, one.category, one.key("image")) == (
            two.id,
            two.caption,
            two.category,
            two.key("image"),
        )
        np.testing.assert_array_equal(one.image, two.image)
    with pytest.raises(IndexError):
        after["train"][len(after["train"])]


def test_object_storage_and_webdataset_read_the_same(written: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(written / "shards"), "/bucket/shards", recursive=True)
    near, far = load_splits(config(written / "shards"))["train"], load_splits(config("memory://bucket/shards"))["train"]
    np.testing.assert_array_equal(far[9].image, near[9].image)
    assert far.fingerprint == near.fingerprint

    tars = [str(path) for path in sorted((written / "shards").glob("train-*.tar"))]
    samples = list(wds.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert len(samples) == len(near)
    words = [json.loads(sample["json"]) for sample in samples]
    assert [row["text"] for row in words] == [near[i].caption for i in range(len(near))]
    photo = next((written / "photos").rglob(words[0]["id"]))
    assert samples[0]["png"] == photo.read_bytes()  # files as they are


def test_shards_of_shards_are_the_same(written: Path) -> None:
    """Files as they are, what may not be mirrored, and the order."""
    metadata = written / "photos" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"category": "dress"', '"category": "dress", "mirror": false'))
    cfg = DataConfig(name="folder", root=str(written / "photos"), resolution=32, cache_dir=str(written / "cache"))
    shards.write(dict(load_photos(cfg)), written / "first")
    shards.write(load_splits(config(written / "first")), written / "second")
    for file in ("train-000000.tar", "train-000000.index.jsonl"):
        assert (written / "second" / file).read_bytes() == (written / "first" / file).read_bytes()
    mirrors = {json.loads(line)["mirror"] for line in (written / "first/train-000000.index.jsonl").open()}
    assert mirrors == {True, False}


def test_what_may_not_be_mirrored_stays_so_and_raw_pixels_become_png(tmp_path: Path) -> None:
    pixels = [np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8) for k in range(2)]
    blobs = [RowBlob(str(k), "1", partial(pixels_as_file, pixels[k])) for k in range(2)]
    entries = [Entry(str(k), str(k), ("a hat",), blobs[k], mirror=k == 1) for k in range(2)]
    pairs = PhotoPairs(entries, [{"image": examine(blob)} for blob in blobs], Fit(32))
    shards.write(dict.fromkeys(("train", "val", "test"), pairs), tmp_path)
    after = load_splits(replace(config(tmp_path), flip=True))["train"]
    assert [after[k].mirror for k in range(2)] == [False, True]
    assert all(np.array_equal(after[k].image, pixels[k]) for k in range(2))
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "json"}


def mixed(root: Path) -> list[tuple[int, int]]:
    """60 photos of three shapes; returns the shapes."""
    root.mkdir(parents=True)
    shapes = [(64, 48), (48, 64), (48, 48)]
    rng = np.random.default_rng(0)
    for k in range(60):
        width, height = shapes[k % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / f"{k:02}.png")
        (root / f"{k:02}.txt").write_text(f"hat {k}")
    return shapes


def test_buckets_are_those_of_the_photos_and_no_index_is_read_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed(tmp_path / "photos")
    buckets = ["32x24", "24x32", "24x24"]
    options: dict[str, Any] = {"resolution": 28, "buckets": buckets, "bucket_step": 8, "cache_dir": str(tmp_path / "c")}
    folder = DataConfig(name="folder", root=str(tmp_path / "photos"), **options)
    shards.write(dict(load_photos(folder)), tmp_path / "shards", per_shard=5)
    before, after = (
        load_splits(folder),
        load_splits(DataConfig(name="shards", root=str(tmp_path / "shards"), **options)),
    )
    train = after["train"]
    assert isinstance(train, shards.ShardPairs)
    asked: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(shards, "read_range", lambda url: asked.append(url) or read_range(url))
        labels = train.size_labels
    assert asked == [f"{tmp_path}/shards/train.sizes.npy"]
    assert labels is not None
    for index, label in enumerate(labels):
        width, height = (int(side) for side in buckets[label].split("x"))
        assert train[index].size == before["train"][index].size == (height, width)
        np.testing.assert_array_equal(train[index].image, before["train"][index].image)
    for name in ("val", "test"):  # drawn in squares, their loss taken as trained
        pairs = after[name]
        assert isinstance(pairs, shards.ShardPairs) and pairs.size_labels is None and pairs[0].size == (28, 28)
        assert pairs.as_trained()[0].size == before[name].as_trained()[0].size  # type: ignore[attr-defined]


def test_shards_that_do_not_tell_sizes_refuse_buckets_only(written: Path) -> None:
    index = written / "shards" / "index.json"
    told = json.loads(index.read_text())
    np.save(written / "shards" / "train.sizes.npy", np.zeros((3, 2), np.uint32))
    train = load_splits(replace(config(written / "shards"), buckets=["auto"]))["train"]
    with pytest.raises(ConfigError, match="sizes of 3 photos, not"):
        assert train.size_labels  # type: ignore[attr-defined]
    for split in told["splits"].values():
        del split["sizes"]
    index.write_text(json.dumps(told))
    assert len(load_splits(config(written / "shards"))["train"])
    with pytest.raises(ConfigError, match="do not tell their photos' sizes, which data.buckets needs: write them anew"):
        load_splits(replace(config(written / "shards"), buckets=["auto"]))


@pytest.mark.parametrize("buckets", [[], ["auto"]])
def test_ten_million_records_open_at_once_and_small(buckets: list[str], tmp_path: Path) -> None:
    """An index of 10,000 shards without any tar: opening and choosing batches must not look into them."""
    split = {"digest": "0", "has_source": False, "has_mask": False, "sizes": "train.sizes.npy"}
    names = [{"file": f"train-{number:06d}.tar", "count": 1000} for number in range(10_000)]
    splits = {"train": split | {"shards": names}, "val": split | {"shards": names[:1]}}
    (tmp_path / "index.json").write_text(json.dumps({"format": 1, "splits": {**splits, "test": splits["val"]}}))
    sides = np.random.default_rng(0).integers(512, 544, (10_000_000, 2), dtype=np.uint16)
    np.save(tmp_path / "train.sizes.npy", sides)
    tracemalloc.start()
    train = load_splits(replace(config(tmp_path), resolution=512, buckets=buckets))["train"]
    assert isinstance(train, shards.ShardPairs) and len(train) == 10_000_000 and len(train.blocks) == 10_000
    assert tracemalloc.get_traced_memory()[1] < 50e6
    sampler = StepBatchSampler(len(train), 8, groups=train.size_labels, blocks=train.blocks, start_step=123_456)
    assert len(next(iter(sampler))) == 8
    assert tracemalloc.get_traced_memory()[1] < 600e6
    tracemalloc.stop()


def test_options_that_shards_cannot_follow_are_refused() -> None:
    with pytest.raises(ConfigError, match="which shards do not have"):
        data_config(["data=shards", "data.root=somewhere", "data.max_images=5"])
    assert data_config(["data=shards", "data.root=somewhere"]).cache == "off"


def test_what_is_no_shard_folder_is_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable index.json"):
        load_splits(config(tmp_path / "nowhere"))
    index = written / "shards" / "index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        load_splits(config(written / "shards"))
    told["splits"]["val"]["shards"] = []
    index.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="no val split"):
        load_splits(config(written / "shards"))
    shutil.rmtree(written / "shards")
