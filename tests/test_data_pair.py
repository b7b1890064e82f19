"""A pair decodes what is looked at, once, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora_dae.data.pair import Lazy, Pair, replace_pixels

IMAGE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)


def counted(log: list[str], part: str, pixels: np.ndarray) -> Lazy:
    def load() -> np.ndarray:
        log.append(part)
        return pixels

    return Lazy(load, pixels.shape, f"key of {part}")


def test_pixels_are_decoded_at_the_first_look_and_once() -> None:
    log: list[str] = []
    pair = Pair("1", "1", "a dress", counted(log, "image", IMAGE), mask=counted(log, "mask", IMAGE[..., 0]))
    assert (pair.caption, pair.size, pair.key("image"), pair.key("source")) == ("a dress", (2, 4), "key of image", None)
    without = replace_pixels(pair, mask=None)
    assert log == [] and without.mask is None and pair.source is None
    assert pair.image is pair.image
    assert log == ["image"]


def test_arrays_may_be_given_and_replaced() -> None:
    pair = Pair("1", "1", "a dress", IMAGE, source=IMAGE)
    assert pair.image is IMAGE and pair.source is IMAGE and pair.size == (2, 4)
    assert replace(pair, source=None).source is None
    with pytest.raises(TypeError):
        Pair("1", "1", "a dress")  # type: ignore[call-arg]


def test_the_key_of_an_array_follows_its_pixels() -> None:
    edited = IMAGE.copy()
    edited[1, 2, 0] ^= 1
    keys = {Pair("1", "1", "", pixels).key("image") for pixels in (IMAGE, edited, IMAGE.reshape(4, 2, 3))}
    assert len(keys) == 3 and Pair("2", "2", "other", IMAGE.copy()).key("image") in keys


def test_mirroring_turns_all_three_and_changes_their_keys() -> None:
    log: list[str] = []
    pair = Pair("1", "1", "", counted(log, "image", IMAGE), source=IMAGE, mask=counted(log, "mask", IMAGE[..., 0]))
    mirrored = pair.mirrored()
    assert log == []
    np.testing.assert_array_equal(mirrored.image, IMAGE[:, ::-1])
    np.testing.assert_array_equal(mirrored.source, IMAGE[:, ::-1])
    np.testing.assert_array_equal(mirrored.mask, IMAGE[:, ::-1, 0])
    assert all(pair.key(part) != mirrored.key(part) for part in ("image", "source", "mask"))
