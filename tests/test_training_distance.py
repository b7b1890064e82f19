"""The distance that a training follows: torchmetrics' numbers, one process or two, and no random number taken."""

from __future__ import annotations

import json
from csv import DictReader
from pathlib import Path

import numpy as np
import pytest
import torch
from compose import config
from ranks import run_ranks
from test_evaluation_measure import TinyFeatures
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lora_dae.data.sources import load_splits
from lora_dae.evaluation.metrics.features import stack_images
from lora_dae.sampling.draw import Drawer
from lora_dae.training import distance, together
from lora_dae.training import run as training
from lora_dae.training.distance import PhotoDistance

N = 5  # odd: one process has more to do


def _pictures(seed: int, top: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, top, (N, 16, 16, 3), dtype=np.uint8))


def test_two_processes_find_what_one_and_torchmetrics_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KID of one subset of all pictures: torchmetrics' random draws are then always the same."""
    monkeypatch.setattr(distance, "load_features", lambda *_: TinyFeatures())
    photos, drawn = _pictures(0, 256), _pictures(1, 200)

    def found() -> dict[str, float]:
        measure = PhotoDistance(photos, "effnet", torch.device("cpu"), paired=False)
        return measure([drawn[k] for k in together.share(N)])

    def rank(number: int) -> None:
        torch.distributed.init_process_group("gloo")
        (tmp_path / f"{number}.json").write_text(json.dumps(found()))

    ended = run_ranks(rank, tmp_path / "logs")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first == second == pytest.approx(found(), rel=1e-5)
    fid = FrechetInceptionDistance(feature=TinyFeatures(), normalize=True)
    kid = KernelInceptionDistance(feature=TinyFeatures(), normalize=True, subsets=1, subset_size=N)
    for metric in (fid, kid):
        metric.update(stack_images(photos).float() / 255, real=True)
        metric.update(stack_images(drawn).float() / 255, real=False)
    assert first == pytest.approx(
        {"fd_tiny": fid.compute().item(), "kd_tiny": kid.compute()[0].item()}, rel=1e-3, abs=1e-6
    )


def test_its_network_takes_no_random_number_from_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def draws_its_weights(*_: object) -> TinyFeatures:
        torch.rand(3)
        return TinyFeatures()  # seeds the generator

    monkeypatch.setattr(distance, "load_features", draws_its_weights)
    before = torch.get_rng_state()
    PhotoDistance(_pictures(0, 256), "effnet", torch.device("cpu"), paired=True)(_pictures(1, 200))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_training_logs_it_on_its_way(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, after two of three steps (the end is measured on the test split), on all four validation prompts."""
    pictures: list[np.ndarray] = []
    images = Drawer.images

    def kept(self: Drawer, *args: object, **kwargs: object) -> np.ndarray:
        pictures.append(images(self, *args, **kwargs))  # type: ignore[arg-type]
        return pictures[-1]

    monkeypatch.setattr(Drawer, "images", kept)
    monkeypatch.setattr(distance, "load_features", lambda *_: TinyFeatures())
    cfg = config(
        tiny_backbone, tmp_path / "run", tmp_path / "cache", "tracking.distance_every_n_steps=2", "logger=csv",
        "trainer.max_steps=3", "enhancement=none", "adapter.rank=2", "data.train_size=4", "data.val_size=4",
        "data.test_size=2", "data.batch_size=1", "data.resolution=32",
    )  # fmt: skip
    training.train(cfg)
    (drawn,) = pictures
    with (tmp_path / "run" / "csv" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        (row,) = [row for row in DictReader(file) if row["val/fd_tiny"]]
    assert row["step"] == "1" and drawn.shape == (4, 32, 32, 3)
    fid = FrechetInceptionDistance(feature=TinyFeatures(), normalize=True)
    fid.update(stack_images([pair.image for pair in load_splits(cfg.data)["val"]]).float() / 255, real=True)
    fid.update(stack_images(list(drawn)).float() / 255, real=False)
    assert float(row["val/fd_tiny"]) == pytest.approx(fid.compute().item(), rel=1e-3, abs=1e-6)
    assert float(row["val/kd_tiny"]) != 0
