"""Runs measured again, and several beside each other: what is written where, and against what it is compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compose import config
from conftest import write_photos
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from test_evaluation_measure import TinyFeatures

from lora_dae.config import ConfigError, DataConfig, conf_dir, to_dict
from lora_dae.data.formats import shards
from lora_dae.data.pair import Pair
from lora_dae.data.sources import load_photos, load_splits
from lora_dae.evaluation import compare_runs, pictures, run
from lora_dae.evaluation.command import EvaluateRequest, evaluate
from lora_dae.evaluation.heldout import HeldOut, overlap
from lora_dae.evaluation.metrics.extras import Extras
from lora_dae.evaluation.metrics.features import stack_images
from lora_dae.evaluation.metrics.measure import build_reference
from lora_dae.evaluation.pictures import Item, write_pictures
from lora_dae.evaluation.references import CEILING, FLOOR, reconstructed, reference_rows
from lora_dae.sampling.load import load_run


@pytest.fixture(autouse=True)
def tiny_features(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run, compare_runs):
        monkeypatch.setattr(module, "load_features", lambda name: TinyFeatures())


@pytest.fixture(scope="module")
def run_dir(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter is empty: the frozen backbone drawing from captions."""
    root = tmp_path_factory.mktemp("runs")
    overrides = ("conditioning=none", "data.resolution=32", "enhancement=none", "data.test_size=5")
    cfg = config(tiny_backbone, root / "run", root / "cache", *overrides, "evaluation.controls=true")
    (root / "run" / "adapter").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(to_dict(cfg)), root / "run" / "config.yaml")
    return root / "run"


def _evaluate(*words: str) -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("evaluate", list(words))
    evaluate(EvaluateRequest(**OmegaConf.to_container(cfg)), Console(quiet=True))  # type: ignore[arg-type]


def test_own_settings_write_the_runs_report_and_others_never_touch_it(run_dir: Path) -> None:
    _evaluate(f"run={run_dir}")
    own = {f: (run_dir / f).read_bytes() for f in ("metrics.json", "report.html", "table.md", "samples/grid.png")}
    result = json.loads(own["metrics.json"])
    assert result["protocol"]["guidance_scale"] == 1.75 and result["command"] == f"python evaluate.py run={run_dir}"
    assert {FLOOR, CEILING, "real, blurred"} <= set(result["references"])
    assert "fd_tiny" in result["references"][FLOOR] and "psnr" not in result["references"][FLOOR]
    assert "psnr" in result["references"][CEILING] and "psnr" not in result["methods"]["strength 0"]
    for file in ("table.csv", "table.tex", "plots/band_power.svg"):
        assert (run_dir / file).stat().st_size > 0, file
    _evaluate(f"run={run_dir}", "guidance_scale=1.4", "controls=false")
    assert {f: (run_dir / f).read_bytes() for f in own} == own
    other = json.loads((run_dir / "evaluations" / "guidance_scale=1.4,controls=false" / "metrics.json").read_text())
    assert other["protocol"]["guidance_scale"] == 1.4 and other["references"] == {}
    assert other["methods"]["strength 0"]["fd_tiny"] != result["methods"]["strength 0"]["fd_tiny"]


def test_drawing_garments_into_real_photos_has_a_table_of_its_own(run_dir: Path, tmp_path: Path) -> None:
    """Though captions alone steer it, it is measured against the photos that it was drawn into."""
    _evaluate(f"run={run_dir}", "mode=masked", "bootstrap=0")
    result = json.loads((run_dir / "evaluations" / "mode=masked,bootstrap=0" / "metrics.json").read_text())
    assert result["protocol"]["mode"] == "masked" and "mode=masked" in result["command"]
    metrics = {"psnr", "psnr_garment", "edge_f1_garment", "fd_tiny"}
    assert metrics <= set(result["methods"]["strength 0"]) & set(result["methods"][run.FROZEN])
    assert metrics <= set(result["references"][CEILING])
    html = (run_dir / "evaluations" / "mode=masked,bootstrap=0" / "report.html").read_text()
    assert "masked, paired" in html and "what the VAE makes of it" in html
    both = ("mode=masked", "bootstrap=0", "num_samples=4", f"output={tmp_path / 'both'}")
    _evaluate(f"runs=['a={run_dir}','b={run_dir}']", *both)
    several = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert several["protocol"]["mode"] == "masked"
    assert several["methods"]["a"]["psnr"]["value"] == pytest.approx(result["methods"]["strength 0"]["psnr"]["value"])
    finished = run_dir / "pictures" / "test_strength_0_masked"
    with pytest.raises(ConfigError, match="pictures of mode=masked, which are compared with no others"):
        _evaluate(f"runs=[{run_dir},{finished}]", f"output={tmp_path / 'mixed'}")
    with pytest.raises(ConfigError, match="holds finished pictures, and mode=masked draws its own"):
        _evaluate(f"runs=[{run_dir},{finished}]", "mode=masked", f"output={tmp_path / 'mixed'}")


def test_drawing_real_photos_again_has_a_table_of_its_own(run_dir: Path, tmp_path: Path) -> None:
    """Of one step in 500 little is left but the VAE."""
    _evaluate(f"run={run_dir}", "mode=reconstruction", "noise_strength=0.5", "bootstrap=0")
    half = run_dir / "evaluations" / "mode=reconstruction,noise_strength=0.5,bootstrap=0"
    result = json.loads((half / "metrics.json").read_text())
    assert result["protocol"]["mode"] == "reconstruction" and result["protocol"]["noise_strength"] == 0.5
    assert "mode=reconstruction noise_strength=0.5" in result["command"]
    assert {"psnr", "psnr_garment"} <= set(result["methods"]["strength 0"]) & set(result["methods"][run.FROZEN])
    assert "image-to-image" in (page := (half / "report.html").read_text())
    assert "strength 0.5: the last 1 of 2 steps" in page
    both = ("mode=reconstruction", "noise_strength=0.5", "bootstrap=0", "num_samples=4", f"output={tmp_path / 'both'}")
    _evaluate(f"runs=['a={run_dir}','b={run_dir}']", *both)
    several = json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert several["protocol"]["mode"] == "reconstruction"
    psnr = result["methods"]["strength 0"]["psnr"]["value"]
    assert several["methods"]["b"]["psnr"]["value"] == pytest.approx(psnr)
    little = ("noise_strength=0.002", "num_inference_steps=500", "scheduler=ddim", "frozen=false", "bootstrap=0")
    _evaluate(f"run={run_dir}", "mode=reconstruction", *little, f"output={tmp_path / 'little'}")
    least = json.loads((tmp_path / "little" / "metrics.json").read_text())
    ceiling = least["references"][CEILING]["psnr"]["value"]
    assert least["methods"]["strength 0"]["psnr"]["value"] == pytest.approx(ceiling, abs=0.001)
    assert abs(psnr - ceiling) > 0.01
    finished = run_dir / "pictures" / "test_strength_0_reconstruction_0.5"
    with pytest.raises(ConfigError, match="pictures of mode=reconstruction, which are compared with no others"):
        _evaluate(f"runs=[{run_dir},{finished}]", f"output={tmp_path / 'mixed'}")


def test_photos_that_cannot_be_drawn_again_are_refused_before_weights_are_loaded(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_weights(monkeypatch)
    again = "mode=reconstruction"
    for words in (f"run={run_dir}", f"runs=[{run_dir}]"):
        for value in ("0", "1.2", "-0.3", "nan", "half"):
            with pytest.raises(ConfigError, match="is no share of the schedule: give 0.3 to 0.5"):
                _evaluate(words, again, f"noise_strength={value}")
        with pytest.raises(ConfigError, match="noise_strength=0.4 of 2 steps is less than one"):
            _evaluate(words, again, f"output={tmp_path / 'out'}")
        with pytest.raises(ConfigError, match="noise_strength belongs to mode=reconstruction"):
            _evaluate(words, "mode=masked", "noise_strength=0.4")
    with pytest.raises(ConfigError, match="where lms needs steps that it has not done"):
        _evaluate(f"run={run_dir}", again, "noise_strength=0.5", "scheduler=lms", f"output={tmp_path / 'out'}")


def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("weights are loaded")

    for module in (run, compare_runs):
        monkeypatch.setattr(module, "load_features", loaded)
    for module in (run, pictures):
        monkeypatch.setattr(module, "load_run", loaded)


def test_what_cannot_be_drawn_into_real_photos_is_refused_before_weights_are_loaded(
    run_dir: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_weights(monkeypatch)
    with pytest.raises(ConfigError, match="mode=half is unknown"):
        _evaluate(f"run={run_dir}", "mode=half")
    with pytest.raises(ConfigError, match="give run= or runs= to draw with, not images="):
        _evaluate("images=a", "reference=b", "mode=masked")
    with pytest.raises(ConfigError, match="give one of run="):
        _evaluate("mode=masked")
    cfg = OmegaConf.load(run_dir / "config.yaml")
    cfg.data.name, cfg.data.root = "folder", str(tiny_folder)
    (tmp_path / "bare" / "adapter").mkdir(parents=True)
    OmegaConf.save(cfg, tmp_path / "bare" / "config.yaml")
    for words in (f"run={tmp_path / 'bare'}", f"runs=[{tmp_path / 'bare'}]"):
        with pytest.raises(ConfigError, match="the test split has no garment masks: train with data.masks"):
            _evaluate(words, "mode=masked", f"output={tmp_path / 'out'}")


def test_what_cannot_be_had_stops_an_evaluation_before_anything_is_drawn(
    run_dir: Path, methods: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*_: object) -> None:
        raise AssertionError("drawn")

    def refuse(name: str) -> None:
        raise ConfigError("the features cannot be loaded.")

    monkeypatch.setattr(run, "draw_rows", drawn)
    monkeypatch.setattr(compare_runs, "gather", drawn)
    (tmp_path / "file").write_text("")
    for words in ([f"run={run_dir}"], [f"runs=[{','.join(methods)}]"]):
        with pytest.raises(ConfigError, match="file cannot be written"):
            _evaluate(*words, f"output={tmp_path / 'file'}")
    monkeypatch.setattr(run, "load_features", refuse)
    with pytest.raises(ConfigError, match="features cannot be loaded"):
        _evaluate(f"run={run_dir}")


def test_a_grid_while_it_trains_needs_one_pair_a_table_two() -> None:
    one = [Pair("a", "a", "a shirt", np.zeros((8, 8, 3), np.uint8))]
    assert len(HeldOut.take(one, 4, "none", least=1).pairs) == 1  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has 1 images: 2 are needed"):
        HeldOut.take(one, 4, "none")  # type: ignore[arg-type]


def test_a_run_with_sources_is_not_measured_without() -> None:
    """Data that has lost a source since: captions alone would be drawn, over the run's own numbers."""

    class Lost(list[Pair]):
        ignored_sources = frozenset({"b"})

    pairs: Any = Lost(Pair(k, k, "a shirt", np.zeros((8, 8, 3), np.uint8)) for k in "ab")
    assert HeldOut.take(pairs, 2, "none").sources is None
    with pytest.raises(ConfigError, match=r"some photos of its data have none.*missing_source=drop"):
        HeldOut.take(pairs, 2, "source")


def _items(n: int = 6, size: int = 24) -> list[Item]:
    rng = np.random.default_rng(0)
    mask = np.zeros((size, size), np.uint8)
    mask[4:20, 4:20] = 255
    side = size // 4
    coarse = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1) for _ in range(2 * n)]
    noisy = [(0.7 * c + rng.integers(0, 70, c.shape)).astype(np.uint8) for c in coarse]
    return [Item(f"{i:04d}", f"a red shirt {i}", None, noisy[n + i], noisy[i], 7, mask) for i in range(n)]


@pytest.fixture
def methods(tmp_path: Path) -> list[str]:
    """Three folders of the same prompts: the real photos a little, much and not at all damaged."""
    items, rng = _items(), np.random.default_rng(1)
    for name, share in (("bad", 0.8), ("good", 0.1), ("same", 0.0)):
        noise = [rng.integers(0, 256, i.real.shape) for i in items if i.real is not None]
        images = [((1 - share) * i.real + share * x).astype(np.uint8) for i, x in zip(items, noise, strict=True)]
        write_pictures(tmp_path / name, items, images)
    return [str(tmp_path / name) for name in ("bad", "good", "same")]


def _compare(methods: list[str], output: Path, *words: str) -> Any:
    _evaluate(f"runs=[{','.join(methods)}]", f"output={output}", "bootstrap=200", *words)
    return json.loads((output / "metrics.json").read_text())


def test_methods_are_compared_with_the_baseline(methods: list[str], tmp_path: Path) -> None:
    result = _compare(methods, tmp_path / "out", "baseline=good")
    assert result["baseline"] == "good" and list(result["methods"]) == ["good", "bad", "same"]
    said = {(row["method"], row["metric"]): row["verdict"] for row in result["comparisons"]}
    assert said["bad", "psnr_garment"] == said["bad", "color_garment"] == "worse"
    assert said["same", "psnr_garment"] == "better"
    assert result["methods"]["same"]["psnr"]["value"] == 100 and result["protocol"]["seeds"] == [7]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "good: best and worst by color garment" in html and '<th scope="col">source</th>' in html
    again = _compare(methods, tmp_path / "again")
    assert again["baseline"] == "bad" and again["methods"]["same"]["psnr"] == result["methods"]["same"]["psnr"]


def test_who_drew_from_the_prompt_alone_is_not_measured_against_the_pairs_photo(
    methods: list[str], tmp_path: Path
) -> None:
    """Modes never share a column: fidelity stays empty for it, distances between sets do not."""
    items = [replace(i, source=None) for i in _items()]
    write_pictures(tmp_path / "text", items, [i.real for i in items if i.real is not None])
    result = _compare([methods[1], str(tmp_path / "text")], tmp_path / "out", "controls=false")
    assert {"psnr", "lsd_garment", "fd_tiny"} <= set(result["methods"]["good"])
    assert set(result["methods"]["text"]) == {"fd_tiny", "kd_tiny", "is_tiny"}
    turned = _compare([str(tmp_path / "text"), methods[1]], tmp_path / "turned", "controls=false")
    assert turned["methods"]["good"]["psnr"] == result["methods"]["good"]["psnr"] and turned["baseline"] == "text"


def test_judges_and_people_stand_on_the_page(methods: list[str], tmp_path: Path) -> None:
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    reading = {"questions": 3, "strict": 1.0, "tolerant": 0.0, "parse_failures": 0.25, "unanswered": 0.0}
    entry = {
        "reading": reading, "scores": {"bad": {"texture": value}, "good": {"texture": {**value, "value": None}}},
        "against_first": {"good | texture": {"verdict": "cannot tell"}},
        "sees_texture": {"verdict": "cannot tell", "difference": 0.0, "p": 1.0, "pairs": 3},
    }  # fmt: skip
    protocol = {"bank": "2-abc", "prompt_version": "1", "prompts": 3, "resolution": "24 pixels wide", "without_real": 0}
    win = {
        "a": "bad",
        "b": "good",
        "wins": 1,
        "losses": 9,
        "ties": 0,
        "share": 0.1,
        "low": 0.02,
        "high": 0.4,
        "p_holm": 0.01,
        "verdict": "worse",
    }
    pairs = {"inconsistent": 0.1, "position_bias": 0.375, "first_share": None, "missing": 2}
    entry["pairs"] = {**pairs, "questions": {"realism": {"win_rates": [{**win, "verdict": "cannot tell"}]}}}
    vqa = {
        "schema": 3, "methods": ["bad", "good"], "baseline": "bad", "judges": {"j": entry},
        "agreement": {"texture (graded)": None}, "protocol": protocol,
    }  # fmt: skip
    people = {
        "schema": 3, "methods": ["bad", "good"], "raters": {"voted": 5, "excluded": []}, "opinion": {},
        "questions": {"realism": {"win_rates": [win], "alpha": None}},
    }  # fmt: skip
    (tmp_path / "vqa.json").write_text(json.dumps(vqa))
    (tmp_path / "report.json").write_text(json.dumps(people))
    _compare(methods[:2], tmp_path / "out", f"vqa={tmp_path}", f"study={tmp_path}", "controls=false")
    html = (tmp_path / "out" / "report.html").read_text()
    for text in ("Judge j", "n/a, cannot tell", "parse failures 25.0%", "it does not see texture", "People: "
                 "realism", "bad over good", "0.100 [0.020, 0.400]", "worse", "Judge j: pairs", "one judge alone",
                 "realism: bad over good", "position bias 37.5%", "Agreement between judges",
                 "independent votes"):  # fmt: skip
        assert text in html, text
    for option in ("vqa", "study"):  # of other runs
        with pytest.raises(ConfigError, match="is about good, and the page about bad, same: give runs="):
            _compare([methods[0], methods[2]], tmp_path / "out", f"{option}={tmp_path}")
    (tmp_path / "vqa.json").write_text(json.dumps({**vqa, "schema": 99}))
    with pytest.raises(ConfigError, match="another version"):
        _compare(methods[:2], tmp_path / "out", f"vqa={tmp_path}")
    with pytest.raises(ConfigError, match="holds no report.json"):
        _compare(methods[:2], tmp_path / "out", f"study={tmp_path / 'good'}")


def test_pictures_without_real_photos_cannot_be_compared(tmp_path: Path) -> None:
    items = [replace(i, real=None, mask=None) for i in _items(2)]
    for name in ("a", "b"):
        write_pictures(tmp_path / name, items, [np.zeros((24, 24, 3), np.uint8)] * 2)
    with pytest.raises(ConfigError, match="picture 0000 has no real photo"):
        _compare([str(tmp_path / n) for n in "ab"], tmp_path / "out")


def _held_out(items: list[Item]) -> HeldOut:
    return HeldOut([Pair(i.id, i.id, i.prompt, i.real, i.source, i.mask) for i in items])


def test_reference_rows_are_what_they_say(tiny_backbone: Path, run_dir: Path) -> None:
    held_out, extractor = _held_out(_items(4, 32)), TinyFeatures()
    photos = np.stack([p.image for p in held_out.pairs])
    real = build_reference(stack_images(list(photos)), held_out.masks, extractor)
    backbone = load_run(run_dir).backbone
    rows = reference_rows(held_out, real, held_out, backbone, extractor, Extras({}, None, [], [], {}), None, 20, 0)
    assert list(rows) == [FLOOR, CEILING, "real, blurred", "real, over-sharpened"]
    # Were the training photos the held-out ones themselves, nothing would lie between them.
    assert rows[FLOOR]["fd_tiny"].value == pytest.approx(0, abs=1e-6)
    assert rows[FLOOR]["lsd_garment"].value == 0 and "psnr" not in rows[FLOOR]
    made = reconstructed(backbone, photos)
    error = ((made / 255.0 - photos / 255.0) ** 2).mean(axis=(1, 2, 3))
    assert rows[CEILING]["psnr"].value == pytest.approx((-10 * np.log10(error)).mean(), abs=1e-3)
    for name in ("real, blurred", "real, over-sharpened"):
        assert rows[name]["lsd_garment"].value > 0.2 and rows[name]["gradient_garment"].value > 0
    without = reference_rows(held_out, real, None, None, extractor, Extras({}, None, [], [], {}), None, 0, 0)
    assert list(without) == ["real, blurred", "real, over-sharpened"]


class _Split(list[Pair]):
    has_mask, has_source, fingerprint = False, False, ""


def test_held_out_photos_that_are_trained_on_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [p for p in _held_out(_items(6)).pairs]
    copy = Pair("other name", "g", "another caption", pairs[4].image.copy())
    assert overlap({"train": _Split(pairs[:3]), "test": _Split(pairs[3:])}, "test", 3) is None
    splits = {"train": _Split([*pairs[:3], copy]), "test": _Split(pairs[3:])}
    found = overlap(splits, "test", 3)
    assert found is not None and found.startswith("1 of the test photos are in the training split too")
    assert overlap(splits, "test", 1) is None  # the copy is not among those that are measured
    assert overlap(splits, "test", 3, first=2) is None and overlap(splits, "test", 1, first=1) is not None
    monkeypatch.setattr("lora_dae.evaluation.heldout.MOST", 3)
    assert "was not checked" in (overlap(splits, "test", 3) or "")


def test_copies_among_files_and_in_shards_are_told_in_any_size(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", 24)
    cfg = DataConfig(name="folder", root=str(tmp_path / "photos"), resolution=32, cache_dir=str(tmp_path / "cache"))
    splits = load_splits(cfg)
    tested, trained = (splits[name][0].id for name in ("test", "train"))
    assert overlap(splits, "test", 2) is None
    table = tmp_path / "photos" / "metadata.jsonl"  # published, else the copy would be in its photo's split
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    of = {split[i].id: name for name, split in splits.items() for i in range(len(split))}
    table.write_text("\n".join(json.dumps({**row, "split": of[row["file_name"]]}) for row in rows))
    one, other = (next((tmp_path / "photos").rglob(name)) for name in (trained, tested))
    one.write_bytes(other.read_bytes())
    for found in (
        load_splits(cfg),
        load_splits(replace(cfg, buckets=["32x32", "40x24"])),  # there a photo is trained in another size
    ):
        assert "1 of the test photos" in (overlap(found, "test", len(found["test"])) or "")
    shards.write(dict(load_photos(cfg)), tmp_path / "shards", per_shard=4)
    packed = load_splits(DataConfig(name="shards", root=str(tmp_path / "shards"), resolution=32, cache_dir="unused"))
    assert "1 of the test photos" in (overlap(packed, "test", len(packed["test"])) or "")
