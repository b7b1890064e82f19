"""Rows of numbers by key, in a few large files: what latents and text embeddings are cached in.

    <chunk>.<array>.npy    (n, ...) float16, memory-mapped; n is at most CHUNK
    <chunk>.index.npy      (n,) of the rows' keys (128 bits) and checksums, written last: with it a chunk is complete

Rows are found by key alone, so an edited photo is one new row and the others stay. Any number of processes, of one
run or of several, may fill a store at once: each takes a chunk that nobody works on (a file lock, which the system
drops with a killed process) and leaves those that are complete. A killed run loses the chunks it was writing.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from lora_dae.config import ConfigError
from lora_dae.data.catalog import say_once

CHUNK = 256  # rows a file: a multiple of the encoding batch
OPEN_FILES = 256
DTYPE = np.float16
Arrays = dict[str, np.ndarray]
# Gets the chunks that are free, each as positions in the keys, and gives the arrays of each. It may ask for the next
# chunk before it has given the last, to have something to work on meanwhile.
Make = Callable[[Iterator[list[int]]], Iterator[Arrays]]


@dataclass(frozen=True)
class _Chunk:
    """One that this process has taken; without a lock in memory."""

    name: str
    keys: list[str]
    lock: FileLock | None

    def release(self) -> None:
        if self.lock is not None:
            self.lock.release()


class RowStore:
    """A folder of chunks, or, without a folder, the same in memory.

    Every row of a store has arrays of the same names; an array that is zero throughout a chunk is not kept.
    Rows of different shapes may lie in one store but are read separately.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._memory: dict[str, Arrays] = {}
        self._chunks: list[str] = []  # only ever grows, so that a place stays valid
        self._indices: list[np.ndarray] = []
        self._verified: list[np.ndarray] = []
        self._array = lru_cache(maxsize=OPEN_FILES)(self._open_array)
        if directory is not None:
            try:
                (directory / "locks").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(directory, error) from error
        self._refresh()

    def fill(self, keys: Sequence[str], make: Make, done: Callable[[int], None] = lambda rows: None) -> None:
        """Makes the rows of ``keys`` that are missing; what ``make`` has given is written while it makes the next.

        All rows that one call makes have the same shapes. ``done`` is told how many rows were just made or found.
        Raises ConfigError where the folder cannot be written to, and what ``make`` raises.
        """
        self._refresh()
        there = self.locate(keys) >= 0
        done(int(there.sum()))
        first = {key: position for position, key in reversed(list(enumerate(keys))) if not there[position]}
        missing = sorted(first.values())
        pending = [missing[start : start + CHUNK] for start in range(0, len(missing), CHUNK)]
        while pending:
            left = self._fill_free(pending, keys, make, done)
            if len(left) == len(pending):
                time.sleep(0.1)  # others work on all that is left
            pending = left
        self._refresh()

    def _fill_free(
        self, pending: list[list[int]], keys: Sequence[str], make: Make, done: Callable[[int], None]
    ) -> list[list[int]]:
        """Makes and writes what nobody else works on; the other chunks come back."""
        left: list[list[int]] = []
        taken: deque[_Chunk] = deque()

        def free() -> Iterator[list[int]]:
            for positions in pending:
                chunk = self._take([keys[p] for p in positions])
                if chunk is None:
                    left.append(positions)
                elif self._index(chunk.name) is not None:
                    chunk.release()
                    done(len(positions))
                else:
                    taken.append(chunk)
                    yield positions

        def write(chunk: _Chunk, arrays: Arrays) -> None:
            try:
                self._write(chunk.name, chunk.keys, arrays)
            finally:
                chunk.release()
            done(len(chunk.keys))

        try:
            with ThreadPoolExecutor(1) as writer:
                writing: Future[None] | None = None
                for arrays in make(free()):
                    if writing is not None:
                        writing.result()  # a full disk is known one chunk later, and no more than two are in memory
                    writing = writer.submit(write, taken.popleft(), arrays)
                if writing is not None:
                    writing.result()
        finally:
            for chunk in taken:  # begun and given up
                chunk.release()
        return left

    def _take(self, keys: list[str]) -> _Chunk | None:
        """The chunk of ``keys``, locked; None if another process works on it."""
        name = hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()
        if self.directory is None:
            return _Chunk(name, keys, None)
        # Few lock files for any number of chunks: two chunks of one lock merely wait for each other. Not bound to a
        # thread, since the one that writes gives it back.
        lock = FileLock(self.directory / "locks" / f"{name[:2]}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise _unwritable(self.directory, error) from error
        return _Chunk(name, keys, lock)

    def _write(self, name: str, keys: list[str], arrays: Arrays) -> None:
        arrays = {k: np.ascontiguousarray(v, DTYPE) for k, v in arrays.items() if v.any() or k == next(iter(arrays))}
        fields: list[tuple[str, type]] = [("high", np.uint64), ("low", np.uint64)]
        index = np.empty(len(keys), [*fields, *((array, np.uint32) for array in arrays)])
        index["high"], index["low"] = _halves(keys)
        for array, rows in arrays.items():
            index[array] = [zlib.crc32(row.tobytes()) for row in rows]
        if self.directory is None:
            self._memory[name] = {"index": index, **arrays}
            return
        try:
            for array, rows in arrays.items():
                np.save(self.directory / f"{name}.{array}.npy", rows)
            partial = self.directory / f"{name}.partial.npy"
            np.save(partial, index)
            os.replace(partial, self.directory / f"{name}.index.npy")
        except OSError as error:
            raise _unwritable(self.directory, error) from error

    def _refresh(self) -> None:
        """Reads the indices of the chunks that have become complete."""
        if self.directory is None:
            found = {name: arrays["index"] for name, arrays in self._memory.items()}
            new = {name: index for name, index in found.items() if name not in self._chunks}
        else:
            known = set(self._chunks)
            names = [file.name.partition(".")[0] for file in sorted(self.directory.glob("*.index.npy"))]
            read = {name: self._index(name) for name in names if name not in known}
            new = {name: index for name, index in read.items() if index is not None}
        for name, index in new.items():
            self._chunks.append(name)
            self._indices.append(index)
            self._verified.append(np.zeros(len(index), bool))
        empty = np.empty(0, np.uint64)
        high = np.concatenate([empty, *(index["high"] for index in self._indices)])
        order = np.argsort(high, kind="stable")
        self._high = high[order]
        self._low = np.concatenate([empty, *(index["low"] for index in self._indices)])[order]
        places = (chunk * CHUNK + np.arange(len(index)) for chunk, index in enumerate(self._indices))
        self._places = np.concatenate([np.empty(0, np.int64), *places])[order]

    def _index(self, name: str) -> np.ndarray | None:
        """The index of a chunk on disk; None where there is none, or none that can be read: it is not complete."""
        if self.directory is None:
            return None
        file = self.directory / f"{name}.index.npy"
        try:
            found: np.ndarray = np.load(file)
        except FileNotFoundError:
            return None
        except (EOFError, ValueError) as error:  # what a power cut leaves
            say_once(f"{file} cannot be read ({error}): its rows are made anew")
            return None
        return found

    def locate(self, keys: Sequence[str]) -> np.ndarray:
        """The place of each key's row, int64, for ``read`` from now on; -1 where there is none."""
        if not len(self._high):
            return np.full(len(keys), -1, np.int64)
        high, low = _halves(keys)
        at = np.minimum(np.searchsorted(self._high, high), len(self._high) - 1)
        return np.where((self._high[at] == high) & (self._low[at] == low), self._places[at], -1)

    def read(self, array: str, places: np.ndarray) -> np.ndarray:
        """float32 (N, ...): that array of the rows at ``places``; zeros where a chunk does not keep it.

        Raises ConfigError, naming the file, if a row is not what was written (checked once a row and process).
        """
        out = []
        for place in places.tolist():
            chunk, row = divmod(place, CHUNK)
            if not self._verified[chunk][row]:
                self._verify(chunk, row)
                self._verified[chunk][row] = True
            arrays = self._arrays(chunk)
            kept = array in arrays
            found = self._array(chunk, array if kept else arrays[0])[row]
            out.append(found if kept else np.zeros_like(found))
        stacked: np.ndarray = torch.from_numpy(np.stack(out)).float().numpy()  # NumPy's half precision is slow
        return stacked

    def _arrays(self, chunk: int) -> tuple[str, ...]:
        """The names of a chunk's arrays, the one that is always kept first."""
        return (self._indices[chunk].dtype.names or ())[2:]

    def _verify(self, chunk: int, row: int) -> None:
        for array in self._arrays(chunk):
            if zlib.crc32(self._array(chunk, array)[row].tobytes()) != self._indices[chunk][array][row]:
                raise ConfigError(
                    f"row {row} of {self.directory}/{self._chunks[chunk]}.{array}.npy is damaged: delete the files "
                    f"{self._chunks[chunk]}.*, and they are made anew."
                )

    def _open_array(self, chunk: int, array: str) -> np.ndarray:
        name = self._chunks[chunk]
        if self.directory is None:
            return self._memory[name][array]
        try:
            return np.load(self.directory / f"{name}.{array}.npy", mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.directory / name}.{array}.npy cannot be read ({error}): delete the files {name}.*, and they "
                "are made anew."
            ) from error


def _halves(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
    both = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _unwritable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(f"cannot write to the cache folder {directory} ({error.strerror or error}): set data.cache_dir.")
