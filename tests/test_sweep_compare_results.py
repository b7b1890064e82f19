"""Comparisons: results and files that agree with each other and with what was measured."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comparisons import PROTOCOL, STUDY, cells_of, check_files, fake, write_study
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.evaluation.report.table import MetricValue
from lora_dae.sweep.cell_files import MeasuredCell, cell_file, is_measured, read_cell, write_cell
from lora_dae.sweep.cells import Wanted, read_comparison
from lora_dae.sweep.compare import Study, already_measured, make_jobs, read_studies, write_tables
from lora_dae.sweep.results import NOT_RUN, build_results, read_results, render, write_results

Files = tuple[Path, list[Wanted], Path]


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
        # What a plan counts as done is what a run would not do.
        assert (digest in already_measured(files, study.cells)) == whole and digest in already_measured(files, found)


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
    check_files(folder)
    text = (folder / "README.md").read_text()
    assert text.startswith("# A study\n\nbefore") and text.endswith("\n\nafter\n") and NOT_RUN not in text
    write_results(folder, build_results(read_comparison(folder), found, files))
    assert (folder / "README.md").read_text() == text
    one = next(iter(read_results(folder)["cells"]["ours"]["files"].values()))
    write_cell(files, one, "test", fake(7.0, 0))
    with pytest.raises(AssertionError):
        check_files(folder)
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
    kinds = "32-true and a precision that was not recorded and bf16-mixed"
    assert f"Warning: few images; cells were measured in {kinds}: give trainer.precision" in text
    assert "fewer than 3 seeds: so much" not in text and "Not the study" not in text
    alone = render(build_results(grid, [one for one in found if one.seed == 0], files))
    assert "One training seed, with 95 % intervals over images." in alone
    untrained = [one for one in found if one.seed == 0 or one.cell.row is not None]  # the latter the same for all seeds
    write_cell(files, untrained[-1].digest, "test", replace(fake(9.0, 0), adapter_mb=0.0))
    assert "One training seed, with 95 % intervals over images." in render(build_results(grid, untrained, files))
    some = [one for one in found if one.seed == 0 or one.cell.name != "ours"]
    assert "Mean over the training seeds that a row has; 95 %" in render(build_results(grid, some, files))


def test_a_damaged_measurement_is_made_again(measured: Files, tmp_path: Path) -> None:
    folder, found, files = measured
    study = Study(folder, read_comparison(folder), found)
    whole = already_measured(files, found)
    victim = next(iter(sorted(files.glob("*.json"))))
    before = {job.digest for job in make_jobs([study], tmp_path / "multirun")}
    path = study.results / victim.name
    path.write_text(path.read_text()[:100])
    assert whole - already_measured(files, found) == {victim.stem}
    assert {job.digest for job in make_jobs([study], tmp_path / "multirun")} != before


def test_a_table_that_would_lose_rows_stays_unless_that_is_asked_for(measured: Files, tmp_path: Path) -> None:
    """Cells of another module, weights or renderer are not those that the study asks for. Other studies go on."""
    folder, found, files = measured
    study = Study(folder, read_comparison(folder), found)
    write_results(folder, build_results(study.grid, found, files))
    other = Study(write_study(tmp_path / "other"), study.grid, found)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for one in found:
        if one.cell.name == "theirs" or (one.cell.name == "ours" and one.seed == 1):
            cell_file(files, one.digest).unlink(missing_ok=True)  # one for all seeds of the first
    told = io.StringIO()
    write_tables([study, other], tmp_path / "multirun", Console(file=told, width=500))
    assert ": of the table that was there ours, theirs would go, which" in told.getvalue()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(read_results(other.folder)["cells"]) == ["plain", "ours"]
    write_tables([study], tmp_path / "multirun", Console(file=told, width=500), drop=True)
    assert ": of the table that was there ours, theirs go, which" in told.getvalue()
    cells = read_results(folder)["cells"]
    assert {name: cell["training_seeds"] for name, cell in cells.items()} == {"plain": [0, 1, 2], "ours": [0, 2]}


def test_a_seed_that_is_no_longer_asked_for_is_no_loss(measured: Files, tmp_path: Path) -> None:
    folder, found, files = measured
    write_results(folder, build_results(read_comparison(folder), found, files))
    first = replace(read_comparison(folder), seeds=(0,))
    one = Study(folder, first, [wanted for wanted in found if wanted.seed == 0])
    write_tables([one], tmp_path / "multirun", Console(quiet=True))
    assert read_results(folder)["cells"]["ours"]["training_seeds"] == [0]


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
