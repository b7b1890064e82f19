"""Hugging Face data sets: a hub id, or local parquet files. Needs ``pip install "lora-dae[hf]"``.

``data.root`` is ``owner/name`` or ``owner/name@revision``, a .parquet file, or a folder of them (splits by the first
word of the file names: train-00000-of-00002.parquet). The first column of images is the photo; ``text``, ``caption``,
``prompt`` or ``description`` the caption; ``source`` or ``conditioning_image`` and ``mask`` may be there. Further
columns of words are attributes. No code of the data set is run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, RowBlob
from lora_dae.data.formats.files import SPLIT_NAMES, split_of
from lora_dae.data.formats.writing import Splits

NOTICE = "check the licence on the data set's card"
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
SOURCE_COLUMNS = ("source", "conditioning_image")


def read(cfg: DataConfig) -> list[Entry]:
    tables = _load(cfg.root or "")
    entries = []
    for name, table in tables.items():
        split = split_of(name)
        if split is None:
            raise ConfigError(
                f"data.root={cfg.root} has a split {name}, which is none of {', '.join(SPLIT_NAMES)}: save the ones "
                "that you want as parquet files with such names."
            )
        entries += _from_table(cfg.root or "", name, table, split)
    return entries


def _from_table(root: str, name: str, table: Any, split: str) -> list[Entry]:
    datasets = _library()
    pictures = [column for column, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not pictures:
        raise ConfigError(f"data.root={root} has no column of images (it has {', '.join(table.features)}).")
    for column in pictures:
        table = table.cast_column(column, datasets.Image(decode=False))
    source = next((column for column in SOURCE_COLUMNS if column in pictures), None)
    mask = "mask" if "mask" in pictures else None
    image = next(column for column in pictures if column not in (source, mask))
    caption = next((column for column in CAPTION_COLUMNS if column in table.features), None)
    words = table.select_columns([column for column in table.features if column not in pictures])
    classes = {c: kind.names for c, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    version = table._fingerprint
    entries = []
    for row, values in enumerate(words):
        where = f"{root} {name} row {row}"
        values |= {c: names[values[c]] for c, names in classes.items() if values[c] is not None and values[c] >= 0}

        def blob(column: str | None, row: int = row, table: Any = table, where: str = where) -> RowBlob | None:
            return (
                None if column is None else RowBlob(f"{where} {column}", version, partial(_bytes, table, row, column))
            )

        given = values.get(caption) if caption else None
        texts = given if isinstance(given, list) else [given] if given else []
        photo = blob(image)
        assert photo is not None
        entries.append(
            Entry(
                id=str(values.get("id") or f"{name}/{row}"),
                group_id=str(values.get("group_id") or f"{name}/{row}"),
                captions=tuple(text.strip() for text in texts if isinstance(text, str) and text.strip()),
                image=photo,
                where=where,
                source=blob(source),
                mask=blob(mask),
                category=values["category"] if isinstance(values.get("category"), str) else None,
                attributes={k: v for k, v in values.items() if isinstance(v, str) and v and k not in _OWN},
                split=split,
            )
        )
    return entries


_OWN = ("id", "group_id", *CAPTION_COLUMNS)


def _bytes(table: Any, row: int, column: str) -> bytes:
    cell = table[row][column]
    if cell is None:
        return b""
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError('data=hf needs the datasets library: pip install "lora-dae[hf]".') from error
    return datasets


def _load(root: str) -> dict[str, Any]:
    datasets = _library()
    path = Path(root).expanduser()
    try:
        if path.suffix == ".parquet" or path.is_dir():
            files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
            if not files or not files[0].is_file():
                raise ConfigError(f"data.root={root} holds no .parquet file: give one, a folder of them, or a hub id.")
            parts: dict[str, list[str]] = {}
            for file in files:
                parts.setdefault(
                    split_of(file.stem, "" if file.parent == path else file.parent.name) or "train", []
                ).append(str(file))
            loaded = datasets.load_dataset("parquet", data_files=parts)
        else:
            name, _, revision = root.partition("@")
            loaded = datasets.load_dataset(name, revision=revision or None)
    except ConfigError:
        raise
    except Exception as error:  # the library raises dozens of kinds, its users need the one sentence
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise ConfigError(f"data.root={root} cannot be loaded as a data set ({reason}).") from error
    return dict(loaded)


def write(splits: Splits, root: Path) -> None:
    """<split>-00000-of-00001.parquet with image, source and mask as they are shown on the hub."""
    datasets = _library()
    root.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        kinds: dict[str, Any] = {name: datasets.Value("string") for name in ("id", "group_id", "text", "category")}
        kinds["image"] = datasets.Image()
        if pairs.has_source:
            kinds["source"] = datasets.Image()
        if pairs.has_mask:
            kinds["mask"] = datasets.Image()
        rows = []
        for index in range(len(pairs)):
            pair = pairs[index]
            row = {"id": pair.id, "group_id": pair.group_id, "text": pair.caption, "category": pair.category}
            rows.append(row | {part: getattr(pair, part) for part in ("image", "source", "mask") if part in kinds})
        table = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")
