"""Studies from their files to their tables, shortened; shared between them, and after a kill."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import ROOT, STUDIES, STUDY, check_files, fake, write_study
from compose import SHORT
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.sweep import cell_worker, store
from lora_dae.sweep.cell_files import read_cell, write_cell
from lora_dae.sweep.cell_worker import Work, measure_cells
from lora_dae.sweep.cells import Wanted, read_comparison, wanted_cells, with_seeds
from lora_dae.sweep.compare import Study, list_file, make_jobs, read_studies, write_tables
from lora_dae.sweep.results import read_results
from lora_dae.training.ended import NonFiniteLossError

QUIET = Console(quiet=True)


def shortened(backbone: Path, cache: Path) -> list[str]:
    short = [o for o in SHORT if not o.startswith(("trainer.max_steps", "data.test_size"))]
    return [f"backbone.path={backbone}", f"data.cache_dir={cache}", "trainer.max_steps=1", "data.test_size=4", *short]


def test_a_study_runs_from_its_file_to_its_table(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All cells of texture/ with one seed, each measured once."""
    folder = tmp_path / "experiments" / "texture"
    shutil.copytree(ROOT / "experiments" / "texture", folder)
    text = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(re.sub(r"(?m)^seeds: [^#]*", "seeds: [0] ", text))
    (one,) = read_studies([folder], shortened(tiny_backbone, tmp_path / "cache"))
    drawn: list[str] = []
    original = Work.measure

    def counted(self: Work, wanted: Wanted) -> Any:
        drawn.append(wanted.digest)
        return original(self, wanted)

    monkeypatch.setattr(Work, "measure", counted)
    for job in make_jobs([one], tmp_path / "multirun"):
        measure_cells(list_file(job), QUIET)
    assert sorted(drawn) == sorted(w.digest for w in one.cells)
    write_tables([one], tmp_path / "multirun", QUIET)
    results = read_results(folder)
    assert list(results["cells"]) == [cell.name for cell in one.grid.cells]
    assert f"Complete: {len(one.grid.cells)} cells with 1 training seed each." in (folder / "README.md").read_text()
    check_files(folder)
    assert {"crops.png", "metrics.png", "pareto.png"} <= {path.name for path in (folder / "figures").iterdir()}
    crops = (folder / "figures" / "crops.png").read_bytes()
    shutil.rmtree(next((tmp_path / "multirun" / "cells").glob("*/pictures/*")))  # drawn on another machine
    write_tables([one], tmp_path / "multirun", QUIET)
    assert (folder / "figures" / "crops.png").read_bytes() == crops
    assert make_jobs([one], tmp_path / "multirun") == []


def test_rank_x_strength_is_a_heat_map(tmp_path: Path) -> None:
    """Of a finished study; the numbers are made up."""
    folder = tmp_path / "experiments" / "rank_x_strength"
    shutil.copytree(ROOT / "experiments" / "rank_x_strength", folder)
    grid = replace(read_comparison(folder), seeds=(0,))
    study = Study(folder, grid, wanted_cells(grid))
    for number, one in enumerate(study.cells):
        write_cell(study.results, one.digest, "test", fake(float(number + 1), 0))
    write_tables([study], tmp_path / "multirun", QUIET)
    check_files(folder)
    assert {"heat_fd_effnet.png", "curves.png"} <= {path.name for path in (folder / "figures").iterdir()}


def test_two_studies_share_measurements_and_adapters(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter, two modules on it, four pictures; each once. What studies ask for is among what is measured."""
    one = STUDY.replace("[0, 1, 2]", "[0]").replace("  half: [enhancement.strength=0.5]\n", "")
    two = one.replace("ours: [enhancement.strength=1]", "ours: [enhancement=gain]")
    folders = [write_study(tmp_path / "experiments" / n, text) for n, text in (("one", one), ("two", two))]
    studies = read_studies(folders, shortened(tiny_backbone, tmp_path / "cache"))
    drawn: list[tuple[str, float]] = []
    trained: list[str] = []
    draw, train = Work._draw, store.train

    def counted_draw(self: Work, wanted: Wanted, *rest: Any) -> Any:
        drawn.append((wanted.cell.name, wanted.cfg.enhancement.strength))
        return draw(self, wanted, *rest)

    def counted_train(cfg: Any, *rest: Any) -> Any:
        trained.append(cfg.enhancement.enabled)
        return train(cfg, *rest)

    monkeypatch.setattr(Work, "_draw", counted_draw)
    monkeypatch.setattr(store, "train", counted_train)
    for job in make_jobs(studies, tmp_path / "multirun"):
        measure_cells(list_file(job), QUIET)
    assert sorted(drawn) == [("ours", 1.0), ("ours", 1.0), ("plain", 0.0), ("theirs", 0.0)]
    assert trained == [False, True, True]
    write_tables(studies, tmp_path / "multirun", QUIET)
    first, second = (read_results(folder)["cells"] for folder in folders)
    assert first["plain"]["files"] == second["plain"]["files"] and first["ours"]["files"] != second["ours"]["files"]
    measured = [read_cell(studies[0].results, first[name]["files"]["0"]) for name in ("plain", "theirs")]
    known = {metric for cell in measured if cell is not None for metric in cell.metrics}
    for study in STUDIES:  # with a source, and without one; what evaluation.reconstructions adds is tested below
        asked_for = {"fd_effnet_recon", "kd_effnet_recon", "lpips_alex", "lpips_alex_garment"}
        assert set(read_comparison(study).metrics) - asked_for <= known


def test_what_evaluation_asks_for_is_drawn(tiny_backbone: Path, tmp_path: Path) -> None:
    """The validation split; other pairs, each with its own noise; another source photo; distances to the VAE's own."""
    asked = ["split=val", "first_pair=2", "wrong_source=true", "reconstructions=true"]
    text = STUDY.replace("[0, 1, 2]", "[0]").partition("cells:")[0] + "cells:\n  plain: [enhancement=none]\n"
    text += "".join(f"  {name}: [enhancement=none, evaluation.{name}]\n" for name in asked)
    folder = write_study(tmp_path / "experiments" / "asked", text)
    more = ["evaluation.num_samples=2", "sampling.batch_size=1"]
    (study,) = read_studies([folder], [*shortened(tiny_backbone, tmp_path / "cache"), *more])
    work = Work(tmp_path / "work", tmp_path / "store")
    drawn = {}
    original = work._draw

    def kept(wanted: Wanted, *rest: Any) -> Any:
        drawn[wanted.cell.name] = original(wanted, *rest)
        return drawn[wanted.cell.name]

    work._draw = kept  # type: ignore[method-assign]
    measured = {one.cell.name: work.measure(one) for one in study.cells}
    assert len({measured[name].metrics["psnr"].value for name in ("plain", *asked[:3])}) == 4
    assert measured["split=val"].protocol.split == "val" and measured["plain"].protocol.split == "test"
    assert (drawn["reconstructions=true"] == drawn["plain"]).all()
    extra = measured["reconstructions=true"].metrics.keys() - measured["plain"].metrics.keys()
    assert extra == {"fd_effnet_recon", "kd_effnet_recon"}
    assert not any("recon" in name for name in measured["plain"].metrics)
    (whole,) = (one for one in study.cells if one.cell.name == "plain")
    longer = [o for o in whole.overrides if "num_samples" not in o]
    (whole,) = with_seeds(whole.cell, [0], (*longer, "evaluation.num_samples=4"))
    work.measure(whole)
    assert (drawn["plain"][2:] == drawn["first_pair=2"]).all()


def test_a_run_leaves_the_device_before_another_one_trains(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them may not fit. Cells of the same training are drawn with the one that is there."""
    text = STUDY.replace("[0, 1, 2]", "[0]").partition("cells:")[0] + "cells:\n  plain: [enhancement=none]\n"
    text += "  same: [enhancement=none, sampling.seed=7]\n  wide: [enhancement=none, adapter.rank=3]\n"
    folder = write_study(tmp_path / "experiments" / "kept", text)
    (study,) = read_studies([folder], [*shortened(tiny_backbone, tmp_path / "cache"), "evaluation.num_samples=2"])
    work = Work(tmp_path / "work", tmp_path / "store")
    there: list[bool] = []
    original = cell_worker.train_shared

    def trains(cfg: Any) -> Any:
        there.append(work._run is not None)
        return original(cfg)

    monkeypatch.setattr(cell_worker, "train_shared", trains)
    for one in study.cells:
        work.measure(one)
    assert there == [False, True, False]


def test_a_cell_that_cannot_be_measured_stops_no_other(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs that are not there, a metric that is not to be had, a NaN, too little memory: none of them gets a file."""
    text = STUDY.replace("[0, 1, 2]", "[0]").partition("cells:")[0]
    text += "cells:\n  gone: [enhancement=none, evaluation.first_pair=9]\n"
    text += f"  lacking: [enhancement=none, evaluation.dinov2={tmp_path / 'none'}]\n"
    text += "".join(f"  rank{rank}: [enhancement=none, adapter.rank={rank}]\n" for rank in (2, 3))
    text += "  plain: [enhancement=none]\n"
    folder = write_study(tmp_path / "experiments" / "some", text.replace("baseline: plain", "baseline: gone"))
    (study,) = read_studies([folder], shortened(tiny_backbone, tmp_path / "cache"))
    errors = {2: NonFiniteLossError("the loss became nan"), 3: torch.OutOfMemoryError("no memory left\nand a table")}
    original = cell_worker.train_shared

    def fails(cfg: Any) -> Any:
        if cfg.adapter.rank in errors:
            raise errors[cfg.adapter.rank]
        return original(cfg)

    monkeypatch.setattr(cell_worker, "train_shared", fails)
    said = []
    for job in make_jobs([study], tmp_path / "multirun"):
        try:
            measure_cells(list_file(job), QUIET)
        except ConfigError as error:
            said.append(str(error))
    text = "; ".join(said)
    of_pairs, of_metric = "from number 9 on", "fd_dinov2 was asked for and is not to be had"
    for words in (of_pairs, of_metric, "rank2, seed 0: the loss became nan", "rank3, seed 0: no memory left"):
        assert words in text
    assert "\n" not in text
    assert [one.cell.name for one in study.cells if read_cell(study.results, one.digest)] == ["plain"]


def compare(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lora_dae.sweep.compare", *words],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def workers(launcher: int) -> list[Path]:
    """/proc's folders of a process's children."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [Path("/proc") / child for child in children]


def ended(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for a process's children")
def test_a_killed_comparison_goes_on_with_the_same_command(tmp_path: Path, tiny_backbone: Path) -> None:
    """The killed one's worker ends with it; what it had measured is neither measured nor trained again."""
    folder = write_study(tmp_path / "experiments" / "tiny", STUDY.replace("[0, 1, 2]", "[0]"))
    short = shortened(tiny_backbone, tmp_path / "cache")
    killed = compare(tmp_path, "experiments/tiny", *short)
    cells = tmp_path / "experiments" / "cells"
    while not list(cells.glob("*.json")):
        assert killed.poll() is None, killed.stdout and killed.stdout.read()
        time.sleep(0.05)
    left = workers(killed.pid)
    assert left
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 120
    while not all(ended(process) for process in left):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    again = compare(tmp_path, "experiments/tiny", *short)
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    times = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert len(first) < len(times) == 4 and first.items() <= times.items()
    assert len(list((tmp_path / "multirun" / "store").glob("*/trained.json"))) == 2
    check_files(folder)
    assert make_jobs(read_studies([folder], short), tmp_path / "multirun") == []
