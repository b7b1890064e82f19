"""Comparisons: what a study.yaml means and costs."""

from __future__ import annotations

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
from comparisons import STUDY, cells_of, fake, write_study
from hydra import compose, initialize_config_dir

from lora_dae.cli import typed
from lora_dae.config import ConfigError, conf_dir, register
from lora_dae.sweep.budget import budget, drawn_calls
from lora_dae.sweep.cell_files import write_cell
from lora_dae.sweep.cells import compose_cell, distinct, read_comparison, with_seeds
from lora_dae.sweep.compare import Study, main, make_jobs
from lora_dae.sweep.results import build_results


def test_cells_share_measurements_adapters_and_trainings(tmp_path: Path) -> None:
    """Three strengths with three seeds: an adapter and a module per seed. The frozen backbone is drawn once."""
    found = cells_of(write_study(tmp_path / "s"))
    cost = budget(found)
    assert (len(found), cost.cells, cost.trainings) == (12, 3 * 3 + 1, 3 + 3)
    adapter = 20 + 350 * 16 * 0.032
    texture, decoder = 160 * 16 * 0.0115, 40 * 8 * 0.11
    chain = (51 - 8) / math.log(51 / 8) * 2.5 * 8
    gain = (10 * chain + 32 * (3 + 1) * 2 * 12) * 0.0115  # and what judges it, and the finest band
    assert cost.training == pytest.approx(3 * (adapter + 20 + texture + decoder + gain) / 3600)
    assert cost.measuring == pytest.approx(10 * 128 * (12 * 2 * 0.0115 + 0.05) / 3600)
    assert budget(found, {one.digest for one in found}).hours == 0
    left = budget(found, {one.digest for one in found if one.seed == 0})
    assert (left.cells, left.trainings) == (3 * 2, 2 + 2)


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.test_size=3", "experiment=rank16", "enhancement.guidance_range=[1.75,1.75]", "trainer.max_steps=7"],
        ["experiment=dreambooth", "conditioning=none", "method=freeu", "+sampling.method_options.b1=2", "name='a b'"],
        ["enhancement=gain", "trainer={max_steps: 3}", "trainer.precision=32-true", "adapter.targets=[conv]"],
    ],
)
def test_a_cell_is_what_hydra_composes(overrides: list[str]) -> None:
    """Though cells share what is composed: twice, with other numbers between."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        expected = typed(compose("train", [*overrides, "run_dir=unused"]))
    assert compose_cell(overrides) == expected
    assert (
        compose_cell([*overrides, "enhancement.strength=0.25", "adapter.rank=3"]).adapter.rank
        == 3
        != expected.adapter.rank
    )
    assert compose_cell(overrides) == expected


def test_seeds_with_pairs_of_their_own(tmp_path: Path) -> None:
    """Second and third seed go on where the one before ended; rows without training are drawn for each."""
    folder = write_study(tmp_path / "s", STUDY.replace("cells:", "own_pairs: true\ncells:"))
    shared = write_study(tmp_path / "t")
    found = cells_of(folder, "evaluation.num_samples=7")
    assert {one.seed: one.cfg.evaluation.first_pair for one in found} == {0: 0, 1: 7, 2: 14}
    assert (budget(found).cells, budget(cells_of(shared)).cells) == (3 * 4, 3 * 3 + 1)
    assert {one.training for one in found} == {one.training for one in cells_of(shared)}
    with pytest.raises(ConfigError, match="own_pairs gives each seed its evaluation.first_pair"):
        cells_of(folder, "evaluation.first_pair=3")
    for one in found:  # as a process of the comparison composes it
        (again,) = with_seeds(one.cell, [one.seed], one.overrides)
        assert again.digest == one.digest


def test_order_is_seed_by_seed_and_adapter_by_adapter(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", STUDY.replace("  half: [", "  half: [adapter.rank=2, "))
    ordered = distinct(cells_of(folder))
    assert [one.seed for one in ordered] == sorted(one.seed for one in ordered)
    keys = [one.adapter for one in ordered]
    assert len([k for k, key in enumerate(keys) if k == 0 or keys[k - 1] != key]) == len(set(keys)) == 1 + 3 * 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("enhancement=none", True),
        ("enhancement.hidden=8", True),  # of a module that draws nothing
        ("name=other", True),
        ("tracking.group=g", True),
        ("sampling.batch_size=1", True),
        ("evaluation.frozen=true", True),
        ("evaluation.num_samples=5", False),
        ("data.test_size=999", True),
        ("evaluation.split=val", False),
        ("evaluation.first_pair=5", False),
        ("evaluation.wrong_source=true", False),
        ("evaluation.reconstructions=true", False),
        ("sampling.num_inference_steps=5", False),
        ("sampling.method=freeu", False),
        ("sampling.tiled_decode=true", False),
        ("adapter.rank=2", False),
        ("trainer.max_steps=5", False),
        ("conditioning=none", False),
        ("enhancement.strength=0.5", False),
    ],
)
def test_what_a_measurement_depends_on(change: str, same: bool, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", STUDY.replace("[0, 1, 2]", "[0]"))
    assert (cells_of(folder)[0].digest == cells_of(folder, change)[0].digest) == same


def test_frozen_rows_depend_on_no_training_and_all_on_the_frozen_weights(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", STUDY.replace("[0, 1, 2]", "[0]"))
    shutil.copytree(tiny_backbone, tmp_path / "copy")
    shutil.copytree(tiny_backbone, tmp_path / "other")
    weights = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    one, copy, other = (
        cells_of(folder, f"backbone.path={p}") for p in (tiny_backbone, tmp_path / "copy", tmp_path / "other")
    )
    assert [a.digest == b.digest for a, b in zip(one, copy, strict=True)] == [True] * 4
    assert [a.digest == b.digest for a, b in zip(one, other, strict=True)] == [False] * 4
    longer = cells_of(folder, f"backbone.path={tiny_backbone}", "trainer.max_steps=5")
    assert [a.digest == b.digest for a, b in zip(one, longer, strict=True)] == [False, False, False, True]
    # It sees no source photo, so that a guidance of its own makes no call of its own.
    apart = cells_of(folder, f"backbone.path={tiny_backbone}", "sampling.source_guidance_scale=2.5")
    assert [drawn_calls(x) / y.cfg.sampling.num_inference_steps for x, y in zip(apart, apart, strict=True)] == [
        3,
        3,
        3,
        2,
    ]
    rounded = cells_of(folder, f"backbone.path={tiny_backbone}", "trainer.precision=bf16-mixed")
    assert [a.digest == b.digest for a, b in zip(one, rounded, strict=True)] == [False] * 4


def test_a_process_for_each_adapter_and_seed_of_what_is_missing(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "e" / "s")
    study = Study(folder, read_comparison(folder), cells_of(folder))
    other = Study(folder, study.grid, cells_of(folder))  # asks for the same cells
    jobs = make_jobs([study, other], tmp_path)
    assert len(jobs) == 1 + 3 and len({job.directory for job in jobs}) == 4
    done = {one.digest for one in study.cells if one.seed == 0 or one.cell.row is not None}
    for digest in done:
        write_cell(study.results, digest, "test", fake(1.0, 0))
    assert [job.label for job in make_jobs([study, other], tmp_path)] == [
        "plain, seed 1 and 2 more",
        "plain, seed 2 and 2 more",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("baseline: plain", "baseline: none"), "'none' is none of its cells"),
        (("against: ours", "against: mine"), "'mine' is none of its cells"),
        (("title: A study\n", ""), "has seeds, baseline, metrics, common, cells: give"),
        (("cells:", "cells: ["), "is no YAML"),
        (("row: frozen", "line: frozen"), "cell 'theirs'"),
        (("row: frozen backbone", "row: real photos"), "has the row 'real photos': use one of"),
        (("seeds: [0, 1, 2]", "seeds: []"), "seeds is .*: give a list of at least one, each once"),
        (("seeds: [0, 1, 2]", "seeds: [0, 1, 0]"), "seeds is .*: give a list of at least one, each once"),
        (("half: [enhancement.strength=0.5]", "half:"), "cell 'half' is a list of overrides"),
        (("experiment=rank4", "experiment=rank99"), "rank99"),
        (("experiment=rank4", "adapter.rank=0"), "adapter.rank=0"),
        (("experiment=rank4", "adapter.rnak=2"), "adapter.rnak=2 .*cannot be composed"),
        (("experiment=rank4", "adapter.rank=many"), "adapter.rank=many .*cannot be composed: .*many"),
        (("experiment=rank4", "'adapter.rank=2,4'"), "adapter.rank=2,4 .*cannot be composed"),
    ],
)
def test_mistakes_are_one_sentence(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", STUDY.replace(*change))
    with pytest.raises(ConfigError, match=message):
        cells_of(folder)


def test_nothing_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        read_comparison(tmp_path)
    folder = write_study(tmp_path / "s")
    with pytest.raises(ConfigError, match="run the study first"):
        build_results(read_comparison(folder), cells_of(folder), tmp_path / "cells")


def test_plan_says_what_all_studies_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without folders: those of experiments/. The second one adds nothing to the first; overrides hold for both."""
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        write_study(tmp_path / "experiments" / name)
    monkeypatch.setattr(sys, "argv", ["compare", "--plan", "trainer.max_steps=2000"])
    main()
    lines = [re.split(r"\s*[│┃]\s*", line.strip(" │")) for line in capsys.readouterr().out.splitlines() if "│" in line]
    first, second, whole, left = (line for line in lines if line[0] in ("first", "second", "all", "to do"))
    assert first[1:5] == second[1:5] == ["4", "3 x 128", "10", "6"]
    assert float(first[5]) == float(second[5]) == float(first[6]) == float(whole[6]) == float(left[6]) >= 1
    assert float(second[6]) == 0
    assert whole[3:5] == left[3:5] == ["10", "6"] and not (tmp_path / "multirun").exists()
    monkeypatch.setattr(sys, "argv", ["compare", "elsewhere/third", "experiments/first"])
    with pytest.raises(SystemExit):
        main()
    assert "lie in several folders" in capsys.readouterr().err


@pytest.mark.parametrize("metrics", ["[]", "fd_effnet", "[[a]]"])
def test_metrics_are_a_list_of_names(tmp_path: Path, metrics: str) -> None:
    folder = write_study(tmp_path / "s", STUDY.replace("[fd_effnet, attr_color, power_high]", metrics))
    with pytest.raises(ConfigError, match="give a list of at least one name"):
        read_comparison(folder)


def test_a_file_counts_by_what_it_holds(tmp_path: Path) -> None:
    """A cell's captions: another text in the same place is another measurement, the same elsewhere is not."""
    digests = []
    for name, text in (("a", "one"), ("a", "two"), ("b", "two")):
        (tmp_path / f"{name}.jsonl").write_text(text)
        extra = f"data.captions.file={tmp_path / name}.jsonl"
        digests.append(cells_of(write_study(tmp_path / "s"), "data=folder", "data.root=x", extra)[0].digest)
    assert digests[0] != digests[1] == digests[2]
