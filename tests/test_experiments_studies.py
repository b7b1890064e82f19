"""Studies of experiments/: which there are, what they cost, and that their tables are what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparisons import ROOT, STUDIES, check_files

from lora_dae.sweep.budget import budget
from lora_dae.sweep.cells import Wanted, read_comparison, wanted_cells
from lora_dae.sweep.compare import read_studies
from lora_dae.sweep.results import read_results


def test_studies_are_those_that_the_project_promises() -> None:
    expected = {"rank_x_strength", "mainstream", "enhancement_ablation", "solver_and_steps", "paired_source", "texture",
                "mainstream_text", "training_shortcuts", "tuning", "enhancement"}  # fmt: skip
    assert {study.name for study in STUDIES} == expected


def test_all_comparisons_together_take_ten_hours_at_most() -> None:
    """The headline table has 3 x 342 = 1,026 pictures a cell; what studies share is counted once. Only tuning sees the
    validation split. The module's evidence, tuning, and how to train faster are no comparisons of methods."""
    studies = read_studies(STUDIES, [])
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
    check_files(study)
