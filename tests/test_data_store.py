"""Rows by key: shared by processes, safe against kills, checked when read."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_dae.config import ConfigError
from lora_dae.data.store import CHUNK, RowStore

KEYS = [f"key {number}" for number in range(3 * CHUNK)]


def value(key: str) -> np.ndarray:
    return np.full((2, 3), float(key.split()[1]) / 8, np.float16)


def fill(directory: Path, log: Path, pause: float = 0.0, keys: list[str] = KEYS) -> RowStore:
    """Fills a store and writes down what it had to make."""

    def make(chunks: Iterator[list[int]]) -> Iterator[dict[str, np.ndarray]]:
        for positions in chunks:
            with log.open("a") as file:
                file.write("".join(f"{keys[p]}\n" for p in positions))
            time.sleep(pause)
            yield {"mean": np.stack([value(keys[p]) for p in positions])}

    store = RowStore(directory)
    store.fill(keys, make)
    return store


def check(store: RowStore) -> None:
    some = [KEYS[k] for k in (700, 3, 255, 256, 3)]
    np.testing.assert_array_equal(store.read("mean", store.locate(some)), np.stack([value(k) for k in some]))
    assert store.locate(["never written"]).tolist() == [-1]


def test_rows_come_back_by_key(tmp_path: Path) -> None:
    check(fill(tmp_path / "store", tmp_path / "log"))
    check(RowStore(tmp_path / "store"))
    files = [p for p in (tmp_path / "store").iterdir() if p.is_file()]
    assert len(files) == 2 * 3  # an array and an index for each chunk, not a file for each row


def test_processes_share_the_work_and_make_nothing_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "store", tmp_path / "log", 0.2)
    workers = [context.Process(target=fill, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert sorted((tmp_path / "log").read_text().split("\n")[:-1]) == sorted(KEYS)
    check(RowStore(tmp_path / "store"))


class Held(RowStore):
    """Writes its first chunk when it is let."""

    def __init__(self, directory: Path | None) -> None:
        super().__init__(directory)
        self.go, self.waited = threading.Event(), True

    def _write(self, *arguments: Any) -> None:
        self.waited = self.go.wait(30) and self.waited
        super()._write(*arguments)


@pytest.mark.parametrize("kept", ["disk", "memory"])
def test_a_chunk_is_written_while_the_next_is_made(tmp_path: Path, kept: str) -> None:
    store = Held(tmp_path / "store" if kept == "disk" else None)

    def make(chunks: Iterator[list[int]]) -> Iterator[dict[str, np.ndarray]]:
        for number, chunk in enumerate(chunks):
            if number == 1:
                store.go.set()
            yield {"mean": np.stack([value(KEYS[p]) for p in chunk])}

    store.fill(KEYS, make)
    assert store.waited
    check(store)


def test_a_full_disk_stops_the_work_and_leaves_no_lock(tmp_path: Path) -> None:
    """One chunk later at most; others can go on at once."""

    class Full(RowStore):
        def _write(self, *_: Any) -> None:
            raise ConfigError("cannot write to the cache folder")

    made = 0

    def make(chunks: Iterator[list[int]]) -> Iterator[dict[str, np.ndarray]]:
        nonlocal made
        for chunk in chunks:
            made += 1
            yield {"mean": np.stack([value(KEYS[p]) for p in chunk])}

    with pytest.raises(ConfigError, match="cannot write"):
        Full(tmp_path / "store").fill(KEYS, make)
    assert made <= 2
    check(fill(tmp_path / "store", tmp_path / "log"))


def test_a_killed_process_loses_one_chunk_and_holds_nobody_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=fill, args=(tmp_path / "store", tmp_path / "log", 0.5))
    worker.start()
    while not list((tmp_path / "store").glob("*.index.npy")):
        time.sleep(0.01)
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    complete = len(list((tmp_path / "store").glob("*.index.npy")))
    check(fill(tmp_path / "store", tmp_path / "second"))
    assert len((tmp_path / "second").read_text().splitlines()) == len(KEYS) - complete * CHUNK


def test_another_list_adds_only_what_is_new(tmp_path: Path) -> None:
    fill(tmp_path / "store", tmp_path / "first", keys=KEYS[:300])
    store = fill(tmp_path / "store", tmp_path / "second", keys=[KEYS[400], *KEYS[100:350], KEYS[400]])
    assert (tmp_path / "second").read_text().splitlines() == [KEYS[400], *KEYS[300:350]]
    assert (store.locate(KEYS[:350]) >= 0).all()


def test_places_stay_valid_when_rows_are_added(tmp_path: Path) -> None:
    """Several splits share a store: what one has located must survive what the next one adds."""
    for directory in (tmp_path / "store", None):
        store = RowStore(directory)

        def add(keys: list[str], store: RowStore = store) -> None:
            store.fill(keys, lambda chunks: ({"mean": np.stack([value(keys[p]) for p in chunk])} for chunk in chunks))

        add(KEYS[:20])
        places = store.locate(KEYS[:20])
        add(KEYS[20:600])
        np.testing.assert_array_equal(store.read("mean", places), np.stack([value(k) for k in KEYS[:20]]))


def test_damage_is_found_when_the_row_is_read(tmp_path: Path) -> None:
    store = fill(tmp_path / "store", tmp_path / "log")
    for file in (tmp_path / "store").glob("*.mean.npy"):
        data = bytearray(file.read_bytes())
        data[-3] ^= 1  # in the last row of each chunk
        file.write_bytes(data)
    store = RowStore(tmp_path / "store")
    store.read("mean", store.locate(KEYS[:3]))
    with pytest.raises(ConfigError, match="is damaged: delete the files"):
        store.read("mean", store.locate(KEYS[CHUNK - 1 : CHUNK]))


@pytest.mark.parametrize("kept", ["nothing", "zeros", "half"])
def test_a_chunk_whose_index_a_power_cut_took_is_made_anew(
    kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It alone; such files are empty, zeros or cut off, though they were renamed to what they are."""
    fill(tmp_path / "store", tmp_path / "first")
    index = min((tmp_path / "store").glob("*.index.npy"))
    data = index.read_bytes()
    index.write_bytes({"nothing": b"", "zeros": bytes(len(data)), "half": data[: len(data) // 2]}[kept])
    check(fill(tmp_path / "store", tmp_path / "second"))
    assert len((tmp_path / "second").read_text().splitlines()) == CHUNK
    assert f"{index.name} cannot be read" in capsys.readouterr().err.replace("\n", "")
    check(RowStore(tmp_path / "store"))


def test_a_disk_that_is_full_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's own error of it has words and no number, so the system has no name for it."""

    def full(*_: Any) -> None:
        raise OSError("768 requested and 0 written")

    store = RowStore(tmp_path / "store")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(ConfigError, match="768 requested and 0 written"):
        store.fill(KEYS[:2], lambda chunks: ({"mean": np.stack([value(KEYS[p]) for p in chunk])} for chunk in chunks))


def test_arrays_of_zeros_are_not_kept(tmp_path: Path) -> None:
    store = RowStore(tmp_path)
    arrays = {"mean": np.ones((2, 4), np.float16), "std": np.zeros((2, 4), np.float16)}
    store.fill(["a", "b"], lambda chunks: (arrays for _ in chunks))
    assert not list(tmp_path.glob("*.std.npy"))
    assert store.read("std", store.locate(["b", "a"])).tolist() == [[0.0] * 4] * 2


def test_the_index_is_small(tmp_path: Path) -> None:
    """The index of many rows is arrays, not objects: about 50 bytes a row."""
    store = RowStore(None)
    keys = [f"key {n}" for n in range(20_000)]
    store.fill(keys, lambda chunks: ({"mean": np.ones((len(chunk), 1), np.float16)} for chunk in chunks))
    held = sum(a.nbytes for a in (store._high, store._low, store._places, *store._indices, *store._verified))
    assert held <= 50 * len(keys)
    assert (store.locate(keys) >= 0).all() and store.locate(["no"]).tolist() == [-1]
