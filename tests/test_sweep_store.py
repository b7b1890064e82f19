"""Nothing is trained twice: what belongs to a training, what is found again, and what a kill leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import config
from filelock import SoftFileLock
from safetensors.torch import load_file

from lora_dae.config import Config, ConfigError, DataConfig, EnhancementConfig, TrackingConfig
from lora_dae.sweep import store
from lora_dae.sweep.files import read_json, write_json
from lora_dae.sweep.identity import inputs, training_hash, training_part
from lora_dae.sweep.locks import try_lock
from lora_dae.training.ended import InterruptedRunError
from lora_dae.training.module import LoraDae

Make = Callable[..., Config]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tiny_backbone: Path, tmp_path: Path, cache: Path) -> Make:
    def build(name: str, *overrides: str) -> Config:
        options = ("adapter.rank=2", "evaluation.frozen=false", f"store={tmp_path / 'store'}", *overrides)
        return config(tiny_backbone, tmp_path / name, cache, *options)

    return build


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were trained in, in order."""
    seen: list[str] = []
    original = store.train

    def counted(cfg: Config, *arguments: Any) -> Any:
        seen.append(cfg.run_dir)
        return original(cfg, *arguments)

    monkeypatch.setattr(store, "train", counted)
    return seen


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"name": "other"}, True),
        ({"tracking": TrackingConfig(group="g")}, True),
        ({"run_dir": "elsewhere", "store": "s"}, True),
        ({"trainer": {"strategy": "auto", "log_every_n_steps": 1}}, True),
        ({"data": DataConfig(cache_dir="c", test_size=9)}, True),
        ({"data": DataConfig(val_size=9)}, False),
        ({"seed": 1}, False),
        ({"conditioning": "none"}, False),
        ({"trainer": {"max_steps": 3}}, False),
        ({"trainer": {"devices": 2}}, False),
        ({"trainer": {"early_stop_patience": None, "val_check_interval": 5}}, True),
        ({"trainer": {"early_stop_patience": 2}}, False),
        ({"enhancement": EnhancementConfig(gate_inputs="time")}, False),
        ({"enhancement": EnhancementConfig(losses=["power"])}, False),
        ({"enhancement": EnhancementConfig(joint=True)}, False),
    ],
    ids=str,
)
def test_what_a_training_depends_on(change: dict[str, Any], same: bool) -> None:
    one = Config(run_dir="here")
    assert (training_part(one) == training_part(replace(one, **change))) == same
    later = {"gate_inputs", "losses", "joint"}  # what was trained before they came is found
    assert not later & training_part(one)["enhancement"].keys()


def test_how_often_is_validated_counts_where_it_ends_the_training() -> None:
    often, seldom = (
        Config(run_dir="here", trainer={"early_stop_patience": 2, "val_check_interval": n}) for n in (5, 50)
    )
    assert training_part(often) != training_part(seldom)


def test_strength_is_no_part_of_a_training_and_rank_is() -> None:
    one = Config(run_dir="here")
    weak = replace(one, enhancement=replace(one.enhancement, strength=0.3))
    wide = replace(one, adapter=replace(one.adapter, rank=64))
    moved = replace(one, backbone=replace(one.backbone, path="copy"))
    photos, others, judges = ({"train": t, "val": v} for t, v in (("d", "v"), ("other photos", "v"), ("d", "other")))
    assert len({training_hash(cfg, photos, "b") for cfg in (one, weak, moved)}) == 1
    hashes = {training_hash(one, photos, "b"), training_hash(wide, photos, "b"), training_hash(one, others, "b"),
              training_hash(one, photos, "other weights")}  # fmt: skip
    assert len(hashes) == 4
    # What the enhancement is judged on, and where a training may stop; the studio's is told by its size.
    own = replace(one, data=replace(one.data, name="folder"))
    assert training_hash(own, photos, "b") != training_hash(own, judges, "b")
    assert training_hash(one, photos, "b") == training_hash(one, judges, "b")


def test_a_lora_to_begin_with_counts_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    found = []
    for name, content in (("a", b"x"), ("copy", b"x"), ("other", b"y")):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        one = Config(run_dir="here")
        begun = replace(one, adapter=replace(one.adapter, init_from=str(path)))
        found.append(training_hash(begun, {"train": "d"}, "b"))
    assert found[0] == found[1] != found[2]


def test_pictures_that_a_prior_draws_depend_on_the_sampler() -> None:
    plain = Config(run_dir="here")
    longer = replace(plain, sampling=replace(plain.sampling, num_inference_steps=50))
    other = replace(plain, objective=replace(plain.objective, prior_images=7))
    assert training_part(plain) == training_part(longer) == training_part(other)
    for one in (plain, longer, other):
        one.objective = replace(one.objective, prior_weight=1.0)
    assert training_part(plain) != training_part(longer) and training_part(plain) != training_part(other)
    larger = replace(plain, sampling=replace(plain.sampling, batch_size=1, method="pag"))
    assert training_part(plain) == training_part(larger)


def test_settings_of_a_module_that_is_off_do_not_matter() -> None:
    off = Config(run_dir="here")
    off.enhancement.enabled = False
    other = replace(off, enhancement=replace(off.enhancement, hidden=8, max_steps=3))
    assert training_part(off) == training_part(other)
    assert training_part(off) != training_part(Config(run_dir="here"))


def test_two_strengths_are_one_training_and_two_runs(make: Make, trainings: list[str], tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = store.run_in_store(make("first", "enhancement.strength=0.5", "logger=tensorboard"))
    second = store.run_in_store(make("second", "enhancement.strength=1.5", "logger=tensorboard"))
    assert len(trainings) == 1
    assert first.table is not None and second.table is not None
    assert list(first.table.methods) == ["strength 0", "strength 0.5"]
    assert list(second.table.methods) == ["strength 0", "strength 1.5"]
    one, two = weights(first.run_dir), weights(second.run_dir)
    assert one and one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    for run in (first, second):
        for name in ("report.html", "metrics.json", "csv/metrics.csv", "plots/loss.svg", "adapter/README.md"):
            assert (run.run_dir / name).stat().st_size > 0
        tags = reader.EventAccumulator(str(run.run_dir / "tensorboard")).Reload().Tags()["scalars"]
        assert "train/loss" in tags and any(tag.startswith("test/") for tag in tags)  # of the one training, in both
    assert "strength=0.5)" in (first.run_dir / "adapter" / "README.md").read_text()
    assert "strength=1.5)" in (second.run_dir / "adapter" / "README.md").read_text()
    told = read_json(second.run_dir / "trained.json")
    assert told["hash"] == Path(trainings[0]).name and told["by"] == str(first.run_dir)


def test_an_enhancement_on_a_shared_adapter_is_that_of_the_straight_run(
    make: Make, trainings: list[str], tmp_path: Path
) -> None:
    """Bit for bit; another enhancement takes the same adapter, and nothing comes twice."""
    shared = weights(store.train_shared(make("shared")))
    assert len(trainings) == 2
    gain = weights(store.train_shared(make("gain", "enhancement=gain")))
    store.train_shared(make("none", "enhancement=none"))
    assert len(trainings) == 3
    straight = store.run_in_store(make("straight", f"store={tmp_path / 'other'}"))
    one = weights(straight.run_dir)
    assert one.keys() == shared.keys() and all(torch.equal(one[k], shared[k]) for k in one)
    adapter = [k for k in gain if not k.startswith("enhancement")]
    assert adapter and all(torch.equal(gain[k], shared[k]) for k in adapter)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        (("enhancement.joint=true",), 1),
        (("objective.prior_weight=1", "objective.prior_images=2", "enhancement=gain"), 2),
    ],
    ids=["joint", "prior"],
)
def test_what_an_adapter_trains_beside_it_is_that_of_the_straight_run(
    options: tuple[str, ...], trained: int, make: Make, trainings: list[str], tmp_path: Path
) -> None:
    """Texture that trains with the adapter takes no adapter of another training; a prior's pictures go along."""
    store.train_shared(make("none", "enhancement=none"))
    trainings.clear()
    shared = weights(store.train_shared(make("shared", *options)))
    assert len(trainings) == trained
    one = weights(store.run_in_store(make("straight", *options, f"store={tmp_path / 'other'}")).run_dir)
    assert one.keys() == shared.keys() and all(torch.equal(one[k], shared[k]) for k in one)


def test_a_training_that_was_cut_off_is_taken_over(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_backbone: Path
) -> None:
    """Another job with the same hash goes on from the checkpoint, and ends where the straight run ends.

    Also where the backbone has moved, and a LoRA to begin with: what they hold is the same.
    """
    first = Path(store.run_in_store(make("first", "enhancement=none", "trainer.max_steps=1", "seed=5")).run_dir)
    for place in ("here", "there"):
        shutil.copytree(first / "adapter", tmp_path / place / "adapter")
        shutil.copytree(tiny_backbone, tmp_path / place / "backbone")

    def at(place: str) -> tuple[str, str]:
        lora = tmp_path / place / "adapter" / "pytorch_lora_weights.safetensors"
        return f"adapter.init_from={lora}", f"backbone.path={tmp_path / place / 'backbone'}"

    class KilledError(Exception):
        pass

    options = ("trainer.val_check_interval=2", "enhancement=none")
    original = LoraDae.training_step
    steps: list[int] = []

    def dies_at_step_3(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.global_step == 3:
            raise KilledError
        return original(self, batch, batch_idx)

    def counted(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        steps.append(self.global_step)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LoraDae, "training_step", dies_at_step_3)
    with pytest.raises(KilledError):
        store.run_in_store(make("cut", *options, *at("here")))
    shutil.rmtree(tmp_path / "here")
    monkeypatch.setattr(LoraDae, "training_step", counted)
    resumed = store.run_in_store(make("resumed", *options, *at("there"), "sampling.num_inference_steps=3"))
    assert steps == [2, 3]
    straight = store.run_in_store(make("straight", *options, *at("there"), f"store={tmp_path / 'other'}"))
    one, two = weights(resumed.run_dir), weights(straight.run_dir)
    assert one and all(torch.equal(one[k], two[k]) for k in one)


def test_a_training_in_the_store_that_is_stopped_goes_on_with_the_same_command(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ckpt_path, which a run of its own goes on with, is refused beside the store."""

    def stopped(*_: Any) -> None:
        raise InterruptedRunError("stopped at step 1 of 4; go on with: python train.py ckpt_path=last")

    monkeypatch.setattr(store, "train", stopped)
    with pytest.raises(InterruptedRunError, match=r"^stopped at step 1 of 4; the same command goes on$"):
        store.run_in_store(make("stopped", "seed=8"))


def test_a_training_tells_how_far_it_is(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's table shows it, and a search prunes on every validation loss so far."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(store, "say", lambda path, phase: told.append(read_json(path)))
    store.run_in_store(make("run", "enhancement=none", "trainer.val_check_interval=2"))
    (last,) = told  # before it says that it measures
    assert (last["phase"], last["step"], last["of"], last["first"]) == ("adapter", 4, 4, 0)
    assert list(last["validated"]) == ["2", "4"] and last["validated"]["4"] == last["metrics"]["val/loss"]
    assert last["metrics"]["train/loss"] > 0 and last["time"] >= last["begun"]


def test_a_run_that_dies_while_it_measures_keeps_no_older_numbers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = make("run", "enhancement=none")
    stale = Path(cfg.run_dir) / "metrics.json"
    write_json(stale, {"methods": {}})

    def dies(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "train_once", lambda *arguments: None)
    monkeypatch.setattr(store, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        store.run_in_store(cfg)
    assert not stale.exists()


def test_a_finished_job_of_hydras_own_sweep_is_not_repeated(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray and Slurm are given every job again by the same command. A single run, and another config, is measured."""
    cfg = make("run", "enhancement=none")
    first = store.run_in_store(cfg)
    files = [first.run_dir / name for name in ("metrics.json", "adapter/README.md")]
    texts = [path.read_text() for path in files]
    measured: list[Config] = []

    def again(one: Config, *arguments: Any) -> None:
        measured.append(one)
        for path, text in zip(files, texts, strict=True):
            path.write_text(text)

    monkeypatch.setattr(store, "measure", again)
    store.run_in_store(cfg)
    assert len(measured) == 1
    monkeypatch.setattr(store, "_is_job_of_hydra", lambda: True)
    assert store.run_in_store(cfg).table.methods.keys() == first.table.methods.keys()
    assert len(measured) == 1 and f"measured already: {first.run_dir}" in capsys.readouterr().out
    for one in (make("run", "enhancement=none", "sampling.seed=7"), cfg):
        store.run_in_store(one)
    assert [one.sampling.seed for one in measured[1:]] == [7, cfg.sampling.seed]
    files[1].unlink()  # killed before its end
    store.run_in_store(cfg)
    told = read_json(first.run_dir / "trained.json")
    write_json(first.run_dir / "trained.json", {**told, "measured_on": "other photos"})
    store.run_in_store(cfg)
    assert len(measured) == 5


def test_waits_for_a_training_that_runs_elsewhere(
    make: Make, trainings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "store" / "0123"
    lock = try_lock(folder.with_name("0123.lock"))
    assert lock is not None
    waited: list[str] = []

    def other_finishes(seconds: float) -> None:
        waited.append(read_json(tmp_path / "run" / "status.json")["phase"])
        write_json(folder / "trained.json", {"hash": "0123"})

    monkeypatch.setattr(store.time, "sleep", other_finishes)
    store.train_once(make("run"), folder, tmp_path / "decision.json")
    assert len(waited) == 1 and waited[0].startswith("waits for process")
    assert not trainings


def test_a_disk_without_flock_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There filelock would take a file that outlives a crash."""
    monkeypatch.setattr("lora_dae.sweep.locks.FileLock", SoftFileLock)
    with pytest.raises(ConfigError, match="no flock"):
        try_lock(tmp_path / "x.lock")
    assert not (tmp_path / "x.lock").exists()


def test_a_checkpoint_path_and_a_store_exclude_each_other(make: Make) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        store.run_in_store(make("run", "ckpt_path=last"))


def test_a_finished_run_tells_what_the_launcher_compares(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that starts again sees other photos, other weights and another version of the training."""
    cfg = make("run", "enhancement=none")
    store.run_in_store(cfg)
    told = read_json(Path(cfg.run_dir) / "trained.json")
    assert inputs(cfg).items() <= told.items()
    more = replace(cfg, data=replace(cfg.data, test_size=7))  # trains the same, is measured on other photos
    assert (inputs(more)["hash"], inputs(more)["measured_on"] == told["measured_on"]) == (told["hash"], False)
    monkeypatch.setattr("lora_dae.sweep.identity.TRAINING_VERSION", -1)
    assert inputs(cfg)["hash"] != told["hash"]
