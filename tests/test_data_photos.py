"""Photos as a data set: what several threads do to it at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_dae.config import DataConfig
from lora_dae.data import photos
from lora_dae.data.sources import load_photos


def test_two_photos_are_decoded_at_the_same_time(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits inside its decoder for the other one to be there as well."""
    both, decode = threading.Barrier(2, timeout=20), photos.decode

    def meet(*given: Any) -> Image.Image:
        both.wait()
        return decode(*given)

    cfg = DataConfig(name="folder", root=str(tiny_folder), resolution=32, cache_dir=str(tmp_path / "cache"))
    train = load_photos(cfg)["train"]
    monkeypatch.setattr(photos, "decode", meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda index: train[index].image, (0, 1)))
    assert [image.shape for image in found] == [(32, 32, 3)] * 2 and (found[0] != found[1]).any()


def test_a_pairs_photo_is_decoded_once_for_its_image_and_its_frame(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = [], photos.decode

    def counted(*given: Any) -> Image.Image:
        decoded.append(given)
        return decode(*given)

    cfg = DataConfig(name="folder", root=str(tiny_folder), resolution=32, cache_dir=str(tmp_path / "cache"))
    train = load_photos(cfg)["train"]
    monkeypatch.setattr(photos, "decode", counted)
    assert train[0].image.any() and len(decoded) == 1
