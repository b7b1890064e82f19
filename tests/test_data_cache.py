"""The cache gives back what the encoders gave, encodes once, and notices every change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.data.cache import LatentCache, build_cache, cache_key
from lora_dae.data.pair import Pair

CAPTIONS = ["a dress", "a hat", "a dress", ""]


class Pairs:
    """Random pairs in memory."""

    has_mask = False

    def __init__(self, count: int = 40, has_source: bool = False, fingerprint: str = "pairs") -> None:
        self.count, self.has_source, self.fingerprint = count, has_source, fingerprint

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Pair:
        image, source = np.random.default_rng(index).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        pair = Pair(str(index), str(index), CAPTIONS[index % 4], image)
        return replace(pair, source=source) if self.has_source else pair


class Encoders:
    """Stand-ins for VAE and text encoder, that count how much they were asked for."""

    def __init__(self, deviation: float = 0.0) -> None:
        self.deviation, self.images, self.texts = deviation, 0, 0

    def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        self.images += len(images)
        mean = torch.from_numpy(images[:, ::4, ::4]).permute(0, 3, 1, 2) / 64
        return mean, torch.full_like(mean, self.deviation)

    def encode_text(self, captions: list[str]) -> Tensor:
        self.texts += len(captions)
        return torch.stack([torch.full((3, 5), float(len(caption))) for caption in captions])


def build(pairs: Pairs, path: Path, encoders: Encoders, backbone: str = "backbone") -> LatentCache:
    return build_cache(pairs, path, encoders.encode_images, encoders.encode_text, backbone)


def test_items_are_what_the_encoders_gave(tmp_path: Path) -> None:
    pairs, encoders = Pairs(has_source=True), Encoders(deviation=0.25)
    cache = build(pairs, tmp_path, encoders)
    assert len(cache) == 40
    for index in (0, 33, 39):
        item, pair = cache[index], pairs[index]
        assert pair.source is not None
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


def test_a_deterministic_vae_needs_no_deviation_on_disk(tmp_path: Path) -> None:
    cache = build(Pairs(), tmp_path, Encoders(deviation=0.0))
    assert not (cache.path / "image_std.npy").exists() and not cache[0]["latent_std"].any()
    assert "source" not in cache[0]


def test_encodes_once_and_each_caption_once(tmp_path: Path) -> None:
    encoders = Encoders()
    build(Pairs(), tmp_path, encoders)
    build(Pairs(), tmp_path, encoders)
    assert (encoders.images, encoders.texts) == (40, 3)  # "", "a dress", "a hat"


def test_every_change_is_another_cache() -> None:
    class Larger(Pairs):
        def __getitem__(self, index: int) -> Pair:
            return replace(super().__getitem__(index), image=np.zeros((16, 16, 3), np.uint8))

    keys = {
        cache_key(Pairs(), "backbone"),
        cache_key(Pairs(), "another backbone"),
        cache_key(Pairs(fingerprint="edited"), "backbone"),
        cache_key(Pairs(count=39), "backbone"),
        cache_key(Larger(), "backbone"),
    }
    assert len(keys) == 5


def test_a_build_that_broke_off_leaves_nothing_and_is_started_anew(tmp_path: Path) -> None:
    class Breaks(Encoders):
        def encode_text(self, captions: list[str]) -> Tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(Pairs(), tmp_path, Breaks())
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    killed = tmp_path / f"{cache_key(Pairs(), 'backbone')}.partial"
    killed.mkdir()
    (killed / "image_mean.npy").write_bytes(b"half")
    assert len(build(Pairs(), tmp_path, Encoders())) == 40
    assert not killed.exists()


def test_latents_that_are_not_finite_are_named(tmp_path: Path) -> None:
    class Overflows(Encoders):
        def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
            mean, std = super().encode_images(images)
            if len(images) == 8:  # the second batch of 40
                mean[5] = 1e6
            return mean, std

    with pytest.raises(ConfigError, match="image_mean of 37 is not finite"):
        build(Pairs(), tmp_path, Overflows())


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the cache folder"):
        build(Pairs(), tmp_path / "file" / "cache", Encoders())
