"""Whole runs on photos: buckets, mirroring, masks, captions and every kind of cache go through training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from compose import config
from PIL import Image
from ranks import run_ranks

from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig, ConfigError
from lora_dae.data.export import export
from lora_dae.training import run as training
from lora_dae.training.paired import refining_loss

QUICK = ("enhancement=none", "evaluation.frozen=false", "trainer.max_steps=3", "trainer.log_every_n_steps=1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs with masks, tall and square in turn."""
    root = tmp_path_factory.mktemp("photos")
    rows = []
    for part in ("images", "source", "mask"):
        (root / part).mkdir()
    for number in range(20):
        size = (64, 64) if number % 2 else (48, 64)
        for part in ("images", "source"):
            rng = np.random.default_rng(number + 100 * (part == "source"))
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / part / f"{number}.png")
        mask = np.zeros((size[1], size[0]), np.uint8)
        mask[:20] = 255
        Image.fromarray(mask).save(root / "mask" / f"{number}.png")
        split = "test" if number < 4 else "val" if number < 8 else "train"
        rows.append({"file_name": f"images/{number}.png", "text": "a dress, red, long, plaid", "split": split})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def losses(run_dir: Path, name: str = "train/loss") -> list[float]:
    with (run_dir / "csv" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_buckets_and_all_caches_train_alike(tiny_backbone: Path, photos: Path, tmp_path: Path) -> None:
    """Tall and square batches, mirrored or not, garment weighted: the same losses however they are cached."""
    options = (
        "data=folder", f"data.root={photos}", "conditioning=source", "data.buckets=[48x64,64x64]",
        "data.bucket_step=16", "data.flip=true", "data.captions.shuffles=2", "objective.garment_weight=3", *QUICK,
    )  # fmt: skip
    seen = {}
    for cache in ("disk", "memory", "off"):
        run_dir = tmp_path / cache
        training.run(config(tiny_backbone, run_dir, tmp_path / "cache", f"data.cache={cache}", *options))
        seen[cache] = losses(run_dir)
        assert "buckets of several sizes" in (run_dir / "report.html").read_text()
    assert len(seen["disk"]) == 3 and seen["disk"] == seen["memory"]
    np.testing.assert_allclose(seen["off"], seen["disk"], rtol=5e-3)  # half precision on disk
    validated = {cache: losses(tmp_path / cache, "val/loss") for cache in seen}  # in both sizes as well
    assert validated["disk"] and validated["disk"] == validated["memory"]
    np.testing.assert_allclose(validated["off"], validated["disk"], rtol=5e-3)
    plain = config(tiny_backbone, tmp_path / "plain", tmp_path / "cache", *(o for o in options if "weight" not in o))
    training.run(plain)
    assert losses(tmp_path / "plain") != seen["disk"]


def test_two_processes_train_buckets_as_one_does(tiny_backbone: Path, photos: Path, tmp_path: Path) -> None:
    """Tall and square batches: both processes have the same shape in each step, and one process's losses together."""
    options = (
        "data=folder", f"data.root={photos}", "conditioning=source", "data.buckets=[48x64,64x64]",
        "data.bucket_step=16", "data.flip=true", "trainer.max_steps=4", "trainer.val_check_interval=2", *QUICK[:2],
        "trainer.log_every_n_steps=1",
    )  # fmt: skip
    training.train(config(tiny_backbone, tmp_path / "one", tmp_path / "cache", "data.batch_size=4", *options))

    def rank(number: int) -> None:
        two = ("trainer=ddp", "trainer.devices=2", "data.batch_size=2")
        seen = Shapes()
        training.train(config(tiny_backbone, tmp_path / "two", tmp_path / "cache", *two, *options), [seen])
        torch.save(seen.found, tmp_path / f"{number}.pt")

    ended = run_ranks(rank, tmp_path / "logs")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    shapes = [torch.load(tmp_path / f"{number}.pt") for number in (0, 1)]
    assert shapes[0] == shapes[1] and len(set(shapes[0])) == 2
    for name, count in (("train/loss", 4), ("val/loss", 2)):
        one, two = (losses(tmp_path / run, name) for run in ("one", "two"))
        assert len(one) == count and two == pytest.approx(one, rel=1e-4)


class Shapes(lightning.Callback):
    """Height and width of every batch's latents."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(tuple(batch["latent_mean"].shape[2:]))


def test_the_decoder_stage_sees_the_photos_of_its_latents(
    tiny_backbone: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirrored ones of mirrored samples: encoded, they are the batch's latents up to half precision."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    mirrored: list[bool] = []

    def noted(*parts: Any) -> torch.Tensor:
        batch, given = parts[3], parts[6]

        def shown(*numbers: Any) -> tuple[torch.Tensor, torch.Tensor]:
            real, source = given(*numbers)
            pairs.extend([(batch["latent_mean"], real), (batch["source"], source)])
            mirrored.extend(batch["mirrored"].tolist())
            return real, source

        return refining_loss(*parts[:6], shown, *parts[7:])

    monkeypatch.setattr("lora_dae.training.module.refining_loss", noted)
    options = (
        "data=folder", f"data.root={photos}", "conditioning=source", "data.resolution=64", "data.flip=true",
        "enhancement.gain=false", "enhancement.texture=false", "enhancement.batch_size=6", "trainer.max_steps=1",
    )  # fmt: skip
    training.train(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))

    def distance(images: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return (backbone.encode_images(pixels)[0] - latents).flatten(1).norm(dim=1)

    assert len(pairs) == 2 * 2 and set(mirrored) == {False, True}
    for latents, images in pairs:
        assert (distance(images, latents) < 0.05 * distance(images.flip(3), latents)).all()


@pytest.mark.parametrize("layout", ["fashion_mannequin", "shards"])
def test_exported_pairs_are_trained_on(layout: str, tiny_backbone: Path, tmp_path: Path) -> None:
    """conf/data/<layout>.yaml as it is, on the studio written in that layout."""
    cache = tmp_path / "cache"
    studio = config(tiny_backbone, tmp_path / "unused", cache, "data.train_size=8", "data.val_size=4")
    export(studio.data, layout, tmp_path / "data")
    options = (f"data={layout}", f"data.root={tmp_path / 'data'}", "conditioning=source", *QUICK)
    training.run(config(tiny_backbone, tmp_path / "run", cache, *options))
    assert (tmp_path / "run" / "adapter" / "source_input.safetensors").is_file()
    assert len(losses(tmp_path / "run")) == 3


PAIRED = {"viton_hd": True, "dress_code": True, "webdataset": False, "hf": False, "deepfashion_multimodal": False,
          "fashion_product": False, "fashion_gen": False}  # fmt: skip


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of the layouts share."""
    return tmp_path_factory.mktemp("rendered")


@pytest.mark.parametrize("layout", PAIRED)
def test_a_step_on_every_layout(layout: str, rendered: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    """conf/data/<layout>.yaml as it is decides whether the source photo steers."""
    studio = config(tiny_backbone, tmp_path / "unused", rendered, "data.train_size=8", "data.val_size=4")
    export(studio.data, layout, tmp_path / "data")
    options = (f"data={layout}", f"data.root={tmp_path / 'data'}", *QUICK[:2], "trainer.max_steps=1")
    trained = training.train(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    assert (trained.run_dir / "adapter" / "source_input.safetensors").is_file() == PAIRED[layout]


def test_buckets_that_the_backbone_cannot_take(tiny_backbone: Path, photos: Path, tmp_path: Path) -> None:
    options = ("data=folder", f"data.root={photos}", "data.buckets=[60x64]", "data.bucket_step=4")
    with pytest.raises(ConfigError, match="60x64, not a multiple of 8"):
        training.run(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))


def test_a_run_is_never_kept_in_the_data(tiny_backbone: Path, photos: Path, tmp_path: Path) -> None:
    before = sorted(photos.rglob("*"))
    with pytest.raises(ConfigError, match="run_dir=.* which is only read"):
        training.run(
            config(tiny_backbone, photos / "runs" / "a", tmp_path / "cache", "data=folder", f"data.root={photos}")
        )
    assert sorted(photos.rglob("*")) == before


def test_garment_weight_needs_masks(tiny_backbone: Path, tiny_folder: Path, tmp_path: Path) -> None:
    options = ("data=folder", f"data.root={tiny_folder}", "objective.garment_weight=2")
    with pytest.raises(ConfigError, match="needs garment masks"):
        training.run(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))


def test_captions_that_are_cut_are_said(
    tiny_backbone: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " ".join(["dress"] * 60)
    options = ("data=folder", f"data.root={photos}", f"data.captions.template='{long} {{split}}'", *QUICK)
    with pytest.raises(ConfigError, match="data.captions.template needs split"):
        training.run(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    options = ("data=folder", f"data.root={photos}", f"data.captions.trigger='{long}'", *QUICK)
    options = (*options, "backbone.text_chunks=2")
    training.run(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    assert "different captions have more than the 30 tokens" in " ".join(capsys.readouterr().out.split())
