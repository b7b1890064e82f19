"""Latents and text embeddings kept, so that VAE and text encoder stay out of the training loop.

    <cache_dir>/<VAE>/images     mean and std of the VAE's posterior, of photos and source photos, scaled as the UNet
                                 sees latents; std only where it is not zero (AutoencoderTiny)
    <cache_dir>/<VAE>/masks      garment masks at the latents' size
    <cache_dir>/<text>/texts     every different caption once

``<VAE>`` and ``<text>`` name the weights, the precision and this file's version. A row's key is the content of its
pixels (file bytes, crop, bucket, mirroring) or the caption: editing one photo encodes that one again, editing a caption
that caption, and changing the UNet nothing. Mean and deviation are kept rather than one draw, so that every epoch can
draw anew. ``store.py`` has the files.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from lora_dae.config import ConfigError
from lora_dae.data.encode import BATCH_SIZE, DECODERS, EncodeImages, Maker, half, shrink_masks
from lora_dae.data.pair import Pair, PairDataset
from lora_dae.data.store import DTYPE, Arrays, RowStore

FORMAT = 2  # raise it when the meaning of the rows changes

EncodeText = Callable[[list[str]], Tensor]


class LatentCache(Dataset[dict[str, Tensor]]):
    """The encoded pairs of one split as a torch data set.

    An item holds ``index`` (int64 scalar), ``latent_mean`` and ``latent_std`` (C, h, w) float32, ``text``
    (L, D) float32, ``size_ids`` (6,) float32 (``Pair.size_ids``), for pairs ``source`` (C, h, w) float32 and where
    asked for ``mask`` (1, h, w) in [0, 1]. A list of numbers given at once (``__getitems__``, which torch's DataLoader
    calls) comes back as one batch of the same with a leading N; all of them must have the same size.

    Number i + k * len stands for sample i in pass k: passes go through its captions and, if it may be mirrored,
    both orientations in turn. Without ``views`` it is always the first caption, as it is.
    """

    def __init__(self, records: list[_Record], images: RowStore, texts: RowStore, masks: RowStore | None) -> None:
        self.images, self.texts, self.masks = images, texts, masks
        self.ids = [record.id for record in records]
        self.captions = [record.captions[0] for record in records]
        self.sizes = [record.size for record in records]
        self._size_ids = torch.tensor([record.size_ids for record in records], dtype=torch.float32)
        self._first = np.cumsum([0, *(len(record.captions) for record in records)])
        self._mirrors = np.array([record.mirror for record in records], dtype=bool)
        self._offset = np.array([_offset(id) for id in self.ids], dtype=np.int64)
        self._text = _found(texts, [caption for record in records for caption in record.captions], "captions")
        self._image = _places(images, records, "image")
        self._source = _places(images, records, "source") if records[0].keys["source"][0] else None
        self._mask = None if masks is None else _places(masks, records, "mask")
        self.null_text = torch.from_numpy(texts.read("text", texts.locate([""]))[0])  # (L, D), of the empty caption

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([number]).items()}

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        passes, rows = np.divmod(np.asarray(numbers, dtype=np.int64), len(self))
        captions = self._first[rows + 1] - self._first[rows]
        chosen = zip(passes, self._offset[rows], captions, self._mirrors[rows], strict=True)
        view = np.array([choose_view(int(n), int(o), int(c), bool(m)) for n, o, c, m in chosen], dtype=np.int64)
        text, turned = self._first[rows] + view % captions, view // captions
        places = self._image[rows, turned]
        batch = {
            "index": torch.from_numpy(rows),
            "latent_mean": torch.from_numpy(self.images.read("mean", places)),
            "latent_std": torch.from_numpy(self.images.read("std", places)),
            "text": torch.from_numpy(self.texts.read("text", self._text[text])),
            "size_ids": self._size_ids[rows],
            "mirrored": torch.from_numpy(turned.astype(bool)),
        }
        if self._source is not None:
            batch["source"] = torch.from_numpy(self.images.read("mean", self._source[rows, turned]))
        if self.masks is not None and self._mask is not None:
            batch["mask"] = torch.from_numpy(self.masks.read("mask", self._mask[rows, turned]))
        return batch


class LivePairs(Dataset[dict[str, Tensor]]):
    """The same batches without any cache: each is encoded when it is asked for (``data.cache=off``).

    ``expect`` lets threads read and decode a batch while the one before it trains.
    """

    def __init__(
        self, dataset: PairDataset, encode_images: EncodeImages, encode_text: EncodeText, masks: bool, views: bool
    ) -> None:
        self.dataset, self.encode_images, self.encode_text = dataset, encode_images, encode_text
        self.masks, self.views = masks and dataset.has_mask, views
        self._parts = ["image"] + ["source"] * dataset.has_source + ["mask"] * self.masks
        self._reader: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[int, ...], Future[tuple[list[Pair], list[str], list[bool]]]] = {}

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of each sample."""
        return [self.dataset[index].size for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([number]).items()}

    def expect(self, numbers: Sequence[int]) -> None:
        """Begins to read a batch that will be asked for."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1)
        self._coming[tuple(numbers)] = self._reader.submit(self._read, numbers)

    def _read(self, numbers: Sequence[int]) -> tuple[list[Pair], list[str], list[bool]]:
        """The pairs of a batch, decoded, their captions, and which are mirrored."""
        pairs: list[Pair] = []
        captions: list[str] = []
        mirrored: list[bool] = []
        for number in numbers:
            pair = self.dataset[number % len(self)]
            texts = captions_of(pair, self.views)
            view = choose_view(number // len(self), _offset(pair.id), len(texts), self.views and pair.mirror)
            captions.append(texts[view % len(texts)])
            mirrored.append(view >= len(texts))
            pairs.append(pair.mirrored() if mirrored[-1] else pair)
        with ThreadPoolExecutor(DECODERS) as pool:  # a pair keeps what it has decoded
            list(pool.map(lambda pair: [getattr(pair, part) for part in self._parts], pairs))
        return pairs, captions, mirrored

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        coming = self._coming.pop(tuple(numbers), None)
        pairs, captions, mirrored = self._read(numbers) if coming is None else coming.result()
        rows = np.asarray(numbers, dtype=np.int64) % len(self)
        mean, std = self._encode(pairs, "image")
        batch = {"index": torch.from_numpy(rows), "latent_mean": mean, "latent_std": std}
        batch["text"] = self.encode_text(captions).detach().float().cpu()
        batch["size_ids"] = torch.tensor([pair.size_ids for pair in pairs], dtype=torch.float32)
        batch["mirrored"] = torch.tensor(mirrored)
        if self.dataset.has_source:
            batch["source"] = self._encode(pairs, "source")[0]
        if self.masks:
            height, width = mean.shape[-2:]
            shares = shrink_masks(np.stack([pair.mask for pair in pairs]), (height, width))
            batch["mask"] = torch.from_numpy(shares.astype(np.float32))
        return batch

    def _encode(self, pairs: list[Pair], part: str) -> tuple[Tensor, Tensor]:
        mean, std = self.encode_images(np.stack([getattr(pair, part) for pair in pairs]))
        return mean.detach().float().cpu(), std.detach().float().cpu()


def choose_view(number: int, offset: int, captions: int, mirror: bool) -> int:
    """Which of ``captions`` (and, from ``captions`` on, mirrored) a sample shows in pass ``number``: each in turn."""
    views = captions * (1 + mirror)
    return (number + offset) % views if views > 1 else 0


def _offset(id: str) -> int:
    return zlib.crc32(id.encode())


def captions_of(pair: Pair, views: bool) -> tuple[str, ...]:
    return (pair.captions or (pair.caption,)) if views else (pair.caption,)


@dataclass(frozen=True)
class _Record:
    """What the cache has to know of a pair, read in one pass over the data that decodes nothing.

    ``keys``: part -> its key as it is and mirrored (the same again where it may not be), "" where there is none.
    """

    id: str
    captions: tuple[str, ...]
    size: tuple[int, int]
    mirror: bool
    keys: dict[str, tuple[str, str]]
    size_ids: tuple[int, ...]

    @classmethod
    def of(cls, pair: Pair, views: bool) -> _Record:
        mirror = views and pair.mirror
        turned = pair.mirrored() if mirror else pair
        keys = {part: (pair.key(part) or "", turned.key(part) or "") for part in ("image", "source", "mask")}
        return cls(pair.id, captions_of(pair, views), pair.size, mirror, keys, pair.size_ids)


def build_cache(
    dataset: PairDataset,
    directory: str | Path | None,
    encode_images: EncodeImages,
    encode_text: EncodeText,
    vae: str,
    text_encoder: str,
    *,
    masks: bool = False,
    views: bool = False,
    stores: dict[str, RowStore] | None = None,
    description: str = "Encoding",
    quiet: bool = False,
) -> LatentCache:
    """The encoded ``dataset``; what ``directory`` does not hold yet is encoded first (None: all, into memory).

    ``encode_images`` maps uint8 (N, H, W, 3) to the (mean, std) of scaled latents (N, C, h, w);
    ``encode_text`` maps N captions to (N, L, D). ``vae`` and ``text_encoder`` name the weights behind them. Several
    processes may build the same cache and share the work. Raises ConfigError for an unwritable directory, and for
    latents that are not finite in half precision.

    ``masks``: keep garment masks too. ``views``: all captions and, where allowed, mirrored pairs (see LatentCache).
    ``stores``: opened stores to use again. ``quiet``: no progress bar.
    """
    stores = {} if stores is None else stores

    def store(weights: str, kind: str) -> RowStore:
        name = f"{hashlib.sha256(f'{FORMAT}:{np.dtype(DTYPE).name}:{weights}'.encode()).hexdigest()[:16]}/{kind}"
        if name not in stores:
            stores[name] = RowStore(None if directory is None else Path(directory) / name)
        return stores[name]

    images, texts = store(vae, "images"), store(text_encoder, "texts")
    kept_masks = store(vae, "masks") if masks and dataset.has_mask else None
    records = [_Record.of(dataset[index], views) for index in range(len(dataset))]
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, record in enumerate(records):
        by_size.setdefault(record.size, []).append(index)
    turns = [False, True] if any(record.mirror for record in records) else [False]
    parts = ["image"] + ["source"] * dataset.has_source + ["mask"] * (kept_masks is not None)
    with Progress(transient=True, disable=quiet) as progress:
        task = progress.add_task(description, total=len(dataset) * len(parts) * len(turns))
        for indices in by_size.values():
            latent_size: tuple[int, int] | None = None
            for mirrored, part in product(turns, parts):
                rows = [i for i in indices if not mirrored or records[i].mirror]
                keys = [records[i].keys[part][mirrored] for i in rows]
                maker = Maker(dataset, rows, part, mirrored, encode_images, latent_size)
                target = kept_masks if part == "mask" and kept_masks is not None else images
                target.fill(keys, maker, lambda n: progress.advance(task, n))
                if latent_size is None:
                    height, width = images.read("mean", images.locate(keys[:1])).shape[-2:]
                    latent_size = height, width
    captions = list(dict.fromkeys(["", *(caption for record in records for caption in record.captions)]))

    def embed(chunks: Iterator[list[int]]) -> Iterator[Arrays]:
        for chunk in chunks:
            batches = [chunk[i : i + BATCH_SIZE] for i in range(0, len(chunk), BATCH_SIZE)]
            yield {"text": half(torch.cat([encode_text([captions[p] for p in batch]) for batch in batches]))}

    texts.fill(captions, embed)
    return LatentCache(records, images, texts, kept_masks)


def _found(store: RowStore, keys: list[str], what: str) -> np.ndarray:
    places = store.locate(keys)
    if (places < 0).any():
        raise ConfigError(f"the cache lacks {int((places < 0).sum())} {what}: was it changed while it was read?")
    return places


def _places(store: RowStore, records: list[_Record], part: str) -> np.ndarray:
    """(N, 2) int64: where each sample's row is, as it is and mirrored."""
    both = [key for record in records for key in record.keys[part]]
    return _found(store, both, f"{part}s").reshape(-1, 2)
