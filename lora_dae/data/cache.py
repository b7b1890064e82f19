"""Latents and text embeddings on disk, so that VAE and text encoder stay out of the training loop.

A cache is a folder named by what it holds, written once and then only read (memory-mapped):

    image_mean.npy       (N, C, h, w) float16   mean of the VAE's posterior, scaled as the UNet sees latents
    image_std.npy        (N, C, h, w) float16   its standard deviation; absent when zero (AutoencoderTiny)
    source_mean.npy      (N, C, h, w) float16   the same of the source photos; absent when there are none
    text_embeddings.npy  (T, L, D)    float16   every different caption once; row 0 is "", the null caption
    text_index.npy       (N,)         int64     which row is whose
    samples.json         ids and captions in order

Mean and deviation are kept rather than one draw, so that every epoch can draw anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from lora_dae.config import ConfigError
from lora_dae.data.pair import Pair, PairDataset

FORMAT = 1  # raise it when the layout or the meaning of the arrays changes
DTYPE = np.float16
BATCH_SIZE = 32

EncodeImages = Callable[[np.ndarray], tuple[Tensor, Tensor]]
EncodeText = Callable[[list[str]], Tensor]


class LatentCache(Dataset[dict[str, Tensor]]):
    """A cache folder as a torch data set.

    An item holds ``index`` (int64 scalar), ``latent_mean`` and ``latent_std`` (C, h, w) float32, ``text``
    (L, D) float32 and, for pairs, ``source`` (C, h, w) float32. A list of indices given at once
    (``__getitems__``, which torch's DataLoader calls) comes back as one batch of the same with a leading N.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.image_mean = _open(path, "image_mean")
        self.image_std = _open(path, "image_std") if (path / "image_std.npy").is_file() else None
        self.source_mean = _open(path, "source_mean") if (path / "source_mean.npy").is_file() else None
        self.text_embeddings = _open(path, "text_embeddings")
        self.text_index = np.load(path / "text_index.npy")
        samples = json.loads((path / "samples.json").read_text(encoding="utf-8"))
        self.ids: list[str] = samples["ids"]
        self.captions: list[str] = samples["captions"]

    def __len__(self) -> int:
        return len(self.image_mean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = np.asarray(indices, dtype=np.int64)
        mean = _rows(self.image_mean, rows)
        batch = {
            "index": torch.from_numpy(rows.copy()),
            "latent_mean": mean,
            "latent_std": torch.zeros_like(mean) if self.image_std is None else _rows(self.image_std, rows),
            "text": _rows(self.text_embeddings, self.text_index[rows]),
        }
        if self.source_mean is not None:
            batch["source"] = _rows(self.source_mean, rows)
        return batch

    @property
    def null_text(self) -> Tensor:
        """The embedding of the empty caption, (L, D) float32."""
        return torch.from_numpy(self.text_embeddings[0].astype(np.float32))


def cache_key(dataset: PairDataset, backbone_fingerprint: str) -> str:
    """16 hex digits that change with the data, its resolution, the backbone, and the cache's own format."""
    identity = {
        "format": FORMAT,
        "dtype": np.dtype(DTYPE).name,
        "data": dataset.fingerprint,
        "length": len(dataset),
        "resolution": dataset[0].image.shape[:2],
        "backbone": backbone_fingerprint,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def build_cache(
    dataset: PairDataset,
    directory: str | Path,
    encode_images: EncodeImages,
    encode_text: EncodeText,
    backbone_fingerprint: str,
    description: str = "Encoding",
) -> LatentCache:
    """Opens the cache of ``dataset`` under ``directory``; encodes everything first if it is not there.

    ``encode_images`` maps uint8 (N, H, W, 3) to the (mean, std) of scaled latents (N, C, h, w);
    ``encode_text`` maps N captions to (N, L, D). Several processes may ask for the same cache: one builds,
    the others wait and read. The folder gets its name only when it is complete, so a build that was cut
    off is started anew. Raises ConfigError for an unwritable directory, and for latents that are not
    finite in half precision.
    """
    path = Path(directory) / cache_key(dataset, backbone_fingerprint)
    if path.is_dir():
        return LatentCache(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"cannot write to the cache folder {directory} ({error.strerror}): set data.cache_dir."
        ) from error
    try:
        if not path.is_dir():
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed build may have left
            partial.mkdir()
            try:
                _write(dataset, partial, encode_images, encode_text, description)
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    finally:
        lock.release()
    return LatentCache(path)


def _write(
    dataset: PairDataset, path: Path, encode_images: EncodeImages, encode_text: EncodeText, description: str
) -> None:
    count = len(dataset)
    arrays: dict[str, np.memmap] = {}
    ids: list[str] = []
    captions: list[str] = []

    def put(name: str, start: int, value: Tensor) -> None:
        with np.errstate(over="ignore"):  # said better below
            values = value.float().cpu().numpy().astype(DTYPE)
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            raise ConfigError(
                f"the VAE's {name} of {ids[start + int(np.argmin(finite))]} is not finite in half precision: "
                "look at that photo, or use a backbone whose VAE has a sane scaling factor."
            )
        if name not in arrays:
            shape = (count, *values.shape[1:])
            arrays[name] = np.lib.format.open_memmap(path / f"{name}.npy", mode="w+", dtype=DTYPE, shape=shape)
        arrays[name][start : start + len(values)] = values

    total = -(-count // BATCH_SIZE)
    for batch in track(_batches(dataset), description=description, total=total):
        start = len(ids)
        ids += [pair.id for pair in batch]
        captions += [pair.caption for pair in batch]
        mean, std = encode_images(np.stack([pair.image for pair in batch]))
        put("image_mean", start, mean)
        if bool(std.any()):  # a memmap begins as zeros, so rows before the first deviation are right
            put("image_std", start, std)
        if dataset.has_source:
            sources = [pair.source for pair in batch if pair.source is not None]
            put("source_mean", start, encode_images(np.stack(sources))[0])
    for array in arrays.values():
        array.flush()

    unique = list(dict.fromkeys(["", *captions]))
    row = {caption: index for index, caption in enumerate(unique)}
    texts = [encode_text(unique[i : i + BATCH_SIZE]).float().cpu() for i in range(0, len(unique), BATCH_SIZE)]
    np.save(path / "text_embeddings.npy", torch.cat(texts).numpy().astype(DTYPE))
    np.save(path / "text_index.npy", np.array([row[caption] for caption in captions], dtype=np.int64))
    samples = json.dumps({"ids": ids, "captions": captions}, ensure_ascii=False, indent=0)
    (path / "samples.json").write_text(samples, encoding="utf-8")


def _batches(dataset: PairDataset) -> Iterator[list[Pair]]:
    for start in range(0, len(dataset), BATCH_SIZE):
        yield [dataset[index] for index in range(start, min(start + BATCH_SIZE, len(dataset)))]


def _open(path: Path, name: str) -> np.ndarray:
    return np.load(path / f"{name}.npy", mmap_mode="r")


def _rows(array: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(array[rows].astype(np.float32))
