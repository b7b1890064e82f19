"""Hugging Face data sets: a hub id, or local parquet files. Needs ``pip install "lora-dae[hf]"``.

``data.root`` is ``owner/name`` or ``owner/name@revision``, a .parquet file, or a folder of them (splits by the first
word of the file names: train-00000-of-00002.parquet). The first column of images is the photo; ``text``, ``caption``,
``prompt`` or ``description`` the caption, ``captions`` (a list) more of them; ``source`` or ``conditioning_image``,
``mask``, ``id``, ``group_id``, ``category`` and ``mirror`` may be there. Further columns of words are attributes.
No code of the data set is run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, RowBlob
from lora_dae.data.formats.files import SPLIT_NAMES, as_text, may_mirror, split_of
from lora_dae.data.formats.shards import mirrors
from lora_dae.data.formats.writing import Splits, every_pair, free_attributes

NOTICE = "check the licence on the data set's card"
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "description")
SOURCE_COLUMNS = ("source", "conditioning_image")
OWN = ("id", "group_id", "mirror", *CAPTION_COLUMNS)


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
    filled = {column: _filled(table, column) for column in (source, mask) if column is not None}
    told = [column for column in CAPTION_COLUMNS if column in table.features]
    told = [column for column in told if column in (told[0], "captions")]
    words = table.select_columns([column for column in table.features if column not in pictures])
    classes = {c: kind.names for c, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)}
    version = table._fingerprint
    entries = []
    for row, values in enumerate(words):
        where = f"{root} {name} row {row}"
        values |= {c: names[values[c]] for c, names in classes.items() if values[c] is not None and values[c] >= 0}

        def blob(column: str | None, row: int = row, table: Any = table, where: str = where) -> RowBlob | None:
            if column is None or column in filled and not filled[column][row]:
                return None
            return RowBlob(f"{where} {column}", version, partial(_bytes, table, row, column))

        texts: list[Any] = []
        for column in told:
            texts += values[column] if isinstance(values[column], list) else [values[column]]
        id = as_text(values.get("id")) or f"{name}/{row}"
        photo = blob(image)
        assert photo is not None
        entries.append(
            Entry(
                id=id,
                group_id=as_text(values.get("group_id")) or f"{name}/{row}",
                captions=tuple(dict.fromkeys(t.strip() for t in texts if isinstance(t, str) and t.strip())),
                image=photo,
                where=where,
                source=blob(source),
                mask=blob(mask),
                category=values["category"] if isinstance(values.get("category"), str) else None,
                attributes={k: v for k, v in values.items() if isinstance(v, str) and v and k not in OWN},
                split=split,
                mirror=may_mirror(values.get("mirror")),
            )
        )
    return entries


def _filled(table: Any, column: str) -> list[bool]:
    """Whether each row has a photo there; Arrow knows, without reading any."""
    import pyarrow.compute as pc

    cells = table.data.column(column)
    data, path = (pc.is_valid(pc.struct_field(cells, part)) for part in ("bytes", "path"))
    return pc.or_(data, path).to_pylist()


def _bytes(table: Any, row: int, column: str) -> bytes:
    cell = table[row][column]
    if cell is None or cell["bytes"] is None and cell["path"] is None:
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
            splits = {file: split_of(file.stem, "" if file.parent == path else file.parent.name) for file in files}
            unnamed = [file for file, split in splits.items() if split is None]
            if 0 < len(unnamed) < len(files):
                raise ConfigError(
                    f"data.root={root} has {unnamed[0].name}, whose name begins with no split as those of others do "
                    f"({', '.join(SPLIT_NAMES)}): rename it, or take it out."
                )
            parts: dict[str, list[str]] = {}
            for file, split in splits.items():
                parts.setdefault(split or "train", []).append(str(file))
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
    """<split>-00000-of-00001.parquet: image, source and mask as they are shown on the hub, attributes as columns."""
    datasets = _library()
    root.mkdir(parents=True, exist_ok=True)
    own = (*OWN, "category", "image", "source", "mask")
    names = list(dict.fromkeys(name for _, pair in every_pair(splits) for name in free_attributes(pair, own)))
    for split, pairs in splits.items():
        kinds: dict[str, Any] = {name: datasets.Value("string") for name in ("id", "group_id", "text", "category")}
        kinds |= {"captions": datasets.List(datasets.Value("string")), "mirror": datasets.Value("bool")}
        kinds |= {name: datasets.Value("string") for name in names} | {"image": datasets.Image()}
        if pairs.has_source:
            kinds["source"] = datasets.Image()
        if pairs.has_mask:
            kinds["mask"] = datasets.Image()
        rows = []
        for index in range(len(pairs)):
            pair = pairs[index]
            row: dict[str, Any] = {
                "id": pair.id, "group_id": pair.group_id, "text": pair.caption, "category": pair.category,
                "captions": list(pair.captions or (pair.caption,)), "mirror": mirrors(pairs, index),
            }  # fmt: skip
            row |= dict.fromkeys(names) | free_attributes(pair, own)
            rows.append(row | {part: getattr(pair, part) for part in ("image", "source", "mask") if part in kinds})
        table = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
        table.to_parquet(root / f"{split}-00000-of-00001.parquet")
