"""WebDataset tars that others wrote: files of one name but for the suffix are one record.

    train-000000.tar    0001.jpg, 0001.txt (or .json with "text" or "caption"), 0002.jpg, ...
    more parts          0001.source.jpg, 0001.mask.png; in .json also captions, category, group_id, attributes, mirror

``data.root`` is a tar, or a folder of them on disk or in an object store that fsspec knows (``s3://...``). A tar
belongs to the split that the first word of its name says. Headers and words are read once at the start; for sets whose
list does not fit into memory, ``python -m lora_dae.data shards`` makes shards with an index (``data=shards``).
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import fsspec

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, RowBlob, spelled
from lora_dae.data.formats.files import PHOTO_SUFFIXES, as_text, may_mirror, parse_json, refuse_halves, split_of
from lora_dae.data.formats.shards import read_range, write

__all__ = ["read", "write"]  # shards are WebDataset tars with an index beside them
WORDS = ("text", "caption", "captions")
OWN = (*WORDS, "id", "group_id", "category", "attributes", "mirror")
Member = tuple[int, int]  # where in the tar it begins, bytes


def read(cfg: DataConfig) -> list[Entry]:
    """All records with a photo; raises ConfigError for tars that cannot be read."""
    root = (cfg.root or "").rstrip("/")
    try:
        files, folder = fsspec.core.url_to_fs(root)
        tars = [folder] if folder.endswith(".tar") else sorted(files.glob(f"{folder}/**/*.tar"))
        entries = [entry for tar in tars for entry in _entries(files, tar, folder)]
    except (OSError, tarfile.TarError, ImportError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"data.root={root} cannot be read as WebDataset tars ({error}).") from error
    if not entries:
        raise ConfigError(f"data.root={root} holds no .tar with photos: give a folder of WebDataset tars, or one.")
    return entries


def _entries(files: Any, tar: str, root: str) -> Iterator[Entry]:
    url, version = files.unstrip_protocol(tar), str(files.ukey(tar))
    folder, _, name = tar.rpartition("/")
    parent = "" if folder == root.rstrip("/") else folder.rpartition("/")[2]  # the root's own name is the user's
    split = split_of(name, parent)
    if split is not None and split_of(name) is None:  # train/0000.tar and test/0000.tar hold other samples
        name = f"{parent}/{name}"

    def blob(member: Member | None, part: str) -> RowBlob | None:
        return None if member is None else RowBlob(part, version, partial(read_range, url, *member))

    for key, parts, spoken in _records(files, tar):
        key = spelled(key)
        where = f"{tar} {key}"
        words = _words(spoken.get("json", b"{}"), f"{where}.json")
        texts: list[Any] = [spoken.get("txt", b"").decode("utf-8-sig", errors="replace")]
        for column in WORDS:
            value = words.get(column)
            texts += value if isinstance(value, list) else [value]
        image = blob(_photo(parts, ""), f"{where} image")
        if image is None:
            continue
        given = words.get("attributes")
        known = {k: v for k, v in words.items() if k not in OWN} | (given if isinstance(given, dict) else {})
        id = as_text(words.get("id")) or f"{name}/{key}"
        yield Entry(
            id=id,
            group_id=as_text(words.get("group_id")) or id,
            captions=tuple(dict.fromkeys(t.strip() for t in texts if isinstance(t, str) and t.strip())),
            image=image,
            where=where,
            source=blob(_photo(parts, "source."), f"{where} source"),
            mask=blob(_photo(parts, "mask."), f"{where} mask"),
            category=words["category"] if isinstance(words.get("category"), str) else None,
            attributes={k: v for k, v in known.items() if isinstance(v, str) and v},
            split=split,
            mirror=may_mirror(words.get("mirror")),
        )


def _words(text: bytes, where: str) -> dict[str, Any]:
    try:
        words = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON ({error}): write that tar anew.") from error
    if not isinstance(words, dict):
        raise ConfigError(f'{where} must be an object like {{"text": ...}}: write that tar anew.')
    refuse_halves(text.decode(errors="replace"), words, where)
    return words


def _records(files: Any, tar: str) -> Iterator[tuple[str, dict[str, Member], dict[str, bytes]]]:
    """(name without suffixes, suffix -> member, suffix -> words) of each run of files of one name."""
    key, parts, spoken = "", dict[str, Member](), dict[str, bytes]()
    with files.open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            content = archive.extractfile(member)
            if content is None or not stem:  # a folder or link
                continue
            name, suffix = f"{folder}/{stem}".lstrip("/"), suffix.lower()
            if name != key:
                if parts:
                    yield key, parts, spoken
                key, parts, spoken = name, {}, {}
            if suffix in ("json", "txt"):
                spoken[suffix] = content.read()
            else:
                parts[suffix] = (member.offset_data, member.size)
    if parts:
        yield key, parts, spoken


def _photo(parts: dict[str, Member], prefix: str) -> Member | None:
    return next((parts[prefix + s[1:]] for s in PHOTO_SUFFIXES if prefix + s[1:] in parts), None)
