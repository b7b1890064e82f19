"""The cache gives back what the encoders gave, encodes once, and notices exactly what changed."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.data.cache import LatentCache, LivePairs, build_cache
from lora_dae.data.pair import Lazy, Pair, replace_pixels
from lora_dae.data.sampler import Announced, StepBatchSampler
from lora_dae.data.store import CHUNK

CAPTIONS = ["a dress", "a hat", "a dress", ""]


class Pairs:
    """Random pairs in memory; ``edited`` names samples whose photo is another one."""

    def __init__(
        self, count: int = 40, has_source: bool = False, fingerprint: str = "pairs", has_mask: bool = False,
        edited: tuple[int, ...] = (), mirror: bool = False, captions: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.count, self.has_source, self.fingerprint, self.has_mask = count, has_source, fingerprint, has_mask
        self.edited, self.mirror, self.captions = edited, mirror, captions

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        rng = np.random.default_rng(index + 10_000 * (index in self.edited))
        image, source = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        caption = self.captions[0] if self.captions else CAPTIONS[index % 4]
        pair = Pair(str(index), str(index), caption, image, captions=self.captions, mirror=self.mirror)
        mask = np.where(np.arange(8)[:, None] < 4, 255, 0).repeat(8, 1).astype(np.uint8)
        pair = replace_pixels(pair, mask=mask) if self.has_mask else pair
        return replace(pair, source=source) if self.has_source else pair


class Encoders:
    """Stand-ins for VAE and text encoder, that count how much they were asked for."""

    def __init__(self, deviation: float = 0.0) -> None:
        self.deviation, self.images, self.texts = deviation, 0, 0

    def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        self.images += len(images)
        mean = torch.from_numpy(images[:, ::4, ::4].copy()).permute(0, 3, 1, 2) / 64
        return mean, torch.full_like(mean, self.deviation)

    def encode_text(self, captions: list[str]) -> Tensor:
        self.texts += len(captions)
        return torch.stack([torch.full((3, 5), float(len(caption))) for caption in captions])


def build(
    pairs: Pairs, path: Path | None, encoders: Encoders, vae: str = "vae", text: str = "text", **options: bool
) -> LatentCache:
    return build_cache(pairs, path, encoders.encode_images, encoders.encode_text, vae, text, **options)


@pytest.mark.parametrize("kept", ["disk", "memory"])
def test_items_are_what_the_encoders_gave(tmp_path: Path, kept: str) -> None:
    pairs, encoders = Pairs(has_source=True), Encoders(deviation=0.25)
    cache = build(pairs, tmp_path if kept == "disk" else None, encoders)
    assert len(cache) == 40 and any(tmp_path.iterdir()) == (kept == "disk")
    for index in (0, 33, 39):
        item, pair = cache[index], pairs[index]
        mean, std = encoders.encode_images(pair.image[None])
        torch.testing.assert_close(item["latent_mean"], mean[0], atol=0, rtol=1e-3)  # stored in half precision
        torch.testing.assert_close(item["latent_std"], std[0])
        source = encoders.encode_images(pair.source[None])[0]
        torch.testing.assert_close(item["source"], source[0], atol=0, rtol=1e-3)
        assert torch.equal(item["text"], encoders.encode_text([pair.caption])[0])
        assert item["index"] == index and cache.ids[index] == pair.id and cache.captions[index] == pair.caption
    assert not cache.null_text.any() and cache.null_text.shape == (3, 5)


def test_a_list_of_indices_is_one_batch(tmp_path: Path) -> None:
    cache = build(Pairs(has_source=True), tmp_path, Encoders())
    batch = cache.__getitems__([7, 3, 7])
    for name, value in batch.items():
        assert torch.equal(value, torch.stack([cache[index][name] for index in (7, 3, 7)]))


def test_without_a_cache_batches_are_the_same_to_half_precision(tmp_path: Path) -> None:
    pairs, encoders = Pairs(has_source=True, has_mask=True, mirror=True, captions=("one", "three")), Encoders(0.5)
    cached = build(pairs, tmp_path, encoders, masks=True, views=True)
    live = LivePairs(pairs, encoders.encode_images, encoders.encode_text, masks=True, views=True)
    for numbers in ([0, 1, 2], [40, 121, 82]):  # 40 + 0: the first sample in the second pass
        one, two = cached.__getitems__(numbers), live.__getitems__(numbers)
        assert one.keys() == two.keys() and "mirrored" in two
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=0, rtol=1e-3)


def test_the_next_batch_is_read_while_this_one_trains() -> None:
    """An expected batch is decoded before anybody asks for it, once, and is the same as an unexpected one."""
    loaded: list[int] = []
    there = threading.Event()

    class Slow(Pairs):
        def __getitem__(self, index: int) -> Pair:
            pair = super().__getitem__(index)

            def load() -> np.ndarray:
                loaded.append(index)
                if len(loaded) == 4:
                    there.set()
                return image

            image = pair.image
            return replace_pixels(pair, image=Lazy(load, image.shape, str(index)))

    encoders = Encoders()
    live = LivePairs(Slow(), encoders.encode_images, encoders.encode_text, masks=False, views=True)
    batches = iter(Announced(StepBatchSampler(40, 4), live.expect))
    first = next(batches)
    assert there.wait(30) and encoders.images == 0
    second = next(batches)
    assert sorted(loaded[:4]) == sorted(second)
    plain = LivePairs(Pairs(), encoders.encode_images, encoders.encode_text, masks=False, views=True)
    for numbers in (second, first):
        one, two = live.__getitems__(numbers), plain.__getitems__(numbers)
        assert all(torch.equal(one[name], two[name]) for name in two)
    assert [n for n in loaded if n in second] == loaded[:4]  # not once more


def test_the_next_chunk_is_decoded_while_the_last_batch_of_this_one_is_encoded(tmp_path: Path) -> None:
    begun = threading.Event()

    class Watched(Pairs):
        def __getitem__(self, index: int) -> Pair:
            pair = super().__getitem__(index)

            def load() -> np.ndarray:
                if index == CHUNK:
                    begun.set()
                return image

            image = pair.image
            return replace_pixels(pair, image=Lazy(load, image.shape, str(index)))

    class Waits(Encoders):
        waited = True

        def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
            if self.images + len(images) == CHUNK:
                self.waited = begun.wait(30)
            return super().encode_images(images)

    encoders = Waits()
    cache = build(Watched(count=CHUNK + 9), tmp_path, encoders)
    assert encoders.waited and encoders.images == CHUNK + 9
    photos = np.stack([Pairs()[index].image for index in (0, CHUNK - 1, CHUNK, CHUNK + 8)])
    got = cache.__getitems__([0, CHUNK - 1, CHUNK, CHUNK + 8])["latent_mean"]
    torch.testing.assert_close(got, encoders.encode_images(photos)[0], atol=0, rtol=1e-3)


def test_a_deterministic_vae_needs_no_deviation_on_disk(tmp_path: Path) -> None:
    cache = build(Pairs(), tmp_path, Encoders(deviation=0.0))
    assert not list(tmp_path.rglob("*.std.npy")) and not cache[0]["latent_std"].any()
    assert "source" not in cache[0] and "mask" not in cache[0]


def test_encodes_once_and_each_caption_once(tmp_path: Path) -> None:
    encoders = Encoders()
    build(Pairs(), tmp_path, encoders)
    build(Pairs(), tmp_path, encoders)
    assert (encoders.images, encoders.texts) == (40, 3)  # "", "a dress", "a hat"


@pytest.mark.parametrize(
    ("change", "images", "texts"),
    [
        ({"edited": (3,)}, 1, 0),
        ({"captions": ("another",)}, 0, 1),
        ({"count": 43}, 3, 0),
        ({"fingerprint": "renamed"}, 0, 0),
        ({"vae": "another"}, 40, 0),
        ({"text": "another"}, 0, 3),
        ({"mirror": True}, 40, 0),
    ],
    ids=str,
)
def test_what_changed_is_encoded_again_and_nothing_else(tmp_path: Path, change: dict, images: int, texts: int) -> None:
    build(Pairs(), tmp_path, Encoders(), views=True)
    again = Encoders()
    weights = {name: change.pop(name) for name in ("vae", "text") if name in change}
    cache = build(Pairs(**change), tmp_path, again, views=True, **weights)
    assert (again.images, again.texts) == (images, texts)
    pairs = Pairs(**change)
    expected = again.encode_images(np.stack([pairs[i].image for i in range(len(pairs))]))[0]
    if not change.get("mirror"):
        got = cache.__getitems__(range(len(pairs)))["latent_mean"]
        torch.testing.assert_close(got, expected, atol=0, rtol=1e-3)


def test_passes_show_every_caption_and_both_orientations_in_turn(tmp_path: Path) -> None:
    texts = ("1", "22", "333")
    pairs = Pairs(count=5, has_source=True, mirror=True, captions=texts)
    cache = build(pairs, tmp_path, Encoders(), views=True)
    plain = build(pairs, tmp_path, Encoders())
    for index in range(5):
        shown = [cache[index + 5 * number] for number in range(12)]
        views = [(int(v["text"][0, 0]), bool((v["latent_mean"] == plain[index]["latent_mean"]).all())) for v in shown]
        assert sorted(views[:6]) == sorted((k, m) for k in (1, 2, 3) for m in (False, True)) and views[6:] == views[:6]
        for view in shown:  # the source goes the way of its image
            same = torch.equal(view["latent_mean"], plain[index]["latent_mean"])
            assert torch.equal(view["source"], plain[index]["source"]) == same
            assert bool(view["mirrored"]) != same
    assert len({int(cache[index]["text"][0, 0]) for index in range(5)}) > 1  # not all begin with the first


def test_masks_are_shares_of_covered_area(tmp_path: Path) -> None:
    cache = build(Pairs(has_mask=True), tmp_path, Encoders(), masks=True)
    assert cache[0]["mask"].tolist() == [[[1, 1], [0, 0]]]  # the upper half of 8 x 8, on latents of 2 x 2


def test_a_build_that_broke_off_goes_on_where_it_was(tmp_path: Path) -> None:
    class Breaks(Encoders):
        def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
            if self.images >= 300:  # in the second chunk of 256
                raise KeyboardInterrupt
            return super().encode_images(images)

    with pytest.raises(KeyboardInterrupt):
        build(Pairs(count=600), tmp_path, Breaks())
    encoders = Encoders()
    assert len(build(Pairs(count=600), tmp_path, encoders)) == 600
    assert encoders.images == 600 - 256


def test_latents_that_are_not_finite_are_named(tmp_path: Path) -> None:
    class Overflows(Encoders):
        def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
            mean, std = super().encode_images(images)
            if len(images) == 8:  # the second batch of 40
                mean[5] = 1e6
            return mean, std

    with pytest.raises(ConfigError, match="latents of the image of 37 are not finite"):
        build(Pairs(), tmp_path, Overflows())


def test_the_photo_that_is_named_is_the_right_one_where_others_are_there_already(tmp_path: Path) -> None:
    class Overflows(Encoders):
        def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
            mean, std = super().encode_images(images)
            mean[1] = 1e6
            return mean, std

    build(Pairs(), tmp_path, Encoders())
    with pytest.raises(ConfigError, match="latents of the image of 30 are not finite"):
        build(Pairs(edited=(3, 30)), tmp_path, Overflows())


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the cache folder"):
        build(Pairs(), tmp_path / "file" / "cache", Encoders())
