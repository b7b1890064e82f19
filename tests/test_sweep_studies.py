"""Every study of experiments/ from its files to its table, shortened; shared between them, and after a kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from compose import SHORT
from rich.console import Console
from test_sweep_compare import ROOT, STUDIES, STUDY, write_study
from test_sweep_compare import test_tables_and_files_of_every_study_agree as check_files

from lora_dae.sweep import store
from lora_dae.sweep.cell_worker import Work, measure_cells
from lora_dae.sweep.cells import Wanted
from lora_dae.sweep.compare import list_file, make_jobs, read_studies, write_tables
from lora_dae.sweep.files import read_json
from lora_dae.sweep.results import read_results

QUIET = Console(quiet=True)


def shortened(backbone: Path, cache: Path) -> list[str]:
    short = [o for o in SHORT if not o.startswith(("trainer.max_steps", "data.test_size"))]
    return [f"backbone.path={backbone}", f"data.cache_dir={cache}", "trainer.max_steps=1", "data.test_size=4", *short]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """experiments/ and multirun/ of all studies, so that later ones find what earlier ones measured."""
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_study_runs(study: Path, tiny_backbone: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its cells with one seed; what another study has measured is not measured again."""
    folder = shared / "experiments" / study.name
    shutil.copytree(study, folder)
    text = (folder / "study.yaml").read_text()
    (folder / "study.yaml").write_text(re.sub(r"(?m)^seeds: .*$", "seeds: [0]", text))
    (one,) = read_studies([folder], [*shortened(tiny_backbone, shared / "cache"), "objective.prior_images=2"])
    before = {path.stem for path in one.results.glob("*.json")}
    drawn: list[str] = []
    original = Work.measure

    def counted(self: Work, wanted: Wanted) -> Any:
        drawn.append(wanted.digest)
        return original(self, wanted)

    monkeypatch.setattr(Work, "measure", counted)
    for job in make_jobs([one], shared / "multirun"):
        measure_cells(list_file(job), QUIET)
    wanted = {w.digest for w in one.cells}
    assert sorted(drawn) == sorted(wanted - before)
    write_tables([one], shared / "multirun", QUIET)
    results = read_results(folder)
    assert list(results["cells"]) == [cell.name for cell in one.grid.cells]
    assert f"Complete: {len(one.grid.cells)} cells with 1 training seed each." in (folder / "README.md").read_text()
    check_files(folder)
    assert {"crops.png", "pareto.png"} <= {path.name for path in (folder / "figures").iterdir()}
    assert make_jobs([one], shared / "multirun") == []
    if study.name == "rank_x_strength":
        assert (folder / "figures" / "heat_fd_effnet.png").is_file()


def test_two_studies_share_measurements_and_adapters(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One adapter, two modules on it, four pictures; each once."""
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


def compare(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "lora_dae.sweep.compare", *words],
        cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_a_killed_comparison_goes_on_with_the_same_command(tmp_path: Path, tiny_backbone: Path) -> None:
    folder = write_study(tmp_path / "experiments" / "tiny", STUDY.replace("[0, 1, 2]", "[0]"))
    words = ["experiments/tiny", *shortened(tiny_backbone, Path("cache"))]
    killed = compare(tmp_path, *words)
    cells = tmp_path / "experiments" / "cells"
    while not list(cells.glob("*.json")):
        assert killed.poll() is None, killed.stdout and killed.stdout.read()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    first = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    again = compare(tmp_path, *words)
    text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    times = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert len(first) < len(times) == 4 and first.items() <= times.items()
    assert len(list((tmp_path / "multirun" / "store").glob("*/trained.json"))) == 2
    check_files(folder)
    assert all(read_json(path)["metrics"] for path in times)
    shutil.rmtree(tmp_path / "cache")  # nothing is trained or drawn again
    last = compare(tmp_path, *words)
    assert last.wait() == 0
    assert {path: path.stat().st_mtime_ns for path in cells.glob("*.json")} == times
