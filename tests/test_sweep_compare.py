"""Comparisons: what a study.yaml means and costs, and files that agree with each other."""

from __future__ import annotations

import csv
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from lora_dae.cli import typed
from lora_dae.config import ConfigError, conf_dir, register
from lora_dae.evaluation.report.table import MetricValue, Protocol
from lora_dae.sweep.budget import budget
from lora_dae.sweep.cell_files import MeasuredCell, cell_file, is_measured, known_cells, read_cell, write_cell
from lora_dae.sweep.cells import Wanted, compose_cell, distinct, read_comparison, wanted_cells, with_seeds
from lora_dae.sweep.compare import Study, main, make_jobs, read_studies
from lora_dae.sweep.results import BEGIN, END, NOT_RUN, build_results, csv_lines, read_results, render, write_results

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/study.yaml"))
STUDY = """
title: A study
seeds: [0, 1, 2]
baseline: plain
metrics: [fd_effnet, attr_color, power_high]
common: [experiment=rank4]
cells:
  plain: [enhancement.strength=0]
  half: [enhancement.strength=0.5]
  ours: [enhancement.strength=1]
  theirs: {overrides: [], row: frozen backbone, against: ours}
"""
README = f"# A study\n\nbefore\n\n{BEGIN}\n{NOT_RUN}\n{END}\n\nafter\n"


def write_study(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(text)
    (folder / "README.md").write_text(README)
    return folder


def cells_of(folder: Path, *extra: str) -> list[Wanted]:
    return wanted_cells(read_comparison(folder), extra)


def test_studies_are_those_that_the_project_promises() -> None:
    expected = {"rank_x_strength", "mainstream", "enhancement_ablation", "solver_and_steps", "paired_source", "texture",
                "mainstream_text", "training_shortcuts", "tuning", "enhancement"}  # fmt: skip
    assert {study.name for study in STUDIES} == expected


def test_all_comparisons_together_take_ten_hours_at_most() -> None:
    """The headline table has 3 x 342 = 1,026 pictures a cell; what studies share is counted once. Only tuning sees the
    validation split."""
    studies = read_studies(STUDIES, [])
    (evidence,) = (study for study in studies if study.grid.name == "enhancement")
    (tuning,) = (study for study in studies if study.grid.name == "tuning")
    assert {one.cfg.evaluation.split for one in tuning.cells} == {"val"}
    for other in (evidence, tuning):
        studies.remove(other)
    assert {one.cfg.evaluation.split for study in studies for one in study.cells} == {"test"}
    whole = budget(one for study in studies for one in study.cells)
    alone = [budget(study.cells) for study in studies]
    assert 0 < whole.hours <= 10 and whole.hours < sum(cost.hours for cost in alone)
    assert whole.trainings < sum(cost.trainings for cost in alone)
    for study in studies:
        headline = study.grid.name == "mainstream"
        assert len(study.grid.seeds) >= (3 if headline else 2)
        pictures = {one.cfg.evaluation.num_samples for one in study.cells}
        assert len(pictures) == 1 and pictures.pop() * len(study.grid.seeds) >= (1024 if headline else 96)
        assert [one.seed for one in study.cells[: len(study.grid.cells)]] == [0] * len(study.grid.cells)


def test_the_evidence_is_on_guidance_and_settings_that_were_tuned() -> None:
    """Guidance and controls' settings have tuning's least distance on those pairs; 513 captions, 3 seeds."""
    evidence, tuning = (read_comparison(ROOT / "experiments" / name) for name in ("enhancement", "tuning"))
    tried = wanted_cells(tuning)
    measured = read_results(ROOT / "experiments" / "tuning")["cells"]

    def distance(one: Wanted) -> float:
        return float(measured[one.cell.name]["metrics"]["fd_effnet"]["value"])

    def pairs(one: Wanted) -> tuple[str, str]:
        return one.cfg.conditioning, one.cfg.data.difficulty

    found = wanted_cells(evidence)
    assert {one.cfg.evaluation.first_pair for one in found} == {0, 171, 342} and len({o.seed for o in found}) == 3
    for one in found:
        known = [other for other in tried if pairs(other) == pairs(one)]
        if "more" not in one.cell.name and "guidance 1" not in one.cell.name:
            solver = one.cfg.sampling.scheduler, one.cfg.sampling.num_inference_steps
            plain = [o for o in known if o.cfg.sampling.method == "none"]
            same = [o for o in plain if (o.cfg.sampling.scheduler, o.cfg.sampling.num_inference_steps) == solver]
            assert one.cfg.sampling.guidance_scale == min(same, key=distance).cfg.sampling.guidance_scale
        if one.cfg.sampling.method != "none":
            method = one.cfg.sampling.method
            found_best = min((o for o in known if o.cfg.sampling.method == method), key=distance)
            assert one.cfg.sampling.method_options == found_best.cfg.sampling.method_options
        if one.cell.row is None and one.cfg.conditioning == "source" and "guidance" not in one.cell.name:
            assert one.cfg.sampling.guidance_scale == one.cfg.sampling.source_guidance_scale


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
    for cell in results.get("cells", {}).values():
        files = [read_cell(study.parent / "cells", digest) for digest in cell["files"].values()]
        for metric, entry in cell["metrics"].items():
            assert entry["seeds"] == [found.metrics[metric].value for found in files if found is not None]
            assert entry["value"] == pytest.approx(np.mean(entry["seeds"]))


def test_cells_share_measurements_adapters_and_trainings(tmp_path: Path) -> None:
    """Three strengths with three seeds: an adapter and a module per seed. The frozen backbone is drawn once."""
    found = cells_of(write_study(tmp_path / "s"))
    cost = budget(found)
    assert (len(found), cost.cells, cost.trainings) == (12, 3 * 3 + 1, 3 + 3)
    adapter = 20 + 350 * 16 * 0.032
    texture, decoder = 160 * 16 * 0.0115, 40 * 8 * 0.11
    gain = (10 * (8 + 20) / 2 * 2.5 * 8 + 32 * (3 + 1) * 2 * 12) * 0.0115  # and what judges it, and the finest band
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


PROTOCOL = Protocol(8, 8, "test", 64, "ddim", 2, 2.0, None, [1], "effnet", 20)


def fake(value: float, seed: int) -> MeasuredCell:
    """A measured cell; the images of one seed are drawn as in another cell of that seed."""
    noise = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    metrics = {
        "fd_effnet": MetricValue(value, value - 0.1, value + 0.1, "lower", value + 0.05 * noise),
        "attr_color": MetricValue(0.5, 0.4, 0.6, "higher", 0.5 + 0.01 * noise),
    }
    return MeasuredCell({}, metrics, PROTOCOL, 1.5, 24.0, 3.0)


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Path, list[Wanted], Path]:
    """(study, its cells, results) with three finished cells of four; better by 1 at strength 1 and at no cost."""
    folder, results = write_study(tmp_path / "study"), tmp_path / "cells"
    found = cells_of(folder)
    for one in found:
        value = {"plain": 5.0, "ours": 4.0, "theirs": 9.0}.get(one.cell.name)
        if value is not None:
            shift = 0.0 if one.cell.row is not None else 0.01 * one.seed
            write_cell(results, one.digest, "test", fake(value + shift, one.seed))
    return folder, found, results


Files = tuple[Path, list[Wanted], Path]


def test_results_hold_what_was_measured(measured: Files) -> None:
    folder, found, files = measured
    results = build_results(read_comparison(folder), found, files)
    cells = results["cells"]
    assert list(cells) == ["plain", "ours", "theirs"]
    assert cells["plain"]["metrics"]["fd_effnet"]["value"] == pytest.approx(5.01)
    assert cells["ours"]["metrics"]["fd_effnet"]["difference"] == pytest.approx(-1.0)
    assert cells["theirs"]["metrics"]["fd_effnet"]["difference"] == pytest.approx(4.99)  # against ours
    assert cells["ours"]["metrics"]["attr_color"]["p_holm"] == 1.0
    assert "p_holm" not in cells["plain"]["metrics"]["fd_effnet"]
    assert "power_high" not in cells["plain"]["metrics"]
    text = render(results)
    assert "**4.01" in text and "_9.0" in text
    assert "9 of 12 measurements are there. Fewer than 3 training seeds have: half (0)." in text


def test_ours_is_held_against_every_other_cell_of_its_baseline(measured: Files) -> None:
    folder, found, files = measured
    (folder / "study.yaml").write_text(STUDY + "ours: [ours]\n")
    results = build_results(read_comparison(folder), found, files)
    assert list(results["ours"]) == ["plain"]  # half is not measured, theirs has another baseline
    entry = results["ours"]["plain"]["metrics"]["fd_effnet"]
    assert entry["difference"] == pytest.approx(-1.0) and entry["difference_low"] < -1 < entry["difference_high"] < 0
    assert "| plain | **-1** [" in render(results) and "ours minus each of the others" in render(results)
    for bad in ("[nobody]", "ours", "[ours, half]"):
        (folder / "study.yaml").write_text(STUDY + f"ours: {bad}\n")
        with pytest.raises(ConfigError, match="one for each baseline"):
            read_comparison(folder)


def test_lpips_adds_to_a_cell_and_changes_none(measured: Files, tmp_path: Path) -> None:
    """Its weights are a file that few have: a study is read without; a paired cell that lacks it is measured again."""
    folder, found, files = measured
    (tmp_path / "alex.safetensors").write_text("")
    (study,) = read_studies([folder], [f"evaluation.lpips={tmp_path / 'alex.safetensors'}"])
    assert [one.digest for one in study.cells] == [one.digest for one in found] and study.extra == ()
    (other,) = read_studies([folder], ["trainer.max_steps=3"])
    assert other.extra == ("trainer.max_steps=3",)
    digest = next(one.digest for one in found if one.cell.name == "plain")
    assert is_measured(files, digest, lpips=False) and is_measured(files, digest, lpips=True)  # it is not paired
    own = fake(5.0, 0)
    for names, whole in ((("psnr",), False), (("psnr", "lpips_alex"), True)):
        more = {name: MetricValue(1.0, 0.9, 1.1, "lower") for name in names}
        write_cell(files, digest, "test", replace(own, metrics={**own.metrics, **more}))
        assert is_measured(files, digest, lpips=True) == whole and is_measured(files, digest, lpips=False)


def test_a_table_of_what_is_there_compares_the_seeds_that_both_have(measured: Files) -> None:
    folder, found, files = measured
    (gone,) = (one for one in found if one.cell.name == "ours" and one.seed == 1)
    cell_file(files, gone.digest).unlink()
    results = build_results(read_comparison(folder), found, files)
    ours = results["cells"]["ours"]
    assert ours["training_seeds"] == [0, 2] and ours["metrics"]["fd_effnet"]["seeds"] == [4.0, 4.02]
    assert ours["metrics"]["fd_effnet"]["difference"] == pytest.approx(-1.0)
    assert "8 of 12 measurements are there. Fewer than 3 training seeds have: half (0), ours (2)." in render(results)
    for one in found:
        if one.cell.name == "plain":
            cell_file(files, one.digest).unlink()
    without = build_results(read_comparison(folder), found, files)["cells"]
    assert "p" not in without["ours"]["metrics"]["fd_effnet"] and "p" in without["theirs"]["metrics"]["fd_effnet"]


def test_files_are_written_from_the_same_numbers(measured: Files) -> None:
    folder, found, files = measured
    write_results(folder, build_results(read_comparison(folder), found, files))
    test_tables_and_files_of_every_study_agree(folder)
    text = (folder / "README.md").read_text()
    assert text.startswith("# A study\n\nbefore") and text.endswith("\n\nafter\n") and NOT_RUN not in text
    write_results(folder, build_results(read_comparison(folder), found, files))
    assert (folder / "README.md").read_text() == text
    one = next(iter(read_results(folder)["cells"]["ours"]["files"].values()))
    write_cell(files, one, "test", fake(7.0, 0))
    with pytest.raises(AssertionError):
        test_tables_and_files_of_every_study_agree(folder)
    (folder / "README.md").write_text("no markers")
    with pytest.raises(ConfigError, match="lacks the markers"):
        write_results(folder, read_results(folder))
    with pytest.raises(ConfigError, match="lacks the markers"):  # before anything is measured
        read_studies([folder], [])


def test_the_table_says_what_makes_it_another_one(measured: Files) -> None:
    """Overrides of the command line, warnings, precisions that differ, one seed."""
    folder, found, files = measured
    grid = read_comparison(folder)
    text = render(build_results(grid, found, files, ["trainer.max_steps=5"]))
    assert "**Not the study as it stands:** every cell with `trainer.max_steps=5`." in text
    assert "Mean over training seeds" in text and "Warning" not in text
    for one, kind in zip(found[:2], ("bf16-mixed", "32-true"), strict=True):
        own = fake(5.0, one.seed)
        warned = replace(own.protocol, warnings=["few images", "fewer than 3 seeds: so much"])
        write_cell(files, one.digest, "test", replace(own, precision=kind, protocol=warned))
    text = render(build_results(grid, found, files))
    assert "Warning: few images; cells were measured in 32-true and bf16-mixed: give trainer.precision" in text
    assert "fewer than 3 seeds: so much" not in text and "Not the study" not in text
    alone = render(build_results(grid, [one for one in found if one.seed == 0], files))
    assert "One training seed, with 95 % intervals over images." in alone


def test_a_damaged_measurement_is_made_again(measured: Files, tmp_path: Path) -> None:
    folder, found, files = measured
    study = Study(folder, read_comparison(folder), found)
    whole = len(known_cells(files))
    victim = next(iter(sorted(files.glob("*.json"))))
    before = {job.digest for job in make_jobs([study], tmp_path / "multirun")}
    path = study.results / victim.name
    path.write_text(path.read_text()[:100])
    assert len(known_cells(files)) == whole - 1
    assert {job.digest for job in make_jobs([study], tmp_path / "multirun")} != before


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


def test_a_cell_comes_back_from_its_file(tmp_path: Path) -> None:
    """Replicates to half precision of their spread, also around a large value and where one is not finite."""
    drawn = 1e6 + torch.tensor([-3.0, 0.5, math.nan, 2.0], dtype=torch.float64)
    metrics = {"x": MetricValue(1e6, 1e6 - 3, 1e6 + 2, None, drawn), "y": MetricValue(math.nan, None, None, "lower")}
    write_cell(tmp_path, "one", "test", MeasuredCell({"row": None}, metrics, PROTOCOL, 1.5, 24.0, 3.0))
    found = read_cell(tmp_path, "one")
    assert found is not None and found.protocol == PROTOCOL and found.what == {"row": None}
    assert torch.allclose(found.metrics["x"].replicates, drawn, rtol=0, atol=3 / 2048, equal_nan=True)
    assert found.metrics["x"] == metrics["x"] and math.isnan(found.metrics["y"].value)
    assert cell_file(tmp_path, "one").stat().st_size < 4000
    assert read_cell(tmp_path, "two") is None
