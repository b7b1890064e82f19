"""Comparisons: what a study.yaml means, its statistics against scipy's, and files that agree with each other."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose import SHORT
from scipy import stats

from lora_dae.config import Config, ConfigError, to_dict
from lora_dae.evaluation.report.table import MetricValue, Protocol, ResultsTable
from lora_dae.sweep.cells import budget, make_jobs, read_comparison, run_folder
from lora_dae.sweep.compare import main
from lora_dae.sweep.results import (
    BEGIN,
    END,
    NOT_RUN,
    Measured,
    build_results,
    csv_lines,
    difference,
    read_results,
    render,
    standard_error,
    summary,
    write_results,
)  # fmt: skip
from lora_dae.training.replicates import load_replicates, save_replicates

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.yaml"))
STUDY = """
title: A study
seeds: [0, 1, 2]
baseline: plain
metrics: [fd_effnet, attr_color, power_high]
common: [experiment=rank4, evaluation.frozen=false]
cells:
  plain: [enhancement.strength=0]
  half: [enhancement.strength=0.5]
  ours: [enhancement.strength=1]
  theirs: {overrides: [enhancement.strength=0, evaluation.frozen=true], row: frozen backbone, against: ours}
"""
README = f"# A study\n\nbefore\n\n{BEGIN}\n{NOT_RUN}\n{END}\n\nafter\n"


def write_study(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(text)
    (folder / "README.md").write_text(README)
    return folder


def test_studies_are_those_that_the_project_promises() -> None:
    expected = {"rank_x_strength", "mainstream", "enhancement_ablation", "solver_and_steps", "paired_source", "texture"}
    assert {study.name for study in STUDIES} == expected


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_study_composes_and_says_what_it_costs(study: Path) -> None:
    grid = read_comparison(study)
    jobs, configs = make_jobs(grid, Path("multirun") / "x")
    assert len(jobs) == len(grid.cells) * len(grid.seeds) and len(grid.seeds) >= 3
    cost = budget(grid, jobs, configs)
    assert cost.trainings <= len(jobs) and 0 < cost.training + cost.measuring < 48
    assert {job.overrides[-2] for job in jobs[: len(grid.cells)]} == {f"seed={grid.seeds[0]}"}


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_tables_and_files_of_every_study_agree(study: Path) -> None:
    results = read_results(study)
    block = (study / "README.md").read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert block.strip() == render(results)
    assert (study / "results.csv").is_file() == bool(results)
    if results:
        with (study / "results.csv").open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))[1:]
        assert lines == [["" if v is None else str(v) for v in line] for line in csv_lines(results)]
        assert set(results["cells"]) <= {cell.name for cell in read_comparison(study).cells}


def test_cells_that_differ_in_sampling_train_once(tmp_path: Path) -> None:
    grid = read_comparison(write_study(tmp_path / "s"))
    jobs, configs = make_jobs(grid, tmp_path / "runs")
    cost = budget(grid, jobs, configs)
    assert (cost.cells, cost.runs, cost.trainings) == (4, 12, 3)
    assert len({job.digest for job in jobs}) == 12
    other, _ = make_jobs(grid, tmp_path / "runs", ["trainer.max_steps=3"])
    assert not {job.digest for job in jobs} & {job.digest for job in other}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("baseline: plain", "baseline: none"), "'none' is none of its cells"),
        (("against: ours", "against: mine"), "'mine' is none of its cells"),
        (("title: A study\n", ""), "has seeds, baseline, metrics, common, cells: give"),
        (("cells:", "cells: ["), "is no YAML"),
        (("row: frozen", "line: frozen"), "cell 'theirs'"),
        (("seeds: [0, 1, 2]", "seeds: []"), "seeds is empty"),
        (("experiment=rank4", "experiment=rank99"), "rank99"),
        (("experiment=rank4", "adapter.rank=0"), "adapter.rank=0"),
    ],
)
def test_mistakes_are_one_sentence(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", STUDY.replace(*change))
    with pytest.raises(ConfigError, match=message):
        make_jobs(read_comparison(folder), tmp_path / "runs")


def test_nothing_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        read_comparison(tmp_path)
    with pytest.raises(ConfigError, match="run the study first"):
        build_results(read_comparison(write_study(tmp_path / "s")), tmp_path / "runs")


def test_overrides_may_stand_behind_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_study(tmp_path / "s")
    words = ["compare", str(folder), "-j", "2", "adapter.rank=2", "--plan", "trainer.max_steps=3"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    assert "4 cells, 12 runs, 3 trainings" in capsys.readouterr().out


def test_seeds_alone_are_students_paired_test() -> None:
    """Without variation over images: scipy's paired t test and interval."""
    a, b = [3.1, 2.9, 3.4, 3.0], [3.6, 3.3, 3.5, 3.9]
    still = tuple(torch.zeros(50) for _ in a)
    change, p = difference(Measured(tuple(a), still, "lower"), Measured(tuple(b), still, "lower"))
    expected = stats.ttest_rel(a, b)
    assert p == pytest.approx(expected.pvalue) and change == pytest.approx(np.mean(a) - np.mean(b))
    found = summary(Measured(tuple(a), still, "lower"))
    assert (found.low, found.high) == pytest.approx(tuple(stats.ttest_1samp(a, 0).confidence_interval()))


def test_images_alone_are_a_normal_test() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, generator=generator, dtype=torch.float64)
    one, other = Measured((2.0,), (2.0 + 0.5 * noise,), "higher"), Measured((1.0,), (1.0 + 0.1 * noise,), "higher")
    change, p = difference(one, other)
    spread = float((0.4 * noise).std())  # paired: what both share takes no part
    assert change == 1.0 and p == pytest.approx(math.erfc(1.0 / spread / math.sqrt(2)))
    assert standard_error([1.0, 1.0], [0.5 * noise, 0.5 * noise])[0] == pytest.approx(float((0.5 * noise).std()))


def test_one_seed_without_bootstrap_tells_nothing() -> None:
    one, other = Measured((2.0,), (), "higher"), Measured((1.0,), (), "higher")
    assert difference(one, other) == (1.0, 1.0)
    assert summary(one).low is None


def test_power_is_best_at_one() -> None:
    """1.25 and 0.8 are as far from it; 1.1 is nearer than 0.7."""
    still = (torch.ones(10),)
    assert difference(Measured((1.25,), still, None), Measured((0.8,), still, None))[0] == pytest.approx(0, abs=1e-12)
    assert difference(Measured((1.1,), still, None), Measured((0.7,), still, None))[0] < 0


PROTOCOL = Protocol(8, 8, "test", 64, "ddim", 2, 2.0, None, [1], "effnet", 20)


def fake_run(folder: Path, rows: dict[str, float], strength: float, seed: int, reference: str = "") -> None:
    """A run folder as far as a comparison reads it; the row ``reference`` is one of real photos."""
    folder.mkdir(parents=True)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    methods = {
        row: {
            "fd_effnet": MetricValue(value + 0.01 * seed, value - 1, value + 1, "lower", value + 0.05 * noise),
            "attr_color": MetricValue(0.5, 0.4, 0.6, "higher", 0.5 + 0.01 * noise),
        }
        for row, value in rows.items()
    }
    references = {row: methods.pop(row) for row in rows if row == reference}
    table = ResultsTable(methods, PROTOCOL, references)
    table.save(folder / "metrics.json")
    save_replicates(table, folder)
    cfg = to_dict(Config(run_dir=str(folder), seed=seed))
    cfg["enhancement"]["strength"] = strength
    (folder / "config.yaml").write_text(json.dumps(cfg))


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Path, Path]:
    """(study, runs) with three finished cells of four; better by 1 at strength 1 and at no cost."""
    folder, runs = write_study(tmp_path / "study"), tmp_path / "runs"
    for cell in read_comparison(folder).cells:
        for seed in (0, 1, 2):
            strength = {"plain": 0.0, "ours": 1.0, "theirs": 0.0}.get(cell.name)
            if strength is not None:
                rows = {"strength 0": 5.0, "strength 1": 4.0, "frozen backbone": 9.0}
                fake_run(run_folder(runs, cell, seed), rows, strength, seed)
    return folder, runs


def test_results_hold_what_was_measured(measured: tuple[Path, Path]) -> None:
    folder, runs = measured
    results = build_results(read_comparison(folder), runs)
    cells = results["cells"]
    assert results["missing"] == ["half"] and list(cells) == ["plain", "ours", "theirs"]
    assert cells["plain"]["metrics"]["fd_effnet"]["value"] == pytest.approx(5.01)
    assert cells["ours"]["metrics"]["fd_effnet"]["difference"] == pytest.approx(-1.0)
    assert cells["theirs"]["metrics"]["fd_effnet"]["difference"] == pytest.approx(5.0)  # against ours
    assert cells["ours"]["metrics"]["attr_color"]["p_holm"] == 1.0
    assert "p_holm" not in cells["plain"]["metrics"]["fd_effnet"]
    assert "power_high" not in cells["plain"]["metrics"]
    text = render(results)
    assert "**4.01" in text and "_9.01" in text and "Not finished: half." in text


def test_a_cell_may_be_what_real_photos_get(tmp_path: Path) -> None:
    """One seed alone says nothing about a difference, so its test has the reference row's own replicates."""
    text = STUDY.replace("[0, 1, 2]", "[0]").replace("frozen backbone", "real photos")
    grid, runs = read_comparison(write_study(tmp_path / "study", text)), tmp_path / "runs"
    for cell in grid.cells:
        fake_run(run_folder(runs, cell, 0), {"strength 1": 4.0, "real photos": 1.0}, 1.0, 0, reference="real photos")
    found = build_results(grid, runs)["cells"]["theirs"]["metrics"]["fd_effnet"]
    assert found["value"] == 1.0 and found["difference"] == pytest.approx(-3.0) and found["p_holm"] < 0.05


def test_files_are_written_from_the_same_numbers(measured: tuple[Path, Path]) -> None:
    folder, runs = measured
    write_results(folder, build_results(read_comparison(folder), runs))
    test_tables_and_files_of_every_study_agree(folder)
    text = (folder / "README.md").read_text()
    assert text.startswith("# A study\n\nbefore") and text.endswith("\n\nafter\n") and NOT_RUN not in text
    write_results(folder, build_results(read_comparison(folder), runs))
    assert (folder / "README.md").read_text() == text
    (folder / "README.md").write_text("no markers")
    with pytest.raises(ConfigError, match="lacks the markers"):
        write_results(folder, read_results(folder))


def test_replicates_come_back(tmp_path: Path) -> None:
    values = torch.arange(5, dtype=torch.float64)
    row = {"x": MetricValue(1, 0, 2, "lower", values), "y": MetricValue(1, None, None, "lower")}
    table = ResultsTable({"a b": row}, PROTOCOL)
    save_replicates(table, tmp_path)
    found = load_replicates(tmp_path)
    assert list(found) == ["a b/x"] and torch.equal(found["a b/x"], values)
    assert load_replicates(tmp_path / "nowhere") == {}


def compare(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "lora_dae.sweep.compare", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def test_a_comparison_as_a_user_types_it(tmp_path: Path, tiny_backbone: Path) -> None:
    """One training, two runs, their table; the same command again finds all of it."""
    short = STUDY.replace("[0, 1, 2]", "[0]")
    short = "\n".join(line for line in short.splitlines() if not line.startswith(("  half", "  theirs")))
    write_study(tmp_path / "experiments" / "tiny", short)
    words = ["experiments/tiny", "adapter.rank=2", f"backbone.path={tiny_backbone}", "data.cache_dir=cache",
             "evaluation.frozen=false", *[o for o in SHORT if not o.startswith("trainer.max_steps")],
             "trainer.max_steps=1"]  # fmt: skip
    planned = compare(tmp_path, *words, "--plan")
    assert planned.returncode == 0 and "2 cells, 2 runs, 1 trainings" in planned.stdout, planned.stderr
    assert not (tmp_path / "multirun").exists()
    done = compare(tmp_path, *words)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert len(list((tmp_path / "multirun" / "store").glob("*/trained.json"))) == 1
    folder = tmp_path / "experiments" / "tiny"
    test_tables_and_files_of_every_study_agree(folder)
    assert set(read_results(folder)["cells"]) == {"plain", "ours"}
    assert (folder / "figures" / "crops.png").is_file() and (folder / "figures" / "curves.png").is_file()
    shutil.rmtree(tmp_path / "cache")  # nothing is trained or drawn again
    again = compare(tmp_path, *words)
    assert again.returncode == 0, again.stderr[-3000:]
