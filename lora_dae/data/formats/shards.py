"""Shards for sets larger than memory and disk: tar files in WebDataset's convention, and an index beside each.

    index.json                 {"format": 1, "splits": {"train": {"shards": [{"file", "count"}, ...], ...}}}
    train-000000.tar           00000000.jpg, 00000000.source.jpg, 00000000.mask.png, 00000000.json, 00000001.jpg, ...
    train-000000.index.jsonl   one line a record: its words, and where in the tar which of its files lies
    train.sizes.npy            (N, 2) width and height of each photo, which data.buckets needs to know at the start

``python -m lora_dae.data shards --to <folder> data=...`` writes them, files as they are; ``data.root`` is that folder
or its address in an object store that fsspec knows (``s3://...``). The webdataset library reads the same tars.
Splits are those that the data had when they were written, garments apart: files are not compared anew.

Of the two libraries, LitData is the better kept, and reads and writes its own sets here (``data=litdata``, litdata.py).
Ten million records need what neither has, webdataset streaming and LitData holding no sizes or words apart from the
photos: with our index a record is one ranged read, in any order, share and step, a run goes on exactly in the middle of
an epoch, and opening reads ``index.json``. The index of a shard is read when one of its records is wanted.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.captions import prepare_captions
from lora_dae.data.catalog import Facts, examine
from lora_dae.data.decode import open_image
from lora_dae.data.entry import Entry, RowBlob
from lora_dae.data.formats.writing import Splits
from lora_dae.data.pair import Pair, PairDataset
from lora_dae.data.photos import Fit, PhotoPairs

FORMAT = 1
PER_SHARD = 1000  # records
OPEN_SHARDS = 32  # whose index is kept in memory
PARTS = ("image", "source", "mask")


class ShardPairs:
    """One split of shards: a data set of pairs, of which nothing is held but the shards' names and sizes."""

    def __init__(
        self, root: str, split: dict[str, Any], cfg: DataConfig, fit: Fit, mirror: bool, trained: Fit | None = None
    ) -> None:
        self.root, self.cfg, self.fit, self.mirror = root, cfg, fit, mirror
        self.split, self.trained = split, trained or fit  # as PhotoPairs has it
        self.files: list[str] = [shard["file"] for shard in split["shards"]]
        self.ends = list(accumulate(int(shard["count"]) for shard in split["shards"]))
        self.has_source, self.has_mask = bool(split["has_source"]), bool(split["has_mask"])
        self._digest = str(split["digest"])
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._read_index)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Pair:
        pairs, row = self.find(index)
        return pairs[row]

    def facts(self, index: int) -> dict[str, Facts]:
        """What the index says about the record's files."""
        pairs, row = self.find(index)
        return pairs.facts[row]

    def find(self, index: int) -> tuple[PhotoPairs, int]:
        """The shard that holds the record, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self.ends, index)
        return self._open(shard), index - (self.ends[shard - 1] if shard else 0)

    def as_trained(self) -> ShardPairs:
        """The same photos in the sizes of training."""
        return ShardPairs(self.root, self.split, self.cfg, self.trained, self.mirror)

    @cached_property
    def size_labels(self) -> np.ndarray | None:
        """Which bucket each photo gets, (N,), without reading any index; None without buckets."""
        if not self.fit.buckets:
            return None
        file = f"{self.root}/{self.split['sizes']}"
        try:
            sizes = np.load(io.BytesIO(read_range(file)), allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read ({error}): write the shards anew.") from error
        if sizes.shape != (len(self), 2):
            raise ConfigError(f"{file} has the sizes of {len(sizes)} photos, not {len(self)}: write the shards anew.")
        return self.fit.buckets_of(sizes)

    @property
    def blocks(self) -> list[int]:
        """Records of each shard: shuffling by blocks reads few shards at a time."""
        return [end - start for start, end in zip([0, *self.ends], self.ends, strict=False)]

    @property
    def fingerprint(self) -> str:
        text = repr((self._digest, self.fit, self.mirror, self.cfg.captions, self.cfg.no_flip_words))
        return hashlib.sha256(text.encode()).hexdigest()

    def _read_index(self, shard: int) -> PhotoPairs:
        file = f"{self.root}/{self.files[shard]}"
        lines = read_range(file.removesuffix(".tar") + ".index.jsonl").decode().split("\n")
        rows = [json.loads(line) for line in lines if line]
        entries = prepare_captions([_entry(file, row) for row in rows], self.cfg)
        if len(entries) != len(rows):
            raise ConfigError("data.captions.missing=drop would change how many records a shard has: caption them.")
        facts = [{part: Facts(*place[2:]) for part, place in row["parts"].items()} for row in rows]
        return PhotoPairs(entries, facts, self.fit, self.mirror)


def load(cfg: DataConfig) -> dict[str, PairDataset]:
    """The splits; reads ``index.json`` alone. Raises ConfigError if it is missing or of another version."""
    root = (cfg.root or "").rstrip("/")
    try:
        index = json.loads(read_range(f"{root}/index.json"))
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"data.root={root} has no readable index.json ({error}): is it a folder of shards?"
        ) from error
    if index.get("format") != FORMAT:
        raise ConfigError(f"{root}/index.json is of format {index.get('format')}, this program reads {FORMAT}.")
    fit = Fit.of(cfg)
    if fit.buckets and not all("sizes" in split for split in index["splits"].values()):
        raise ConfigError(
            f"the shards in {root} do not tell their photos' sizes, which data.buckets needs: write them anew with "
            "python -m lora_dae.data shards, or leave data.buckets out."
        )
    square = replace(fit, buckets=())  # as for photos in files: held-out ones are drawn and measured in squares
    splits = {
        name: ShardPairs(root, split, cfg, fit if name == "train" else square, cfg.flip and name == "train", fit)
        for name, split in index["splits"].items()
    }
    lacking = [name for name in ("train", "val", "test") if not len(splits.get(name, ()))]
    if lacking:
        raise ConfigError(f"the shards in {root} have no {' and no '.join(lacking)} split: write them anew.")
    return dict(splits)


def write(splits: Splits, root: Path, per_shard: int = PER_SHARD) -> None:
    """Tars and their indices; ``index.json`` comes last, so a cut-off folder is none."""
    root.mkdir(parents=True, exist_ok=True)
    told = {}
    for split, pairs in splits.items():
        shards, digest, sizes = [], hashlib.sha256(), np.zeros((len(pairs), 2), np.uint32)
        for number, start in enumerate(range(0, len(pairs), per_shard)):
            name = f"{split}-{number:06d}"
            count = min(per_shard, len(pairs) - start)
            lines = []
            with tarfile.open(root / f"{name}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in range(count):
                    line = _add(tar, f"{row:08d}", pairs, start + row)
                    sizes[start + row] = line["parts"]["image"][3:5]
                    lines.append(json.dumps(line, ensure_ascii=False))
            text = "".join(f"{line}\n" for line in lines)
            (root / f"{name}.index.jsonl").write_text(text, encoding="utf-8")
            digest.update(text.encode())
            shards.append({"file": f"{name}.tar", "count": count})
        np.save(root / f"{split}.sizes.npy", sizes)
        told[split] = {
            "shards": shards, "sizes": f"{split}.sizes.npy", "digest": digest.hexdigest(),
            "has_source": pairs.has_source, "has_mask": pairs.has_mask,
        }  # fmt: skip
    index = {"format": FORMAT, "splits": told}
    (root / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _add(tar: tarfile.TarFile, key: str, pairs: PairDataset, index: int) -> dict[str, Any]:
    """Writes one record's files; returns its line of the index."""
    pair = pairs[index]
    entry = entry_of(pairs, index)
    words = {
        "id": pair.id, "group_id": pair.group_id, "captions": list(pair.captions or (pair.caption,)),
        "category": pair.category, "attributes": pair.attributes or {}, "mirror": mirrors(pairs, index),
    }  # fmt: skip
    parts = {}
    for part, data, suffix in files_of(entry, pair):
        facts = examine(RowBlob(part, "", partial(bytes, data)))
        offset = _put(tar, f"{key}{'' if part == 'image' else f'.{part}'}.{suffix}", data)
        place = [facts.digest, facts.width, facts.height, facts.remark, facts.reason, facts.hash]
        parts[part] = [offset, len(data), *place, round(facts.red, 2), round(facts.green, 2), round(facts.blue, 2)]
    _put(tar, f"{key}.json", json.dumps(words | {"text": pair.caption}, ensure_ascii=False).encode())
    return words | {"parts": parts}


def entry_of(pairs: PairDataset, index: int) -> Entry | None:
    """What the source said of a pair whose photos are files."""
    if isinstance(pairs, ShardPairs):
        shard, row = pairs.find(index)
        return shard.entries[row]
    return pairs.entries[index] if isinstance(pairs, PhotoPairs) else None


def mirrors(pairs: PairDataset, index: int) -> bool:
    """Whether training may mirror a pair, as its source says: ``Pair.mirror`` is False for all that is held out."""
    entry = entry_of(pairs, index)
    return entry is None or entry.mirror


def files_of(entry: Entry | None, pair: Pair) -> Iterator[tuple[str, bytes, str]]:
    """(part, encoded bytes, suffix): a photo's own file where there is one, else a PNG."""
    for part in PARTS:
        blob = None if entry is None else getattr(entry, part)
        if blob is not None:
            data = blob.read()
            photo = open_image(data)
            kind = str(photo.format)
            if kind == "PPM":  # bytes of a decoder, many times as large as a PNG
                data, kind = _png(photo), "PNG"
            yield part, data, {"JPEG": "jpg", "MPO": "jpg"}.get(kind, kind.lower())
        elif getattr(pair, part) is not None:
            yield part, _png(Image.fromarray(np.asarray(getattr(pair, part)))), "png"


def _png(photo: Image.Image) -> bytes:
    file = io.BytesIO()
    photo.save(file, "PNG")
    return file.getvalue()


def _put(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Appends a file; returns where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE  # one header block: USTAR, short names
    tar.addfile(info, io.BytesIO(data))
    return offset


def _entry(file: str, row: dict[str, Any]) -> Entry:
    blobs: dict[str, Any] = {
        part: RowBlob(f"{file} {row['id']} {part}", place[2], partial(read_range, file, place[0], place[1]))
        for part, place in row["parts"].items()
    }
    return Entry(
        id=row["id"],
        group_id=row["group_id"],
        captions=tuple(row["captions"]),
        where=f"{file} {row['id']}",
        category=row["category"],
        attributes=row["attributes"],
        mirror=row.get("mirror", True),
        **blobs,
    )


def read_range(url: str, offset: int = 0, size: int = -1) -> bytes:
    """Bytes of a file on disk or in an object store; all of it by default. Raises OSError."""
    files, path = fsspec.core.url_to_fs(url)  # opening the file would read megabytes ahead
    return files.cat_file(path, offset, None if size < 0 else offset + size)
