"""LitData sets: written by the library, read by it in any order, and never trusted to run code."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_photos
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.export import export
from lora_dae.data.formats import litdata as layout
from lora_dae.data.sampler import StepBatchSampler
from lora_dae.data.sources import load_photos, load_splits, read_entries

pytest.importorskip("litdata")  # the extra; that it is missing is said: test_a_library_that_is_not_there_is_said
from litdata.streaming import Cache, StreamingDataset  # noqa: E402
from litdata.streaming.serializers import BytesSerializer  # noqa: E402


def config(root: Path, cache: Path, name: str = "litdata") -> DataConfig:
    return DataConfig(name=name, root=str(root), resolution=32, cache_dir=str(cache))


def store(folder: Path, records: list[dict[str, Any]], **options: Any) -> Path:
    """The records as LitData's own writer stores them, 4 a chunk."""
    folder.mkdir(parents=True)
    chunks = Cache(str(folder), chunk_size=4, **options)
    for number, record in enumerate(records):
        chunks[number] = record
    chunks.done()
    chunks.merge()
    return folder


def png(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 64), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """24 photos in a folder and the same as a LitData set."""
    write_photos(tmp_path / "photos", 24)
    export(config(tmp_path / "photos", tmp_path / "cache", "folder"), "litdata", tmp_path / "set")
    return tmp_path


def test_files_come_back_as_they_are(exported: Path) -> None:
    before = load_photos(config(exported / "photos", exported / "cache", "folder"))
    listed = sorted((exported / "set").rglob("*"))
    after = load_photos(config(exported / "set", exported / "cache"))
    for name, split in before.items():
        assert [e.id for e in split.entries] == [e.id for e in after[name].entries]
        assert [f["image"].digest for f in split.facts] == [f["image"].digest for f in after[name].facts]
        assert [e.captions for e in split.entries] == [e.captions for e in after[name].entries]
    for index in (7, 0, 11):
        np.testing.assert_array_equal(after["train"][index].image, before["train"][index].image)
    assert sorted((exported / "set").rglob("*")) == listed  # nothing is written into the data
    theirs = StreamingDataset(str(exported / "set" / "train"), serializers={"image": BytesSerializer()})[3]
    assert bytes(theirs["image"]) == before["train"].entries[3].image.read()
    assert theirs["text"] == before["train"][3].caption


def test_what_others_store_is_read(tmp_path: Path) -> None:
    """Encoded images, raw pixels, bytes; JSON and plain words; one index for all of it."""
    photos = [Image.new("RGB", (40, 40), (k, 0, 9)) for k in range(6)]
    store(
        tmp_path / "set",
        [
            {
                "image": photos[k], "source": png(k), "caption": f"hat {k}", "captions": '["headwear"]', "id": k,
                "attributes": '{"color": "red"}', "fabric": "wool", "group_id": f"g{k}", "category": "hat",
            }
            for k in range(6)
        ],
    )  # fmt: skip
    entries = read_entries(config(tmp_path / "set", tmp_path / "cache"))
    assert [e.id for e in entries] == [str(k) for k in range(6)] and entries[0].split is None
    assert entries[4].captions == ("hat 4", "headwear") and entries[4].category == "hat"
    assert entries[4].attributes == {"color": "red", "fabric": "wool"} and entries[4].group_id == "g4"
    assert Image.open(io.BytesIO(entries[5].image.read())).getpixel((0, 0)) == (5, 0, 9)
    assert entries[3].source is not None and entries[3].source.read() == png(3)
    assert entries[0].mask is None


def test_words_are_read_once_and_follow_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path / "set", tmp_path / "cache")
    store(tmp_path / "set", [{"image": png(k), "text": f"hat {k}"} for k in range(5)])
    first = read_entries(cfg)
    with monkeypatch.context() as patched:
        patched.setattr(layout.Records, "_read", lambda self, row: 1 / 0)  # a second start reads no record
        assert [e.captions for e in read_entries(cfg)] == [e.captions for e in first]
    (tmp_path / "set").rename(tmp_path / "old")
    store(tmp_path / "set", [{"image": png(k), "text": f"coat {k}"} for k in range(7)])
    assert [e.caption for e in read_entries(cfg)] == [f"coat {k}" for k in range(7)]


def test_chunks_from_far_away_are_kept_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, several times over, with room for few of the chunks."""
    noise = np.random.default_rng(0)
    photos = [noise.bytes(50_000) for _ in range(32)]
    folder = store(tmp_path / "set", [{"image": photo, "text": str(k)} for k, photo in enumerate(photos)])
    monkeypatch.setattr(layout, "CACHE_SIZE", "500KB")  # of 1.6 MB
    index = (folder / "index.json").read_bytes()
    records = layout.Records(str(folder), index, tmp_path / "cache")
    records.far = True
    for row in noise.integers(0, 32, 100):
        assert records.file(int(row), "image") == photos[row]
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.bin"))
    assert 0 < kept <= 1_200_000
    assert (tmp_path / "cache" / "index.json").read_bytes() == index


class Bomb:
    """What unpickling it does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_would_run_code_is_refused_before_it_is_read(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    folder = store(tmp_path / "set", [{"image": png(k), "text": "a hat", "extra": Bomb(mark)} for k in range(4)])
    StreamingDataset(str(folder))[0]
    assert mark.exists()  # the library alone would have run it
    mark.unlink()
    with pytest.raises(ConfigError, match="field extra by the serializer pickle"):
        read_entries(config(tmp_path / "set", tmp_path / "cache"))
    index = json.loads((folder / "index.json").read_text())
    for disguise in ("text:pickle", "image:pickle", "graph:pickle", "tensor", "numpy"):
        index["config"]["data_format"] = ["bytes", "str", disguise]
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(ConfigError, match=f"by the serializer {disguise}, which is not read here"):
            read_entries(config(tmp_path / "set", tmp_path / "cache"))
    assert not mark.exists()


def test_an_index_that_names_code_or_other_places_is_refused(tmp_path: Path) -> None:
    folder = store(tmp_path / "set", [{"image": png(k), "text": "a hat"} for k in range(4)])
    good = json.loads((folder / "index.json").read_text())
    version, spec = json.loads(good["config"]["data_spec"])
    factory = {
        "default_factory_module": "antigravity",
        "default_factory_name": "fly",
        "dict_context": ["image", "text"],
    }
    imports = [version, {**spec, "type": "collections.defaultdict", "context": json.dumps(factory)}]
    changes: dict[str, dict[str, Any]] = {
        "no plain dict": {"config": {**good["config"], "data_spec": json.dumps(imports)}},
        r"chunk \.\./x": {"chunks": [{**good["chunks"][0], "filename": "../x"}]},
        "encrypted": {"config": {**good["config"], "encryption": {"algorithm": "fernet", "level": "sample"}}},
        "no index of a LitData set": {"config": {}},
    }
    for said, change in changes.items():
        (folder / "index.json").write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match=said) as caught:
            read_entries(config(tmp_path / "set", tmp_path / "cache"))
        assert "\n" not in str(caught.value)


def test_the_sampler_reads_few_chunks_at_a_time(tmp_path: Path) -> None:
    store(tmp_path / "set" / "train", [{"image": png(k), "text": f"hat {k}"} for k in range(60)])
    for split in ("val", "test"):
        store(
            tmp_path / "set" / split, [{"image": png(k + 100 + 50 * (split == "val")), "text": "hat"} for k in range(2)]
        )
    train = load_splits(config(tmp_path / "set", tmp_path / "cache"))["train"]
    blocks = getattr(train, "blocks", None)
    assert blocks == [4] * 15
    sampler = StepBatchSampler(len(train), 4, blocks=blocks)
    flat = sum((sampler.numbers(step) for step in range(15)), [])
    assert sorted(flat) == list(range(60)) and len({i // 4 for i in flat[:32]}) == 8
