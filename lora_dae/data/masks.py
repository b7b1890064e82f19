"""Where the garment is, for photos that came without masks: a segmentation model draws them, a person looks at them.

``python -m lora_dae.data masks --to <folder>`` writes one PNG a photo, white on black, under the photo's id; what is
there already is not drawn again unless the id has another photo since, which ``index.jsonl`` beside the masks tells.
Training reads the folder by ``data.masks``. The photos' own folder is only read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.catalog import digests_of, say_once
from lora_dae.data.decode import BadImageError, decode, open_image
from lora_dae.data.entry import Blob, Entry, FileBlob, RowBlob, spelled
from lora_dae.data.formats.files import inside, read_jsonl
from lora_dae.data.pair import PairDataset

PARTS = ("garment", "person")
LONGEST_SIDE = 1024  # pixels of the photo that is shown to the model, and of its mask
LONGEST_NAME = 200  # bytes; file systems end at 255
INDEX = "index.jsonl"  # a line a mask: id, part, and sha-256 of the photo as "digest"; of an id the last line counts
LOOKED_AT = 64  # masks, before a training
CLOTHES = 4  # of MediaPipe's selfie_multiclass: background, hair, body skin, face skin, clothes, others
MODEL_PAGE = "https://ai.google.dev/edge/mediapipe/solutions/vision/image_segmenter"
Segment = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) sRGB to bool (H, W)


def decode_mask(data: bytes, draft: int | None = None) -> Image.Image:
    """The bytes of anybody's mask as upright gray, bright where the garment is. Raises BadImageError.

    What is transparent is no garment. Where 1 is the highest value, it is the garment. In a palette that begins with
    black and has colors, as segmentation tools write one, everything but the black is garment, however dark.
    """
    color = np.asarray(decode(data, draft, "black"))
    photo = open_image(data)
    if photo.mode == "P" and (photo.getpalette() or [])[:3] == [0, 0, 0] and np.ptp(color, axis=-1).any():
        return Image.fromarray(np.where(color.any(axis=-1), 255, 0).astype(np.uint8))
    gray = np.asarray(Image.fromarray(color).convert("L"))
    return Image.fromarray(gray * 255 if gray.max() == 1 else gray)


def check_garments(train: PairDataset, cfg: DataConfig) -> None:
    """Raises ConfigError where LOOKED_AT masks from all over a split show no garment at all."""
    if not train.has_mask:
        return
    looked_at = range(0, len(train), -(-len(train) // LOOKED_AT))
    if not any((mask := train[index].mask) is not None and mask.any() for index in looked_at):
        raise ConfigError(
            f"none of {len(looked_at)} garment masks looked at in {cfg.masks or cfg.root} has a pixel of a garment: "
            "draw garments white or 1 on black (colors need a palette that begins with black), or take the masks away."
        )


def mask_path(folder: Path, id: str) -> Path:
    """The mask of the photo ``id``, always inside ``folder``. Suffixes stay: a.jpg and a.png have one each."""
    *folders, stem = inside(id).split("/")
    name = f"{stem}.png"
    if len(name.encode()) > LONGEST_NAME:
        name = f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.png"
    return folder.joinpath(*folders, name)


def add_masks(entries: list[Entry], cfg: DataConfig) -> list[Entry]:
    """The entries with the masks of ``data.masks``, where they have none of their own.

    A mask that is not there, or was drawn on another photo, counts as an unusable file. Raises ConfigError if there is
    no such folder.
    """
    if cfg.masks is None:
        return entries
    folder = Path(cfg.masks).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.masks={cfg.masks} is not a folder: write it with python -m lora_dae.data masks.")
    index = _read_index(folder)
    told = [entry for entry in entries if entry.mask is None and index.get(entry.id, {}).get("digest")]
    now = digests_of(told, cfg.cache_dir)
    others = [id for id, digest in now.items() if index[id]["digest"] != digest]
    if others:
        say_once(
            f"{len(others)} of {len(now)} masks in {cfg.masks} were drawn on other photos than those that have their "
            f"ids now ({others[0]} is the first), and are not used: python -m lora_dae.data masks --to {cfg.masks} "
            "draws new ones"
        )
    changed = set(others)

    def mask_of(entry: Entry) -> Blob:
        path = mask_path(folder, entry.id)
        return RowBlob(spelled(path), "", _another_photo) if entry.id in changed else FileBlob(path)

    return [entry if entry.mask else replace(entry, mask=mask_of(entry)) for entry in entries]


def _another_photo() -> bytes:
    raise BadImageError("was drawn on another photo than the one that has its id now")


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """id -> the index's line; nothing of masks from before there was an index, or of other hands."""
    path = folder / INDEX
    return {str(row.get("id")): row for _, row in read_jsonl(path)} if path.is_file() else {}


def fill_masks(
    entries: list[Entry], to: Path, segment: Segment, background: str = "white", part: str = "garment"
) -> tuple[int, list[str]]:
    """Writes the masks of entries that have none; returns how many there are then, and the ids of empty ones.

    A photo that cannot be read is left out. A mask is as upright as its photo and at most LONGEST_SIDE large. One whose
    id has another photo since is drawn anew. Raises ConfigError where the folder holds masks of another ``part``.
    """
    index = _read_index(to)
    held = {row["part"] for id, row in index.items() if row.get("part") and mask_path(to, id).is_file()} - {part}
    if held:
        raise ConfigError(f"--to {to} holds masks of the {held.pop()}: give those of --part {part} another folder.")
    bare = [entry for entry in entries if entry.mask is None]
    count, empty = 0, []
    to.mkdir(parents=True, exist_ok=True)
    with (to / INDEX).open("a", encoding="utf-8") as lines:
        for entry in track(bare, description="Drawing masks"):
            path, told = mask_path(to, entry.id), index.get(entry.id, {}).get("digest")
            there = path.is_file()
            if not there or told is not None:
                try:
                    data = entry.image.read()
                    digest = hashlib.sha256(data).hexdigest()
                    photo = None if there and digest == told else decode(data, LONGEST_SIDE, background)
                except (BadImageError, OSError):
                    continue  # data.max_bad_fraction tells about it when it comes to training
                if photo is not None:
                    photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                    mask = segment(np.asarray(photo))
                    if not mask.any():
                        empty.append(entry.id)
                    _save(mask, path)
                    lines.write(json.dumps({"id": entry.id, "digest": digest, "part": part}, ensure_ascii=False) + "\n")
                    lines.flush()
            count += 1
    return count, empty


def _save(mask: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial{os.getpid()}")
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(partial, "PNG")
    os.replace(partial, path)  # a killed run leaves no half mask


@contextmanager
def mediapipe_segmenter(model: Path, part: str) -> Iterator[Segment]:
    """MediaPipe's image segmenter with the model file ``model`` (.tflite); ``part`` is garment or person.

    A model with one output knows persons; one with classes has the background first and may name one "clothes".
    Raises ConfigError, in one sentence, where library, file or class is missing.
    """
    if not model.is_file():
        raise ConfigError(
            f"--model {model} does not exist: download selfie_multiclass_256x256.tflite (garment or person) or "
            f"selfie_segmenter.tflite (person) from {MODEL_PAGE}."
        )
    try:
        import mediapipe
        from mediapipe.tasks import python as tasks
        from mediapipe.tasks.python import vision
    except (ImportError, OSError) as error:  # OSError: a system library that it needs
        raise ConfigError(f'masks are drawn by MediaPipe ({error}): pip install "lora-dae[masks]".') from error
    options = vision.ImageSegmenterOptions(
        base_options=tasks.BaseOptions(model_asset_buffer=model.read_bytes()), output_confidence_masks=True
    )
    try:
        segmenter = vision.ImageSegmenter.create_from_options(options)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"--model {model} is no image segmenter that MediaPipe can load ({reason}).") from error
    labels = [label.lower() for label in segmenter.labels]

    def segment(photo: np.ndarray) -> np.ndarray:
        picture = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(photo))
        masks: list[Any] = segmenter.segment(picture).confidence_masks
        shares = np.stack([np.asarray(mask.numpy_view()).reshape(photo.shape[:2]) for mask in masks])
        return choose(shares, labels, part)

    try:
        yield segment
    finally:
        segmenter.close()  # left to the end of the process, it would complain


def choose(shares: np.ndarray, labels: list[str], part: str) -> np.ndarray:
    """bool (H, W) of ``part`` from confidences (classes, H, W) in [0, 1]; ConfigError where no class is clothes."""
    if part == "person":
        return shares[0] >= 0.5 if len(shares) == 1 else shares.argmax(0) != 0
    named = [k for k, label in enumerate(labels) if "cloth" in label]
    if not named and len(shares) == 6:
        named = [CLOTHES]
    if not named:
        raise ConfigError(
            f"--model knows no clothes ({', '.join(labels) or f'{len(shares)} unnamed classes'}): take "
            f"selfie_multiclass_256x256.tflite from {MODEL_PAGE}, or --part person."
        )
    return np.isin(shares.argmax(0), named)
