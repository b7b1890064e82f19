"""Bootstrap replicates of a run's table, kept beside it: paired tests between runs need them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lora_dae.adapter.atomic import load_tensors, save_tensors
from lora_dae.evaluation.report.table import ResultsTable

FILE_NAME = "replicates.safetensors"


def save_replicates(table: ResultsTable, run_dir: Path) -> None:
    """``<row>/<metric>`` -> (R,) float64; runs of one seed and one number of images resampled the same images."""
    found = {
        f"{row}/{metric}": value.replicates
        for row, metrics in {**table.references, **table.methods}.items()
        for metric, value in metrics.items()
        if value.replicates is not None and len(value.replicates) > 0
    }
    if found:
        save_tensors(found, run_dir / FILE_NAME, {"format": "pt"})


def load_replicates(run_dir: Path) -> dict[str, Tensor]:
    """What save_replicates wrote; {} without bootstrap."""
    path = run_dir / FILE_NAME
    return load_tensors(path, "measure the run again")[0] if path.is_file() else {}
