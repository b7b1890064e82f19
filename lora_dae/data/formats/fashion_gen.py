"""Fashion-Gen (Rostamzadeh et al. 2018), 293,008 photos in HDF5; on request from its authors.

    fashiongen_256_256_train.h5, fashiongen_256_256_validation.h5
        input_image (N, H, W, 3) uint8; input_description, input_concat_description, input_category, input_gender,
        input_subcategory, ... (N, 1) bytes, UTF-8 or Latin-1; input_productID (N, 1)

The validation file is the test split. Photos of one product stay together. Needs ``pip install "lora-dae[hdf5]"``.
"""

from __future__ import annotations

import threading
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.entry import Entry, RowBlob, pixels_as_file
from lora_dae.data.formats.files import root_of
from lora_dae.data.formats.writing import Splits, every_pair

NOTICE = "Fashion-Gen: under the terms of its request form"
ATTRIBUTES = ("brand", "category", "composition", "department", "gender", "name", "pose", "season", "subcategory")
_lock = threading.Lock()


def read(cfg: DataConfig) -> list[Entry]:
    root = root_of(cfg)
    files = sorted(root.glob("*.h5")) + sorted(root.glob("*.hdf5"))
    if not files:
        raise ConfigError(f"data.root={root} holds no .h5 file such as fashiongen_256_256_train.h5: is it Fashion-Gen?")
    return [entry for path in files for entry in _read_file(path)]


def _read_file(path: Path) -> list[Entry]:
    file = _open(path)
    missing = [name for name in ("input_image", "input_description", "input_productID") if name not in file]
    if missing:
        raise ConfigError(f"{path} has no {', '.join(missing)}: it is not a file of Fashion-Gen.")
    stat = path.stat()
    version = f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    columns = {name: _words(file[f"input_{name}"]) for name in ATTRIBUTES if f"input_{name}" in file}
    texts, products = _words(file["input_description"]), _words(file["input_productID"])
    split = "test" if "validation" in path.stem or "test" in path.stem else "train"
    entries = []
    for row, (text, product) in enumerate(zip(texts, products, strict=True)):
        attributes = {name: words[row] for name, words in columns.items() if words[row]}
        entries.append(
            Entry(
                id=f"{path.stem}/{row}",
                group_id=product,
                captions=(text,) if text else (),
                image=RowBlob(f"{path}[{row}]", version, partial(_image, path, row)),
                where=f"{path} row {row}",
                category=attributes.get("category", "").lower() or None,
                attributes=attributes,
                split=split,
            )
        )
    return entries


def _library() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ConfigError('fashion_gen is HDF5: pip install "lora-dae[hdf5]".') from error
    return h5py


@lru_cache(maxsize=8)
def _open(path: Path) -> Any:
    try:
        return _library().File(path, "r")
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened as HDF5 ({error}): is the download complete?") from error


def _image(path: Path, row: int) -> bytes:
    with _lock:  # HDF5 itself serves one thread at a time
        return pixels_as_file(np.asarray(_open(path)["input_image"][row]))


def _words(column: Any) -> list[str]:
    return [_text(value) for value in np.asarray(column).reshape(len(column), -1)[:, 0].tolist()]


def _text(value: Any) -> str:
    if not isinstance(value, bytes):
        return str(value).strip()
    try:
        return value.decode("utf-8").strip()
    except UnicodeDecodeError:
        return value.decode("latin-1").strip()


def write(splits: Splits, root: Path) -> None:
    """Source photos and masks are not part of the layout; validation pairs go with the training pairs."""
    h5py = _library()
    root.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Any]] = {"train": [], "validation": []}
    groups: dict[str, int] = {}
    for split, pair in every_pair(splits):
        number = groups.setdefault(pair.group_id, len(groups))
        rows["validation" if split == "test" else "train"].append((number, pair))
        if pair.image.shape != rows["train" if rows["train"] else "validation"][0][1].image.shape:
            raise ConfigError("Fashion-Gen's files hold photos of one size: export without data.buckets.")
    for name, pairs in rows.items():
        side = len(pairs[0][1].image)
        with h5py.File(root / f"fashiongen_{side}_{side}_{name}.h5", "w") as file:
            file["input_image"] = np.stack([pair.image for _, pair in pairs])
            file["input_description"] = np.array([[pair.caption.encode()] for _, pair in pairs])
            file["input_category"] = np.array([[(pair.category or "").upper().encode()] for _, pair in pairs])
            file["input_productID"] = np.array([[number] for number, _ in pairs])
            file["index"] = np.arange(len(pairs))[:, None]
