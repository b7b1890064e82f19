"""A comparison's study.yaml, its cells, and cells that look as if they had been measured, for the tests of sweeps."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_dae.evaluation.report.table import MetricValue, Protocol
from lora_dae.sweep.cell_files import MeasuredCell, read_cell
from lora_dae.sweep.cells import Wanted, read_comparison, wanted_cells
from lora_dae.sweep.results import BEGIN, END, NOT_RUN, csv_lines, read_results, render

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
PROTOCOL = Protocol(8, 8, "test", 64, "ddim", 2, 2.0, None, [1], "effnet", 20)


def write_study(folder: Path, text: str = STUDY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(text)
    (folder / "README.md").write_text(README)
    return folder


def cells_of(folder: Path, *extra: str) -> list[Wanted]:
    return wanted_cells(read_comparison(folder), extra)


def fake(value: float, seed: int) -> MeasuredCell:
    """A measured cell; the images of one seed are drawn as in another cell of that seed."""
    noise = torch.randn(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    metrics = {
        "fd_effnet": MetricValue(value, value - 0.1, value + 0.1, "lower", value + 0.05 * noise),
        "attr_color": MetricValue(0.5, 0.4, 0.6, "higher", 0.5 + 0.01 * noise),
    }
    return MeasuredCell({}, metrics, PROTOCOL, 1.5, 24.0, 3.0)


def check_files(study: Path) -> None:
    """Table, csv and json of a study say the same, and what they say is in its cells' files."""
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
