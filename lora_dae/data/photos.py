"""Photos of any size as a data set of pairs: decoded, cropped and filled when they are looked at."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.buckets import (
    Size,
    choose_bucket,
    choose_buckets,
    fit_bucket,
    fit_bucket_mask,
    origin_of,
    parse_buckets,
)
from lora_dae.data.catalog import Facts
from lora_dae.data.decode import BadImageError, check_background, decode
from lora_dae.data.entry import Blob, Entry
from lora_dae.data.masks import decode_mask
from lora_dae.data.pair import Lazy, Pair
from lora_dae.data.square import Photo, fit_mask, fit_square, has_plain_backdrop

FIT_VERSION = 3  # raise it when the same photo would give other pixels
MASK_VERSION = 2  # of masks alone


@dataclass(frozen=True)
class Fit:
    """How photos become pixels: squares of ``resolution``, or the ``buckets`` where there are any."""

    resolution: int
    buckets: tuple[Size, ...] = ()
    background: str = "white"

    @classmethod
    def of(cls, cfg: DataConfig) -> Fit:
        check_background(cfg.background)
        return cls(cfg.resolution, tuple(parse_buckets(cfg.buckets, cfg.resolution, cfg.bucket_step)), cfg.background)

    def size(self, facts: Facts) -> Size:
        """(width, height) that a photo gets."""
        if not self.buckets:
            return self.resolution, self.resolution
        return choose_bucket((facts.width, facts.height), list(self.buckets), self.resolution)

    def buckets_of(self, sizes: np.ndarray) -> np.ndarray | None:
        """Which bucket each photo gets, uint16 (N,), of sizes (N, 2) as (width, height); None where all are alike."""
        if not self.buckets:
            return None
        parts = []
        for part in np.array_split(sizes, max(len(sizes) // 1_000_000, 1)):  # bounds what sorting takes
            keys = part[:, 0].astype(np.uint64) << np.uint64(32) | part[:, 1].astype(np.uint64)
            different, back = np.unique(keys, return_inverse=True)
            pairs = np.stack([different >> np.uint64(32), different & np.uint64(2**32 - 1)], 1)
            parts.append(choose_buckets(pairs, list(self.buckets), self.resolution).astype(np.uint16)[back])
        return np.concatenate(parts)

    def origin(self, facts: Facts, size: Size) -> tuple[int, int, int, int] | None:
        """``Pair.origin``; None for an oblong photo in a square, whose crop depends on its pixels."""
        known = bool(self.buckets) or facts.width == facts.height
        return origin_of((facts.width, facts.height), size) if known else None


class _Photo:
    """One entry's photos while they turn into pixels; all of them are cropped by one decision.

    It belongs to one pair. Python 3.11's cached_property would hold one lock for all of them while one is decoded.
    """

    def __init__(self, entry: Entry, fit: Fit, size: Size) -> None:
        self.entry, self.fit, self.size = entry, fit, size
        self._photo: Image.Image | None = None
        self._pixels: np.ndarray | None = None
        self._whole: bool | None = None

    @property
    def photo(self) -> Image.Image:
        if self._photo is None:
            self._photo = self._decode(self.entry.image)
        return self._photo

    @property
    def pixels(self) -> np.ndarray:
        if self._pixels is None:
            self._pixels = np.array(self.photo)
        return self._pixels

    @property
    def whole(self) -> bool:
        if self._whole is None:
            self._whole = has_plain_backdrop(self.pixels)
        return self._whole

    def image(self) -> np.ndarray:
        return self._fit(self.pixels)

    def source(self) -> np.ndarray:
        assert self.entry.source is not None
        return self._fit(self._decode(self.entry.source))

    def mask(self) -> np.ndarray:
        assert self.entry.mask is not None
        mask = self._decode(self.entry.mask, is_mask=True)
        if self.fit.buckets:
            return fit_bucket_mask(mask, self.photo, self.size)
        return fit_mask(mask, self.photo, self.fit.resolution, self.whole)

    def _fit(self, photo: Photo) -> np.ndarray:
        if self.fit.buckets:
            return fit_bucket(photo, self.size)
        return fit_square(photo, self.fit.resolution, self.whole)

    def _decode(self, blob: Blob, is_mask: bool = False) -> Image.Image:
        try:
            data, draft = blob.read(), 2 * max(self.size)
            return decode_mask(data, draft) if is_mask else decode(data, draft, self.fit.background)
        except (BadImageError, OSError) as error:
            reason = error if isinstance(error, BadImageError) else f"cannot be read ({error})"
            raise ConfigError(f"{blob.name} {reason}: replace it or take it out of the data.") from error


class PhotoPairs:
    """One split: entries whose files are known to be readable, as pairs.

    ``trained`` is how training fits photos, where this split, which is drawn and measured, goes another way.
    ``ignored_sources``: ids, of all splits, whose source photos are not used because other photos have none.
    """

    def __init__(
        self,
        entries: list[Entry],
        facts: list[dict[str, Facts]],
        fit: Fit,
        mirror: bool = False,
        trained: Fit | None = None,
        ignored_sources: frozenset[str] = frozenset(),
    ) -> None:
        self.entries, self.facts, self.fit, self.mirror = entries, facts, fit, mirror
        self.trained, self.ignored_sources = trained or fit, ignored_sources
        self.has_source = bool(entries) and entries[0].source is not None
        self.has_mask = bool(entries) and entries[0].mask is not None

    def as_trained(self) -> PhotoPairs:
        """The same photos in the sizes of training: what the validation loss is taken on."""
        return PhotoPairs(self.entries, self.facts, self.trained, self.mirror)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """The pair at ``index``, nothing decoded yet. Looking at a photo that broke since raises ConfigError."""
        entry, facts = self.entries[index], self.facts[index]
        size = self.fit.size(facts["image"])
        photo = _Photo(entry, self.fit, size)
        shape = (size[1], size[0], 3)

        def key(part: str) -> str:
            # Where padding ends is read off the image, so source and mask depend on it too.
            digests = "".join(facts[p].digest for p in sorted({"image", part}))
            version = f"{FIT_VERSION}.{MASK_VERSION}" if part == "mask" else FIT_VERSION
            text = f"{version}:{part}:{digests}:{size}:{bool(self.fit.buckets)}:{self.fit.background}"
            return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

        return Pair(
            id=entry.id,
            group_id=entry.group_id,
            caption=entry.caption,
            image=Lazy(photo.image, shape, key("image")),
            source=None if entry.source is None else Lazy(photo.source, shape, key("source")),
            mask=None if entry.mask is None else Lazy(photo.mask, shape[:2], key("mask")),
            category=entry.category,
            attributes=entry.attributes or None,
            captions=entry.captions,
            mirror=self.mirror and entry.mirror,
            origin=self.fit.origin(facts["image"], size),
        )

    def keeps_whole(self, index: int) -> bool:
        """Whether that photo, and its source with it, is padded to a square and not cropped. Decodes the photo."""
        return _Photo(self.entries[index], self.fit, self.fit.size(self.facts[index]["image"])).whole

    @property
    def blocks(self) -> list[int] | None:
        """How many consecutive photos lie in each file (``Entry.block``); None where that does not matter."""
        if not any(entry.block for entry in self.entries):
            return None
        return [len(list(run)) for _, run in groupby(self.entries, lambda entry: entry.block)]

    @cached_property
    def fingerprint(self) -> str:
        """Changes with a file's bytes, a caption, the resolution, the buckets or the order."""
        versions = (FIT_VERSION, MASK_VERSION) if self.has_mask else FIT_VERSION
        digest = hashlib.sha256(repr((versions, self.fit, self.mirror)).encode())
        for entry, facts in zip(self.entries, self.facts, strict=True):
            files = [facts[part].digest for part in sorted(facts)]
            digest.update(repr((entry.id, entry.captions, entry.mirror, files)).encode())
        return digest.hexdigest()
