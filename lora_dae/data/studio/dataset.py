"""The studio as a data set: rendered once, in parallel, into memory-mapped arrays; then read."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

import cv2
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dae.config import DIFFICULTIES, ConfigError
from lora_dae.data.pair import Lazy, Pair
from lora_dae.data.studio.attributes import draw_look, stream
from lora_dae.data.studio.captions import caption
from lora_dae.data.studio.scene import photo, source_photo

RENDERER_VERSION = 3  # raise it when a change moves pixels: old caches are then left alone
# Splits are ranges of indices far apart, so they can never share an item.
SPLIT_START = {"train": 0, "val": 10_000_000, "test": 20_000_000}
_CHUNK = 16


_Rendered = tuple[int, np.ndarray, np.ndarray, np.ndarray | None]


def _render(job: tuple[str, int, int, int, int, str, bool]) -> _Rendered:
    """Worker: render items first .. first + count - 1."""
    domain, seed, first, count, resolution, difficulty, sources = job
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    images = np.empty((count, resolution, resolution, 3), np.uint8)
    masks = np.empty((count, resolution, resolution), np.uint8)
    froms = np.empty_like(images) if sources else None
    for k in range(count):
        index = first + k
        look = draw_look(seed, index, domain)
        shot = photo(look, seed, index, resolution)
        images[k], masks[k] = shot.image, shot.mask
        if froms is not None:
            froms[k] = source_photo(look, seed, index, resolution, difficulty).image
    cv2.setNumThreads(threads)
    return first, images, masks, froms


class StudioDataset:
    """Items of one split of one domain of the procedural studio.

    domain: ``base`` (single photos, for the backbone) or ``target`` (pairs of a mannequin photo and a
    model photo of the same garment). Rendering takes place on construction unless the cache has it.
    """

    has_mask = True

    def __init__(
        self, cache_dir: str | Path, domain: str, split: str, size: int, seed: int = 0, resolution: int = 128,
        difficulty: str = "aligned", workers: int | None = None,
    ):  # fmt: skip
        if difficulty not in DIFFICULTIES:
            raise ConfigError(f"data.difficulty={difficulty!r} is unknown: choose one of {', '.join(DIFFICULTIES)}.")
        self.domain, self.seed, self.size, self.resolution, self.difficulty = (
            domain,
            seed,
            size,
            resolution,
            difficulty,
        )
        self.start = SPLIT_START[split]
        self.has_source = domain == "target"
        if not self.has_source:
            difficulty = "none"
        key = f"v{RENDERER_VERSION}-{domain}-{split}-{size}-seed{seed}-{resolution}px-{difficulty}"
        # The same item is the same pixels, however many there are beside it.
        self.key = f"studio-v{RENDERER_VERSION}-{domain}-seed{seed}-{resolution}px-{difficulty}"
        self.fingerprint = hashlib.sha256(key.encode()).hexdigest()
        self.directory = Path(cache_dir) / "studio" / key
        if not self.directory.exists():
            self._render_all(workers or os.cpu_count() or 1, f"rendering {domain}/{split}")
        self.images = np.load(self.directory / "images.npy", mmap_mode="r")
        self.masks = np.load(self.directory / "masks.npy", mmap_mode="r")
        self.sources = np.load(self.directory / "sources.npy", mmap_mode="r") if self.has_source else None

    def _render_all(self, workers: int, title: str) -> None:
        """Render into a folder of another name and rename it, so that a killed run leaves no half cache.

        A name that nobody had: in a container a process has the number of the killed one.
        """
        parent = self.directory.parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{self.directory.name}.partial", dir=parent) as own:
            partial = Path(own) / "arrays"  # the folder around it is closed to other users
            partial.mkdir()
            self._render_into(partial, workers, title)
            with suppress(OSError):  # another process finished first: its pictures are the same
                partial.rename(self.directory)

    def _render_into(self, partial: Path, workers: int, title: str) -> None:
        n, r = self.size, self.resolution

        def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
            return np.lib.format.open_memmap(partial / name, mode="w+", dtype=np.uint8, shape=shape)

        images, masks = array("images.npy", (n, r, r, 3)), array("masks.npy", (n, r, r))
        sources = array("sources.npy", (n, r, r, 3)) if self.has_source else None
        jobs = [
            (self.domain, self.seed, self.start + k, min(_CHUNK, n - k), r, self.difficulty, self.has_source)
            for k in range(0, n, _CHUNK)
        ]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(*columns))
            rendered: Iterable[_Rendered] = map(_render, jobs)
            if len(jobs) > 1:  # to start a process takes longer than a few pictures do
                # spawn: forking a process that already runs torch's threads can deadlock.
                pool = multiprocessing.get_context("spawn").Pool(min(workers, len(jobs)))
                rendered = stack.enter_context(pool).imap_unordered(_render, jobs)
            task = progress.add_task(title, total=n)
            for first, some, mask, froms in rendered:
                at = slice(first - self.start, first - self.start + len(some))
                images[at], masks[at] = some, mask
                if sources is not None:
                    sources[at] = froms
                progress.advance(task, len(some))
        for out in (images, masks, sources):
            if out is not None:
                out.flush()  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return self.size

    def caption(self, i: int) -> str:
        """The caption alone, without reading a picture."""
        index = self.start + i
        return caption(draw_look(self.seed, index, self.domain), stream(self.seed, index, "caption"))

    def attributes(self, i: int) -> dict[str, str]:
        """The known attributes alone, without reading a picture."""
        return draw_look(self.seed, self.start + i, self.domain).words()

    def __getitem__(self, i: int) -> Pair:
        if not 0 <= i < self.size:
            raise IndexError(i)
        words = self.attributes(i)
        return Pair(
            id=f"{self.domain}-{self.start + i}",
            group_id=f"{self.domain}-{self.start + i}",
            caption=self.caption(i),
            image=self._pixels(self.images, "image", i),
            source=None if self.sources is None else self._pixels(self.sources, "source", i),
            mask=self._pixels(self.masks, "mask", i),
            category=words["garment"],
            attributes=words,
        )

    def _pixels(self, array: np.ndarray, part: str, i: int) -> Lazy:
        return Lazy(lambda: np.array(array[i]), array.shape[1:], f"{self.key}-{self.start + i}-{part}")
