"""Studies of experiments/: which there are, what they cost, and that their tables are what was measured."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from comparisons import ROOT, STUDIES, check_files

from lora_dae.sweep.budget import budget
from lora_dae.sweep.cells import REVISED, Comparison, Wanted, compose_cell, read_comparison, wanted_cells
from lora_dae.sweep.compare import Study
from lora_dae.sweep.files import read_json
from lora_dae.sweep.identity import content_hash
from lora_dae.sweep.results import read_results
from lora_dae.training.finish import judging


@cache  # composing the evidence takes half a minute
def composed(name: str) -> tuple[Comparison, list[Wanted]]:
    grid = read_comparison(ROOT / "experiments" / name)
    return grid, wanted_cells(grid)


def test_studies_are_those_that_the_project_promises() -> None:
    expected = {"rank_x_strength", "mainstream", "enhancement_ablation", "solver_and_steps", "paired_source", "texture",
                "mainstream_text", "training_shortcuts", "tuning", "enhancement"}  # fmt: skip
    assert {study.name for study in STUDIES} == expected


def test_all_comparisons_together_take_ten_hours_at_most() -> None:
    """The headline table has 3 x 342 = 1,026 pictures a cell; what studies share is counted once. Only tuning sees the
    validation split. The module's evidence, tuning, and how to train faster are no comparisons of methods."""
    studies = [Study(folder, *composed(folder.name)) for folder in STUDIES]
    named = {study.grid.name: study for study in studies}
    assert {one.cfg.evaluation.split for one in named["tuning"].cells} == {"val"}
    for other in ("enhancement", "tuning", "training_shortcuts"):
        studies.remove(named[other])
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


def test_the_study_that_the_readme_shows_is_one(tmp_path: Path) -> None:
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    (tmp_path / "study.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    grid = read_comparison(tmp_path)
    for cell in grid.cells:
        cfg = compose_cell((*grid.common, *cell.overrides))
        assert cfg.conditioning == "source" and cfg.backbone.name == "sd15"
    assert len(grid.cells) == 4


def test_cells_are_named_by_what_they_hold() -> None:
    files = list((ROOT / "experiments" / "cells").glob("*.json"))
    assert len(files) > 200
    for file in files:
        assert content_hash(read_json(file)["what"]) == file.stem


def test_what_was_measured_is_found_again() -> None:
    """An option that came later, but is not left out of hashes at its default, would orphan trainings and cells."""
    results, found = read_results(ROOT / "experiments" / "mainstream")["cells"], []
    for one in composed("mainstream")[1]:
        digest = results.get(one.cell.name, {}).get("files", {}).get(str(one.seed))
        # The module, two methods, two rows' rate for the source's input and the frozen row have changed since.
        same = one.cfg.sampling.method not in REVISED and one.cfg.optimizer.source_learning_rate is None
        same = same and one.cell.row is None
        if digest is not None and not one.cfg.enhancement.enabled and same:
            found.append(one.digest == digest)
    assert len(found) > 12 and all(found)


@pytest.mark.parametrize("name", ["mainstream", "mainstream_text"])
def test_the_comparison_has_every_mainstream_method(name: str) -> None:
    cells = read_comparison(ROOT / "experiments" / name).cells

    def given(key: str) -> set[str]:
        return {o.removeprefix(f"{key}=") for cell in cells for o in cell.overrides if o.startswith(f"{key}=")}

    assert given("experiment") == {
        "rank16", "attention_only", "full_finetune", "dora", "rslora", "loha", "lokr", "dreambooth",
        "textual_inversion",
    }  # fmt: skip
    assert given("method") == {
        "freeu", "sag", "pag", "apg", "rescale", "frequency", "detail_daemon", "wavelet", "unsharp",
    }  # fmt: skip
    assert any(cell.row == "frozen backbone" for cell in cells)
    as_diffusers = "adapter.targets=[cross_attention,self_attention]"  # its example's layers
    assert any(as_diffusers in cell.overrides for cell in cells)


def test_the_evidence_is_on_guidance_and_settings_that_were_tuned() -> None:
    """Guidance and controls' settings have tuning's least distance on those pairs; 513 captions, 3 seeds."""
    _, tried = composed("tuning")
    measured = read_results(ROOT / "experiments" / "tuning")["cells"]

    def distance(one: Wanted) -> float:
        return float(measured[one.cell.name]["metrics"]["fd_effnet"]["value"])

    def pairs(one: Wanted) -> tuple[str, str]:
        return one.cfg.conditioning, one.cfg.data.difficulty

    _, found = composed("enhancement")
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
        module, drawn = one.cfg.enhancement, one.cfg.sampling
        if module.enabled and (module.gain or module.decoder):
            judged = judging(one.cfg, drawn.scheduler)
            assert judged.num_inference_steps == drawn.num_inference_steps
            assert judged.guidance_scale == drawn.guidance_scale
            assert judged.source_guidance_scale == drawn.source_guidance_scale or one.cfg.conditioning == "none"
        if one.cell.row is None and one.cfg.conditioning == "source" and "guidance" not in one.cell.name:
            assert one.cfg.sampling.guidance_scale == one.cfg.sampling.source_guidance_scale


def test_the_evidence_compares_rows_of_the_same_pairs_and_solver() -> None:
    evidence, found = composed("enhancement")
    rows = {one.cell.name: one for one in found}

    def shown(one: Wanted) -> tuple[str, ...]:
        return one.cfg.conditioning, one.cfg.data.difficulty, one.cfg.sampling.scheduler

    assert all(shown(one) == shown(rows[one.cell.against or evidence.baseline]) for one in rows.values())


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_tables_and_files_of_every_study_agree(study: Path) -> None:
    check_files(study)


def test_no_cell_says_where_a_machine_keeps_its_files() -> None:
    told = {path.name: read_json(path)["by"] for path in (ROOT / "experiments" / "cells").glob("*.json")}
    assert told and not [name for name, by in told.items() if "lpips=" in by or "=/" in by]
