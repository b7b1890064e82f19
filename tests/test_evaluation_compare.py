"""Runs and folders beside each other: measured as a run measures its rows, and a page that says on what."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compose import config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from test_evaluation_measure import TinyFeatures

from lora_dae.config import ConfigError, conf_dir, to_dict
from lora_dae.data.pair import Pair
from lora_dae.evaluation import compare_runs, pictures, run
from lora_dae.evaluation.command import EvaluateRequest, evaluate
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.metrics.extras import Extras
from lora_dae.evaluation.metrics.features import stack_images
from lora_dae.evaluation.metrics.measure import build_reference, measure_images
from lora_dae.evaluation.pictures import Item, write_pictures
from lora_dae.evaluation.report import plots
from lora_dae.evaluation.report.protocol import KERNEL_OF_PAIRS, ON_VALIDATION
from lora_dae.evaluation.side_by_side import plot_texture


@pytest.fixture(autouse=True)
def tiny_features(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run, compare_runs):
        monkeypatch.setattr(module, "load_features", lambda name: TinyFeatures())


def _write_run(folder: Path, backbone: Path, cache: Path, *overrides: str) -> Path:
    """A run whose adapter is empty."""
    (folder / "adapter").mkdir(parents=True)
    cfg = config(backbone, folder, cache, "data.resolution=32", *overrides)
    OmegaConf.save(OmegaConf.create(to_dict(cfg)), folder / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def run_dir(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It draws from captions."""
    root = tmp_path_factory.mktemp("runs")
    return _write_run(root / "run", tiny_backbone, root / "cache", "conditioning=none", "enhancement=none")


def _evaluate(*words: str) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("evaluate", list(words))
    evaluate(EvaluateRequest(**OmegaConf.to_container(cfg)), Console(quiet=True))  # type: ignore[arg-type]


def _compare(methods: list[str], output: Path, *words: str) -> Any:
    _evaluate(f"runs=[{','.join(methods)}]", f"output={output}", "controls=false", *words)
    return json.loads((output / "metrics.json").read_text())


def _items(n: int = 8, size: int = 24) -> list[Item]:
    """Photos of coarse blocks, each its own source, a garment in the middle."""
    rng = np.random.default_rng(0)
    mask = np.zeros((size, size), np.uint8)
    mask[4:20, 4:20] = 255
    found = []
    for k in range(n):
        coarse = rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        photo = (0.7 * coarse + rng.integers(0, 70, coarse.shape)).astype(np.uint8)
        found.append(Item(f"{k:04d}", f"a red shirt {k}", None, photo, photo, 7, mask))
    return found


def _drawn(items: list[Item]) -> list[np.ndarray]:
    rng, photos = np.random.default_rng(1), [item.real for item in items if item.real is not None]
    return [(0.8 * photo + 0.2 * rng.integers(0, 256, photo.shape)).astype(np.uint8) for photo in photos]


def test_equal_pictures_have_equal_distances_whether_a_source_was_seen_or_not(tmp_path: Path) -> None:
    """All are resampled with the photos of their captions: else two methods of one prompt could not be compared."""
    items = _items(12)
    images = _drawn(items)
    write_pictures(tmp_path / "source", items, images)
    write_pictures(tmp_path / "text", [replace(item, source=None) for item in items], images)
    result = _compare([f"{tmp_path}/source", f"{tmp_path}/text"], tmp_path / "out", "bootstrap=100")
    real = build_reference(stack_images([i.real for i in items if i.real is not None]), None, TinyFeatures())
    expected, _ = measure_images(stack_images(images), real, TinyFeatures(), together=True, bootstrap=100)
    for name in ("fd_tiny", "kd_tiny"):
        found = result["methods"]["text"][name]
        assert found == result["methods"]["source"][name]
        assert [found["value"], found["low"], found["high"]] == pytest.approx(
            [expected[name].value, expected[name].low, expected[name].high], rel=1e-6
        )
    assert KERNEL_OF_PAIRS in result["protocol"]["definitions"]


def test_files_and_split_are_those_of_the_folders(run_dir: Path, tmp_path: Path) -> None:
    """Anybody's pictures are of no split of ours; those that a run drew say of which."""
    items = _items()
    for name in ("plain", "lossy"):
        write_pictures(tmp_path / name, items, _drawn(items))
    table = tmp_path / "lossy" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row in rows:
        Image.open(tmp_path / "lossy" / row["file_name"]).save(tmp_path / "lossy" / f"{row['file_name'][:-4]}.jpg")
        row["file_name"] = f"{row['file_name'][:-4]}.jpg"
    table.write_text("\n".join(map(json.dumps, rows)))
    protocol = _compare([f"{tmp_path}/plain", f"{tmp_path}/lossy"], tmp_path / "out", "bootstrap=0")["protocol"]
    assert protocol["files"] == "plain: 8 .png; lossy: 8 .jpg" and protocol["split"] == "given"
    words = ("split=val", "num_samples=3", "bootstrap=0")
    drawn = _compare([str(run_dir)], tmp_path / "val", *words)["protocol"]
    finished = _compare([f"{run_dir}/pictures/val_strength_0"], tmp_path / "again", "bootstrap=0")["protocol"]
    for protocol in (drawn, finished):
        assert protocol["split"] == "val" and ON_VALIDATION in protocol["warnings"]
        assert KERNEL_OF_PAIRS not in protocol["definitions"]  # captions alone


def test_each_run_says_how_it_was_drawn(tiny_backbone: Path, tmp_path: Path) -> None:
    words = ("scheduler=ddim", "guidance_scale=2", "source_guidance_scale=3", "method=pag")
    options = (*(f"sampling.{word}" for word in words), "enhancement.strength=0.7")
    folder = _write_run(tmp_path / "run", tiny_backbone, tmp_path / "cache", *options)
    said = "ddim, 2 steps, guidance 2 (source 3), method pag, strength"
    assert compare_runs._settings([f"a={folder}", f"b={folder}@0.25"]) == [f"a: {said} 0.7", f"b: {said} 0.25"]


def test_every_runs_own_training_photos_are_looked_through(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_dir, other)
    cfg = OmegaConf.load(other / "config.yaml")
    cfg.data.train_size += 1
    size = cfg.data.train_size
    OmegaConf.save(cfg, other / "config.yaml")

    def overlap(splits: dict[str, Any], split: str, count: int) -> str | None:
        assert (split, count) == ("test", 3)
        return "photos are trained on" if len(splits["train"]) == size else None

    monkeypatch.setattr(compare_runs, "overlap", overlap)
    runs = [f"'a={run_dir}'", f"'b={other}'", f"'c={other}@0'"]
    warnings = _compare(runs, tmp_path / "out", "num_samples=3", "bootstrap=0")["protocol"]["warnings"]
    assert [text for text in warnings if "trained on" in text] == ["b, c: photos are trained on"]


def test_as_many_pictures_are_asked_for_as_the_command_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def gather(specs: list[str], split: str, count: int | None, *_: object) -> None:
        asked.append(count)
        raise ConfigError("enough.")

    monkeypatch.setattr(compare_runs, "gather", gather)
    write_pictures(tmp_path / "a", _items(), _drawn(_items()))
    for words in ((), ("num_samples=7",)):
        with pytest.raises(ConfigError, match="enough"):
            _compare([f"{tmp_path}/a"], tmp_path / "out", *words)
    assert asked == [None, 7]


def test_the_texture_plot_shows_the_rows_whose_texture_is_in_the_table(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frozen backbone saw no source: of garments it has no number, and beside them no line."""
    monkeypatch.setattr(plots, "_save", lambda figure, output: figure)
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache")
    items = _items(4, 32)
    photos = np.stack([item.real for item in items if item.real is not None])
    for masked, names in ((True, ["strength 0"]), (False, [run.FROZEN, "strength 0"])):
        pairs = [Pair(i.id, i.id, i.prompt, i.real, i.source, i.mask if masked else None) for i in items]
        rows = {run.FROZEN: photos[::-1], "strength 0": photos}
        none = Extras({}, None, [], [], {})
        table, real, seen = run.measure_rows(cfg, rows, HeldOut(pairs), TinyFeatures(), none)
        figure: Any = plot_texture(seen, real, tmp_path)
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names
        assert [n for n in rows if "lsd" in table.methods[n] or "lsd_garment" in table.methods[n]] == names
        assert KERNEL_OF_PAIRS not in table.protocol.definitions  # studies print what was measured before, too


def test_a_run_without_enhancement_has_no_strength(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("weights are loaded")

    for module, name in ((run, "load_features"), (run, "load_run"), (pictures, "load_run")):
        monkeypatch.setattr(module, name, loaded)
    with pytest.raises(ConfigError, match="was trained without enhancement: leave strength out, or give 0"):
        _evaluate(f"run={run_dir}", "strength=0.5", f"output={tmp_path / 'out'}")


def test_what_has_no_effect_with_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cache_dir belongs to images=, not to run=: leave it out"):
        _evaluate("run=a", "cache_dir=here")
    with pytest.raises(ConfigError, match="cache_dir belongs to images=, not to runs=: leave it out"):
        _evaluate("runs=[a,b]", "cache_dir=here")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in ("run=a", "runs=[a,b]"):
        with pytest.raises(ConfigError, match="draws in one process, and each of these would draw all"):
            _evaluate(words)
    with pytest.raises(ConfigError, match="images= needs reference="):
        _evaluate("images=a")
