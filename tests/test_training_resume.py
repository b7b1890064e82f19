"""A run that goes on: where from, and that it ends as the straight run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import config
from conftest import write_photos
from PIL import Image
from ranks import run_ranks
from safetensors.torch import load_file
from test_training_ddp import distance

from lora_dae.config import Config, ConfigError
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.report.plots import read_metrics
from lora_dae.training import run as training
from lora_dae.training.module import LoraDae
from lora_dae.training.resume import check_origin

Make = Callable[..., Config]
STAGES = ("enhancement.max_steps=2", "trainer.val_check_interval=1")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs of this file: the studio is rendered once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tiny_backbone: Path, tmp_path: Path, cache: Path) -> Make:
    return lambda *overrides, name="run": config(tiny_backbone, tmp_path / name, cache, *overrides)


@pytest.fixture(scope="session")
def straight(tiny_backbone: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    training.train(config(tiny_backbone, run_dir, cache, *STAGES))
    return run_dir


def killed_in(stage: str) -> Callable[..., torch.Tensor]:
    """A training step that dies in a stage's second."""
    original = LoraDae.training_step

    def dies(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert self.stage != stage or self.global_step < 1
        return original(self, batch, batch_idx)

    return dies


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


def test_resumed_run_equals_straight_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """N + N steps = 2N steps, bit for bit: weights, moving average, enhancement; also dropout, also accumulated."""
    options = ("trainer.max_steps=4", "trainer.val_check_interval=2", "enhancement.max_steps=2",
               "enhancement.texture_steps=3", "adapter.dropout=0.1", "trainer.log_every_n_steps=1",
               "trainer.accumulate_grad_batches=2")  # fmt: skip
    training.run(make(*options, name="straight"))
    cut = make(*options, name="cut")

    class KilledError(Exception):
        pass

    original = LoraDae.training_step

    def dies_at_step_3(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.stage == "adapter" and self.global_step == 3:
            raise KilledError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LoraDae, "training_step", dies_at_step_3)
    with pytest.raises(KilledError):
        training.run(cut)
    monkeypatch.setattr(LoraDae, "training_step", original)
    training.run(make(*options, "ckpt_path=last", name="cut"))
    read, expected = (read_metrics(Path(make(name=n).run_dir) / "csv" / "metrics.csv") for n in ("cut", "straight"))
    for name in ("train/loss", "val/loss"):  # the log up to the kill is kept, and read
        assert read[name] == expected[name] and read[name][0]
    whole, resumed = (weights(Path(make(name=n).run_dir)) for n in ("straight", "cut"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_run_goes_on_with_another_way_to_compute_the_same(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the other half of a training has less memory; up to rounding it is the straight run."""
    options = ("enhancement=none", "adapter.rank=2", "trainer.max_steps=3", "trainer.val_check_interval=2")
    training.train(make(*options, name="straight"))
    original = LoraDae.training_step

    def dies(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert self.global_step < 2
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LoraDae, "training_step", dies)
    with pytest.raises(AssertionError):
        training.train(make(*options, name="cut"))
    monkeypatch.setattr(LoraDae, "training_step", original)
    otherwise = ("backbone.gradient_checkpointing=true", "adapter.kernel=peft", "ckpt_path=last")
    training.train(make(*options, *otherwise, name="cut"))
    whole, resumed = (weights(Path(make(name=n).run_dir)) for n in ("straight", "cut"))
    assert whole.keys() == resumed.keys()
    flat = [torch.cat([found[key].float().flatten() for key in sorted(found)]) for found in (resumed, whole)]
    assert distance(*flat) < 1e-3


def test_an_adapter_that_trains_on_leaves_no_later_stage_to_go_on_from(
    make: Make, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, `last` is the adapter's checkpoint and not that of the gain which the former one had."""
    on, first = "trainer.max_steps=6", "checkpoints/adapter.ckpt"
    for name in ("whole", "cut"):
        shutil.copytree(straight, tmp_path / name)
    with pytest.raises(ConfigError, match="ended at step 4, and later stages went on from there"):
        training.train(make(on, "ckpt_path=last", name="cut"))
    training.train(make(on, f"ckpt_path={tmp_path / 'whole' / first}", name="whole"))
    original = LoraDae.training_step

    def dies(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        assert self.global_step < 5
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LoraDae, "training_step", dies)
    with pytest.raises(AssertionError):
        training.train(make(on, f"ckpt_path={tmp_path / 'cut' / first}", name="cut"))
    monkeypatch.setattr(LoraDae, "training_step", original)
    training.train(make(on, "ckpt_path=last", name="cut"))
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[k], cut[k]) for k in whole)
    assert not all(torch.equal(whole[k], weights(straight)[k]) for k in whole)


@pytest.mark.parametrize("stage", ["texture", "decoder", "gain"])
def test_a_run_that_was_killed_in_a_later_stage_is_the_straight_run(
    stage: str, make: Make, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = LoraDae.training_step, []

    def counts(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        steps.append((self.stage, self.global_step))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LoraDae, "training_step", killed_in(stage))
    with pytest.raises(AssertionError):
        training.train(make(*STAGES))
    monkeypatch.setattr(LoraDae, "training_step", counts)
    training.train(make(*STAGES, "ckpt_path=last"))
    assert steps[0] == (stage, 1)
    found, expected = weights(Path(make().run_dir)), weights(straight)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_killed_run_whose_sources_are_registered_is_the_straight_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes small pictures of latents is in no checkpoint: it is fitted again."""
    options = ("enhancement=registered", "data.difficulty=shifted", *STAGES)
    training.train(make(*options, name="whole"))
    original = LoraDae.training_step
    monkeypatch.setattr(LoraDae, "training_step", killed_in("decoder"))
    with pytest.raises(AssertionError):
        training.train(make(*options))
    monkeypatch.setattr(LoraDae, "training_step", original)
    training.train(make(*options, "ckpt_path=last"))
    found, expected = (weights(Path(make(name=name).run_dir)) for name in ("run", "whole"))
    assert "enhancement.safetensors:preview.weight" in found and found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_training_goes_on_with_the_data_that_it_had(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A photo more, or more of them held out, is another order of samples, and would test on trained photos."""
    root = tmp_path / "photos"
    write_photos(root, 12)
    table = root / "metadata.jsonl"
    before = table.read_text()

    def make(*overrides: str) -> Config:
        quick = ("data=folder", f"data.root={root}", "enhancement=none", "trainer.max_steps=1")
        return config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *quick, *overrides)

    def loads(*_: Any) -> None:
        pytest.fail("weights were loaded")

    training.train(make())
    Image.new("RGB", (40, 30), (200, 30, 30)).save(root / "images" / "new.png")
    with monkeypatch.context() as patched:
        patched.setattr(training, "load_backbone", loads)
        for text, overrides in (
            (before + json.dumps({"file_name": "new.png", "text": "a red dress"}) + "\n", ()),
            (before.replace("a blue shirt", "a green shirt"), ()),
            (before, ("data.val_fraction=0.5",)),
        ):
            table.write_text(text)
            with pytest.raises(ConfigError, match="was trained on other photos, captions or splits") as caught:
                training.train(make("ckpt_path=last", *overrides))
            assert "\n" not in str(caught.value)
    table.write_text(before)
    training.train(make("trainer.max_steps=2", "ckpt_path=last"))


def test_what_an_older_checkpoint_does_not_tell_is_not_held_against_it(tmp_path: Path) -> None:
    path = tmp_path / "adapter.ckpt"
    now: dict[str, str | None] = {"backbone": "b", "adapter.init_from": None, "data.train": "t", "data.val": "v"}
    for told in ({}, {"origin": {"backbone": "b", "adapter.init_from": None}}, {"origin": now}):
        torch.save(told, path)
        check_origin({"adapter": path}, now)
    torch.save({"origin": now | {"data.val": "w"}}, path)
    with pytest.raises(ConfigError, match="data.val differs"):
        check_origin({"adapter": path}, now)


def test_processes_that_see_other_photos_do_not_train_together(make: Make, tmp_path: Path) -> None:
    """Each would train on a share of what it sees itself."""

    def own(number: int) -> Config:
        return make("trainer=ddp", "trainer.devices=2", "data.batch_size=2", "enhancement=none", f"data.seed={number}")

    def rank(number: int) -> None:
        training.train(own(number))

    for number in (0, 1):
        load_splits(own(number).data)  # rendered before there are two
    ended = run_ranks(rank, tmp_path / "logs")
    assert [e.code for e in ended] == [1, 1], ended[0].text + ended[1].text
    assert "do not see the same photos" in ended[0].text
    assert not list((tmp_path / "run").rglob("*.ckpt"))
