"""Where the garment is, for photos that came without masks: a segmentation model draws them, a person looks at them.

``python -m lora_dae.data masks --to <folder>`` writes one PNG a photo, white on black, under the photo's id; what is
there already is not drawn again. Training reads the folder by ``data.masks``. The photos' own folder is only read.
"""

from __future__ import annotations

import hashlib
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
from lora_dae.data.decode import BadImageError, decode
from lora_dae.data.entry import Entry, FileBlob
from lora_dae.data.formats.files import inside

PARTS = ("garment", "person")
LONGEST_SIDE = 1024  # pixels of the photo that is shown to the model, and of its mask
LONGEST_NAME = 200  # bytes; file systems end at 255
CLOTHES = 4  # of MediaPipe's selfie_multiclass: background, hair, body skin, face skin, clothes, others
MODEL_PAGE = "https://ai.google.dev/edge/mediapipe/solutions/vision/image_segmenter"
Segment = Callable[[np.ndarray], np.ndarray]  # uint8 (H, W, 3) sRGB to bool (H, W)


def mask_path(folder: Path, id: str) -> Path:
    """The mask of the photo ``id``, always inside ``folder``. Suffixes stay: a.jpg and a.png have one each."""
    *folders, stem = inside(id).split("/")
    name = f"{stem}.png"
    if len(name.encode()) > LONGEST_NAME:
        name = f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.png"
    return folder.joinpath(*folders, name)


def add_masks(entries: list[Entry], cfg: DataConfig) -> list[Entry]:
    """The entries with the masks of ``data.masks``, where they have none of their own.

    A mask that is not there counts as an unusable file. Raises ConfigError if there is no such folder.
    """
    if cfg.masks is None:
        return entries
    folder = Path(cfg.masks).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.masks={cfg.masks} is not a folder: write it with python -m lora_dae.data masks.")
    return [e if e.mask else replace(e, mask=FileBlob(mask_path(folder, e.id))) for e in entries]


def fill_masks(entries: list[Entry], to: Path, segment: Segment, background: str = "white") -> tuple[int, list[str]]:
    """Writes the masks of entries that have none; returns how many there are then, and the ids of empty ones.

    A photo that cannot be read is left out. A mask is as upright as its photo and at most LONGEST_SIDE large.
    """
    bare = [entry for entry in entries if entry.mask is None]
    count, empty = 0, []
    for entry in track(bare, description="Drawing masks"):
        path = mask_path(to, entry.id)
        if not path.is_file():
            try:
                photo = decode(entry.image.read(), LONGEST_SIDE, background)
            except (BadImageError, OSError):
                continue  # data.max_bad_fraction tells about it when it comes to training
            photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            mask = segment(np.asarray(photo))
            if not mask.any():
                empty.append(entry.id)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".partial{os.getpid()}")
            Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(partial, "PNG")
            os.replace(partial, path)  # a killed run leaves no half mask
        count += 1
    return count, empty


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
