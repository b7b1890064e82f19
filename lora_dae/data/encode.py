"""Photos to arrays in batches: threads decode the next batch while the encoder works on the present one."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.data.pair import PairDataset
from lora_dae.data.store import DTYPE, Arrays

BATCH_SIZE = 32
DECODERS = min((os.cpu_count() or 1) + 1, 16)  # threads: Pillow and torch work without Python's lock
# Seconds after which a thread has to hand Python's lock on. By default 5 ms: as long as a photo takes from end to end.
_SWITCH_INTERVAL = 0.0005

EncodeImages = Callable[[np.ndarray], tuple[Tensor, Tensor]]


def decoded(
    pixels: Callable[[int], np.ndarray], batches: Iterable[Sequence[int]]
) -> Iterator[tuple[Sequence[int], np.ndarray]]:
    """Each batch and its pixels stacked, uint8 (N, H, W, 3); threads decode the next while the caller works on one."""
    with _decoders() as pool:
        coming: tuple[Sequence[int], Iterator[np.ndarray]] | None = None
        for batch in batches:
            following = batch, pool.map(pixels, batch)
            if coming is not None:
                yield coming[0], np.stack(list(coming[1]))
            coming = following
        if coming is not None:
            yield coming[0], np.stack(list(coming[1]))


@contextmanager
def _decoders() -> Iterator[ThreadPoolExecutor]:
    """Threads that scale their photos alone, not each with as many threads as there are cores."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        with ThreadPoolExecutor(DECODERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)  # new threads start with what was set last, wherever that was


class Maker:
    """Turns rows of one part (image, source or mask) into arrays: the ``Make`` of a store."""

    def __init__(
        self,
        dataset: PairDataset,
        rows: list[int],
        part: str,
        mirrored: bool,
        encode_images: EncodeImages,
        latent_size: tuple[int, int] | None,
    ) -> None:
        self.dataset, self.rows, self.part, self.mirrored = dataset, rows, part, mirrored
        self.encode_images, self.latent_size = encode_images, latent_size

    def __call__(self, chunks: Iterator[list[int]]) -> Iterator[Arrays]:
        """The arrays of each chunk. The next chunk is begun before the last batch of this one is encoded."""
        ends: deque[int] = deque()

        def batches() -> Iterator[list[int]]:
            for chunk in chunks:
                ends.append(chunk[-1])
                for start in range(0, len(chunk), BATCH_SIZE):
                    yield chunk[start : start + BATCH_SIZE]

        made: list[Arrays] = []
        for batch, pixels in decoded(self._pixels, batches()):
            made.append(self._encode(pixels, batch))
            if batch[-1] == ends[0]:
                yield {name: np.concatenate([arrays[name] for arrays in made]) for name in made[0]}
                ends.popleft()
                made.clear()

    def _pixels(self, position: int) -> np.ndarray:
        pair = self.dataset[self.rows[position]]
        return np.ascontiguousarray(getattr(pair.mirrored() if self.mirrored else pair, self.part))

    def _encode(self, pixels: np.ndarray, positions: Sequence[int]) -> Arrays:
        if self.part == "mask":
            assert self.latent_size is not None
            return {"mask": shrink_masks(pixels, self.latent_size)}
        mean, std = self.encode_images(pixels)
        arrays = {"mean": half(mean), "std": half(std)}
        finite = np.isfinite(arrays["mean"]).reshape(len(pixels), -1).all(axis=1)
        if not finite.all():
            pair = self.dataset[self.rows[positions[int(np.argmin(finite))]]]
            raise ConfigError(
                f"the VAE's latents of the {self.part} of {pair.id} are not finite in half precision: look at that "
                "photo, or use a backbone whose VAE has a sane scaling factor."
            )
        return arrays


def half(values: Tensor) -> np.ndarray:
    with np.errstate(over="ignore"):  # said by the caller
        return values.detach().float().cpu().numpy().astype(DTYPE)


def shrink_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks, uint8 (N, H, W) of 0 and 255, as shares of covered area in [0, 1], float16 (N, 1, h, w)."""
    height, width = size
    shares = [cv2.resize(m.astype(np.float32) / 255, (width, height), interpolation=cv2.INTER_AREA) for m in masks]
    return np.stack(shares)[:, None].astype(DTYPE)
