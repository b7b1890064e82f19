"""Memory stays where it is, however many passes a run takes over its data."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_photos
from test_data_cache import Encoders, Pairs, build

from lora_dae.config import DataConfig
from lora_dae.data.cache import LivePairs
from lora_dae.data.formats import shards
from lora_dae.data.sampler import StepBatchSampler
from lora_dae.data.sources import load_photos, load_splits

Batch = Callable[[list[int]], object]
SIDE = 160


def passes(read: Batch, size: int, first: int, last: int) -> None:
    """Passes ``first`` to ``last`` - 1 over ``size`` samples."""
    sampler = StepBatchSampler(size, 8)
    for step in range(first * size // 8, last * size // 8):
        read(sampler.numbers(step))


def resident() -> int:
    """Bytes of this process in memory, whoever allocated them."""
    statm = Path("/proc/self/statm")  # Linux
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """64 photos whose pixels are 77 kB each, as they are trained."""
    root = tmp_path_factory.mktemp("memory")
    write_photos(root / "photos", 64, (SIDE, SIDE))
    return DataConfig(
        name="folder", root=str(root / "photos"), resolution=SIDE, cache_dir=str(root / "cache"), flip=True
    )


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_photos_are_let_go_when_they_were_seen(kind: str, folder: DataConfig, tmp_path: Path) -> None:
    """Seven passes decode 30 MB: next to nothing of it stays allocated, by Python and numpy or by Pillow."""
    if kind == "folder":
        train = load_photos(folder)["train"]
    else:
        shards.write(dict(load_photos(folder)), tmp_path / "shards", per_shard=1)  # more of them than are kept open
        train = load_splits(DataConfig(name="shards", root=str(tmp_path / "shards"), resolution=SIDE))["train"]
        assert len(train.blocks) > shards.OPEN_SHARDS
    encoders = Encoders()
    live = LivePairs(train, encoders.encode_images, encoders.encode_text, masks=False, views=True)
    passes(live.__getitems__, len(live), 0, 2)
    tracemalloc.start()
    before, outside = tracemalloc.get_traced_memory()[0], resident()
    passes(live.__getitems__, len(live), 2, 9)
    grown, outside = tracemalloc.get_traced_memory()[0] - before, resident() - outside
    tracemalloc.stop()
    decoded = 7 * len(live) * SIDE * SIDE * 3
    assert grown < 0.02 * decoded and outside < 0.5 * decoded


def test_reading_a_cache_keeps_nothing(tmp_path: Path) -> None:
    cache = build(Pairs(512), tmp_path, Encoders(0.5))
    passes(cache.__getitems__, 512, 0, 2)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    passes(cache.__getitems__, 512, 2, 32)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    read = 30 * 512 * sum(value.numel() * 4 for value in cache[0].values())
    assert grown < 0.03 * read
