"""SDXL is told each photo's own size, crop and target: numbers by hand, and what reaches the UNet of a real run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapter_loss import adapter_loss
from compose import config
from conftest import write_photos
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from family_models import write_backbone

from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.pooled import pooled_width, unpack, with_sizes
from lora_dae.config import BackboneConfig, DataConfig, ObjectiveConfig
from lora_dae.data.buckets import choose_bucket, fit_bucket, origin_of, parse_buckets
from lora_dae.data.sources import load_photos
from lora_dae.training import run as training
from lora_dae.training.objective import draw, seeded

# SDXL's own training sizes (Podell et al. 2023, appendix I), as (width, height).
PUBLISHED = [(512, 2048), (576, 1664), (640, 1536), (704, 1408), (768, 1344), (832, 1216), (896, 1152), (960, 1088),
             (1024, 1024), (1024, 960), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (1728, 576)]  # fmt: skip


@pytest.mark.parametrize(
    ("photo", "bucket", "origin"),
    [
        ((2048, 2048), (1024, 1024), (2048, 2048, 0, 0)),  # scaled alone
        ((1664, 2432), (832, 1216), (2432, 1664, 0, 0)),
        ((1700, 2432), (832, 1216), (2432, 1700, 0, 9)),  # half as large, 850 wide: 9 go on either side
        ((1664, 2532), (832, 1216), (2532, 1664, 25, 0)),  # 1266 high: 25 go above and below
    ],
)
def test_origin_by_hand(photo: tuple[int, int], bucket: tuple[int, int], origin: tuple[int, ...]) -> None:
    assert origin_of(photo, bucket) == origin


def test_crop_is_where_the_pixels_come_from() -> None:
    """A photo whose columns count upwards: the first that is left is column ``left`` of the scaled photo."""
    from PIL import Image

    columns = np.tile(np.arange(103, dtype=np.uint8), (100, 1))
    photo = Image.fromarray(np.stack([columns] * 3, axis=-1))
    height, width, top, left = origin_of(photo.size, (100, 100))
    assert (height, width, top) == (100, 103, 0)
    assert abs(int(fit_bucket(photo, (100, 100))[50, 0, 0]) - left) <= 1


@pytest.mark.parametrize("aspect", [0.5, 0.6, 2 / 3, 0.75, 0.8, 1.0, 1.25, 4 / 3, 1.5, 16 / 9, 2.0])
def test_buckets_have_the_area_of_1024_squared(aspect: float) -> None:
    buckets = parse_buckets(["auto"], 1024)
    width, height = choose_bucket((round(2000 * math.sqrt(aspect)), round(2000 / math.sqrt(aspect))), buckets, 1024)
    assert width % 64 == 0 and height % 64 == 0
    assert width * height / 1024**2 == pytest.approx(1, abs=0.1)
    assert set(PUBLISHED) <= set(buckets)


def test_pairs_know_their_origin(tmp_path: Path) -> None:
    """In buckets always; in squares for square photos, as the crop of others depends on their pixels."""
    write_photos(tmp_path / "photos", 8, size=(60, 40))
    common = {"name": "folder", "root": str(tmp_path / "photos"), "resolution": 32, "cache_dir": str(tmp_path / "c"),
              "val_fraction": 0.25, "test_fraction": 0.25}  # fmt: skip
    bucketed, square = (load_photos(DataConfig(**common, buckets=b))["train"][0] for b in (["auto"], []))  # type: ignore[arg-type]
    height, width = bucketed.size
    assert width > height and bucketed.origin == origin_of((60, 40), (width, height))
    assert bucketed.size_ids == (40, 60, *bucketed.origin[2:], height, width)  # type: ignore[index]
    assert square.origin is None and square.size_ids == (32, 32, 0, 0, 32, 32)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("sizes") / "sdxl", "sdxl")


def test_unet_sees_what_diffusers_would_give_it(sdxl: Path) -> None:
    """The same output as with added_cond_kwargs, bit for bit; none given: the image's own size."""
    backbone = load_backbone(BackboneConfig(name="folder", path=str(sdxl)))
    unet, packed = backbone.unet, backbone.encode_text(["a red dress", "a blue shirt"])
    width = pooled_width(unet.config)
    sizes = torch.tensor([[2432.0, 1664, 0, 25, 48, 32], [40, 60, 3, 0, 48, 32]])
    text, pooled = unpack(packed, width)
    sample = torch.randn(2, 4, 24, 16)
    with torch.no_grad():
        own = torch.tensor([[48.0, 32, 0, 0, 48, 32]] * 2)
        for given, seen in ((with_sizes(packed, sizes, width), sizes), (packed, own)):
            ours = unet(sample, 500, encoder_hidden_states=given).sample
            added = {"text_embeds": pooled, "time_ids": seen}
            assert torch.equal(ours, unet(sample, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample)
    assert torch.equal(with_sizes(packed, sizes, width)[:, :-1], packed[:, :-1])


def test_sizes_stay_where_captions_are_dropped(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(BackboneConfig(name="folder", path=str(sdxl)))
    seen: list[torch.Tensor] = []
    original = UNet2DConditionModel.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["added_cond_kwargs"]["time_ids"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    sizes = torch.tensor([[64.0, 48, 0, 5, 32, 32], [32, 32, 0, 0, 32, 32]])
    zeros = torch.zeros(2, 4, 16, 16)
    batch = {"latent_mean": zeros, "latent_std": zeros, "text": backbone.encode_text(["a dress", "a shirt"]),
             "size_ids": sizes}  # fmt: skip
    draws = draw(batch, 1000, ObjectiveConfig(caption_dropout=0.999999), [seeded(0, k) for k in range(len(zeros))])
    assert bool(draws.drop_caption.all())
    adapter_loss(backbone.unet, backbone.scheduler, batch, backbone.encode_text([""])[0], draws, 5.0)
    assert torch.equal(seen[0], sizes)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_run_in_buckets_tells_them_to_the_unet(
    cache: str, sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("wide", (60, 40)), ("tall", (40, 60))):
        write_photos(tmp_path / name, 8, size)
        for file in (tmp_path / name / "images").iterdir():
            (tmp_path / "photos").mkdir(exist_ok=True)
            file.rename(tmp_path / "photos" / f"{name}_{file.name}")
            (tmp_path / "photos" / f"{name}_{file.stem}.txt").write_text("a dress")
    nothing = SimpleNamespace(methods={}, references={}, corrected=dict), np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(training, "evaluate_run", lambda *args, **kwargs: nothing)
    seen: set[tuple[float, ...]] = set()
    original = UNet2DConditionModel.forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            seen.update(tuple(row) for row in kwargs["added_cond_kwargs"]["time_ids"].tolist())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    cfg = config(
        sdxl, tmp_path / "run", tmp_path / "cache", "backbone=folder", "data=folder",
        f"data.root={tmp_path / 'photos'}", "data.resolution=32",
        "data.buckets=[auto]", "data.batch_size=2", "adapter.rank=2", "enhancement=none",
        "data.val_fraction=0.25", "data.test_fraction=0.25", f"data.cache={cache}", "trainer.max_steps=4",
    )  # fmt: skip
    training.run(cfg)
    buckets = parse_buckets(["auto"], 32)
    expected = set()
    for size in ((60, 40), (40, 60)):
        bucket = choose_bucket(size, buckets, 32)
        expected.add((*origin_of(size, bucket), bucket[1], bucket[0]))
    assert seen == expected
