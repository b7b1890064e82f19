"""LitData sets: what ``litdata.optimize`` wrote, read by the library. Needs ``pip install "lora-dae[litdata]"``.

    train/index.json, train/chunk-0-0.bin, ...    beside it val/ and test/; or one index.json in ``data.root`` itself

``data.root`` is a folder, or its address in an object store (``s3://...``). A record is a dict of named fields:
``image`` and where there are any ``source`` and ``mask`` (a file's bytes, or what LitData makes of images), ``text`` or
``caption``, ``captions`` (a list, as JSON), ``id``, ``group_id``, ``category``, ``attributes`` (JSON), ``mirror``.
Further fields of words are attributes.

An index names the serializer of each field, and one of LitData's unpickles; its ``data_spec`` may name a module to
import. So an index that asks for more than bytes, words, numbers and images is refused before LitData sees it.

Words are read once and kept in ``data.cache_dir``, and the list of records is in memory: for more records than that,
``python -m lora_dae.data shards`` makes shards. Chunks of a set that is far away, or compressed, are fetched whole into
``data.cache_dir``, at most ``CACHE_SIZE`` of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path, PurePath
from threading import Lock
from typing import Any, cast

from PIL import Image

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, RowBlob
from lora_dae.data.formats.files import SPLIT_NAMES, as_text, may_mirror, parse_json
from lora_dae.data.formats.shards import PARTS, entry_of, files_of, mirrors, read_range
from lora_dae.data.formats.writing import Splits

CACHE_SIZE = "25GB"  # of chunks on disk; LitData advises no less
CHUNK_SIZE = "64MB"  # as LitData advises
KEPT = 16  # records in memory: image, source and mask are asked for one after the other
# Exact names only: LitData looks up what follows a colon as a serializer of its own ("text:pickle" unpickles).
READ = re.compile(r"str|text|bytes|bool|int|float|json|pil|jpeg|(image|file)(:(jpe?g|png|webp|bmp|gif|tiff?|avif))?")
WORDS = ("text", "caption", "captions")
OWN = (*WORDS, *PARTS, "id", "group_id", "category", "attributes", "mirror")
LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


def read(cfg: DataConfig) -> list[Entry]:
    """All records; ConfigError for a set that cannot be read, or not without running code."""
    _library()
    root = (cfg.root or "").rstrip("/")
    root = root if "://" in root else os.path.abspath(os.path.expanduser(root))
    entries = []
    for folder, split, index in _indices(root):
        names, counts = check_index(index, f"{folder}/index.json")
        if "image" not in names:
            raise ConfigError(f"{folder}/index.json has no field image ({', '.join(names)}): write the set anew.")
        version = hashlib.sha256(index).hexdigest()
        place = Path(cfg.cache_dir) / "litdata" / hashlib.sha256(f"{folder} {version}".encode()).hexdigest()[:16]
        records = Records(folder, index, place)
        chunks = [chunk for chunk, count in enumerate(counts) for _ in range(count)]
        for row, (chunk, words) in enumerate(zip(chunks, _all_words(records, len(chunks), place), strict=True)):
            entries.append(_entry(records, folder, version, row, words, split, chunk))
    return entries


def _indices(root: str) -> Iterator[tuple[str, str | None, bytes]]:
    """(folder, split, index.json) of what lies in ``root``."""
    found = False
    for name, split in {"": None, **SPLIT_NAMES}.items():
        folder = f"{root}/{name}".rstrip("/")
        try:
            index = read_range(f"{folder}/index.json")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"data.root={root} cannot be read as a LitData set ({error}).") from error
        found = True
        yield folder, split, index
    if not found:
        raise ConfigError(f"data.root={root} has no index.json or train/index.json: is it what litdata.optimize wrote?")


def check_index(text: bytes, where: str) -> tuple[list[str], list[int]]:
    """(fields of a record, records of each chunk); ConfigError if reading them could run code, or is not possible."""
    try:
        index = json.loads(text)
        config, spec = index["config"], json.loads(index["config"]["data_spec"])[1]
        chunks = [(str(chunk["filename"]), int(chunk["chunk_size"])) for chunk in index["chunks"]]
        flat = spec["type"] == "builtins.dict" and all(child == LEAF for child in spec["children_spec"])
        fields = dict(zip(json.loads(spec["context"]), config["data_format"], strict=True)) if flat else {}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"{where} is no index of a LitData set ({type(error).__name__}: {error}).") from error
    if not flat:
        raise ConfigError(f"{where} has records that are no plain dict of named fields: write the set anew.")
    for name, serializer in fields.items():
        if not READ.fullmatch(str(serializer)):
            raise ConfigError(
                f"{where} keeps the field {name} by the serializer {serializer}, which is not read here because such "
                "data can run code: write the set anew with bytes, words, numbers or images."
            )
    if config.get("encryption") or config.get("item_loader", "PyTreeLoader") != "PyTreeLoader":
        raise ConfigError(f"{where} is encrypted or needs an item loader of its own: write the set anew without.")
    for name, _ in chunks:
        if PurePath(name).name != name:
            raise ConfigError(f"{where} names the chunk {name}, which is no file beside it: write the set anew.")
    return list(fields), [count for _, count in chunks]


class Records:
    """The records of one folder by number, as LitData reads them. Threads may share it; ``OSError`` if it cannot.

    ``index`` is what was checked: of a set that is not read where it lies, LitData takes that copy in ``place``.
    """

    def __init__(self, folder: str, index: bytes, place: Path) -> None:
        _library()
        self.folder, self.index, self.place = folder, index, place
        self.far = "://" in folder
        self._lock, self._data = Lock(), cast(Any, None)
        self._kept = lru_cache(maxsize=KEPT)(self._read)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with self._lock:  # LitData has one open chunk
            try:
                return self._kept(row)
            except Exception as error:  # the library raises dozens of kinds
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise OSError(f"LitData cannot read record {row} of {self.folder}: {reason}") from error

    def file(self, row: int, part: str) -> bytes:
        return _as_file(self[row][part])

    def _read(self, row: int) -> dict[str, Any]:
        if self._data is None:
            self._data = self._open()
            _ = self._data[0:0]  # after a slice, LitData fetches whole chunks: neighbors are read next
        record: dict[str, Any] = self._data[row]
        # Views into a chunk would keep it mapped.
        return {k: bytes(v) if isinstance(v, memoryview) else v for k, v in record.items()}

    def _open(self) -> Any:
        from litdata.streaming.resolver import Dir
        from litdata.streaming.serializers import BytesSerializer

        place = Dir(path=self.folder, url=None)
        if self.far or json.loads(self.index)["config"].get("compression"):
            self.place.mkdir(parents=True, exist_ok=True)
            _write_whole(self.place / "index.json", self.index)
            place = Dir(path=str(self.place), url=self.folder if "://" in self.folder else f"local:{self.folder}")
        files = {name: BytesSerializer() for name in ("image", "jpeg")}  # decoded by us, as all photos are
        return _library().StreamingDataset(place, serializers=files, max_cache_size=CACHE_SIZE)


def _library() -> Any:
    try:
        import litdata
    except ImportError as error:
        raise ConfigError('data=litdata needs the litdata library: pip install "lora-dae[litdata]".') from error
    return litdata


def _write_whole(path: Path, data: bytes) -> None:
    partial_file = path.with_name(f"{path.name}.partial{os.getpid()}")
    partial_file.write_bytes(data)
    os.replace(partial_file, path)


def _all_words(records: Records, count: int, place: Path) -> list[dict[str, Any]]:
    """What each record says in words, and which photos it has; read once from the set, then from ``place``."""
    kept = place / "words.jsonl"
    if kept.is_file():
        return [json.loads(line) for line in kept.read_text(encoding="utf-8").split("\n") if line]
    try:
        words = [_words(records[row], f"{records.folder} record {row}") for row in range(count)]
    except OSError as error:
        raise ConfigError(f"{error}: write the set anew.") from error
    place.mkdir(parents=True, exist_ok=True)
    _write_whole(kept, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in words).encode())
    return words


def _words(record: dict[str, Any], where: str) -> dict[str, Any]:
    captions: list[Any] = []
    for name in WORDS:
        value = record.get(name)
        if name == "captions" and isinstance(value, str):
            value = _parsed(value or "[]", f"{where} captions")
        captions += value if isinstance(value, list) else [value]
    given = record.get("attributes")
    given = _parsed(given or "{}", f"{where} attributes") if isinstance(given, str) else given
    known = {k: v for k, v in record.items() if k not in OWN} | (given if isinstance(given, dict) else {})
    return {
        "id": as_text(record.get("id")),
        "group_id": as_text(record.get("group_id")),
        "captions": list(dict.fromkeys(t.strip() for t in captions if isinstance(t, str) and t.strip())),
        "category": record["category"] or None if isinstance(record.get("category"), str) else None,
        "attributes": {k: v for k, v in known.items() if isinstance(v, str) and v},
        "mirror": may_mirror(record.get("mirror")),
        "parts": [part for part in PARTS if part == "image" or record.get(part, b"") not in (b"", "", None)],
    }


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}): write the set anew.") from error


def _entry(
    records: Records, folder: str, version: str, row: int, words: dict[str, Any], split: str | None, chunk: int
) -> Entry:
    where = f"{folder} record {row}"
    blobs: dict[str, Any] = {
        part: RowBlob(f"{where} {part}", version, partial(records.file, row, part)) for part in words["parts"]
    }
    return Entry(
        id=words["id"] or f"{split or 'record'}/{row}",
        group_id=words["group_id"] or words["id"] or f"{split or 'record'}/{row}",
        captions=tuple(words["captions"]),
        where=where,
        category=words["category"],
        attributes=words["attributes"],
        split=split,
        mirror=words["mirror"],
        block=f"{folder} {chunk}",
        **blobs,
    )


def _as_file(value: Any) -> bytes:
    """A photo's file: as it was stored, or of LitData's raw pixels a PNG. OSError for what is no photo."""
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG", compress_level=1)
        return file.getvalue()
    if isinstance(value, bytes):
        return value
    raise OSError(f"a {type(value).__name__} is no photo")


def write(splits: Splits, root: Path) -> None:
    """train/, val/ and test/ as ``litdata.optimize`` writes them, files as they are."""
    _library()
    from litdata.streaming import Cache
    from litdata.types import Image as EncodedImage
    from litdata.types import Text  # a plain str that happens to be a file's name would be stored as that file

    for split, pairs in splits.items():
        folder = root / split
        folder.mkdir(parents=True)
        chunks = Cache(str(folder), chunk_bytes=CHUNK_SIZE)
        for index in range(len(pairs)):
            pair, entry = pairs[index], entry_of(pairs, index)
            words = {
                "id": pair.id, "group_id": pair.group_id, "text": pair.caption, "category": pair.category or "",
                "captions": json.dumps(pair.captions or (pair.caption,), ensure_ascii=False),
                "attributes": json.dumps(pair.attributes or {}, ensure_ascii=False),
            }  # fmt: skip
            files = {part: EncodedImage(bytes=data) for part, data, _ in files_of(entry, pair)}
            mirror = {"mirror": mirrors(pairs, index)}
            chunks[index] = {name: Text(text=text) for name, text in words.items()} | mirror | files
        chunks.done()
        chunks.merge()
