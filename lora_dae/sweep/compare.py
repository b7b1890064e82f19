"""``python -m lora_dae.sweep.compare experiments/mainstream -j 2``: run a comparison, or go on with it.

It ends with the study's table. ``--plan`` says what it costs and stops; ``--table`` writes the table of what is
finished. Further words are overrides for every cell.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.sampling.sheet import image_grid
from lora_dae.sweep.cells import Comparison, budget, make_jobs, read_comparison, run_folder
from lora_dae.sweep.devices import Devices, visible_gpus
from lora_dae.sweep.jobs import DONE
from lora_dae.sweep.launcher import InterruptedSweepError, run_jobs
from lora_dae.sweep.report import write_sweep_report
from lora_dae.sweep.results import build_results, write_results
from lora_dae.sweep.search import train_command

CROPS, SIDE, ZOOM = 3, 48, 4  # prompts, pixels of a crop, times enlarged


def run_comparison(folder: Path, runs: Path, jobs_at_once: int, extra: Sequence[str], console: Console) -> int:
    """Run what is not finished and write the tables; returns the number of runs that failed."""
    grid = read_comparison(folder)
    jobs, configs = make_jobs(grid, runs, extra)
    console.print(budget(grid, jobs, configs).words(), soft_wrap=True, highlight=False)
    devices = Devices(jobs_at_once, visible_gpus())
    run_jobs(jobs, lambda job: train_command(job.overrides, job.directory), devices, console)
    failed = [job for job in jobs if job.state != DONE]
    for job in failed:
        console.print(f"{job.label} {job.state}: {job.error}; log {job.log}", soft_wrap=True, markup=False)
    try:
        write_tables(folder, replace(grid, common=(*grid.common, *extra)), runs, console)
    except ConfigError as error:
        if not failed:
            raise
        console.print(f"no table: {error}", soft_wrap=True, markup=False)
    return len(failed)


def write_tables(folder: Path, grid: Comparison, runs: Path, console: Console) -> None:
    """Results, README's table and figures of what is finished."""
    write_results(folder, build_results(grid, runs))
    report = write_sweep_report(runs)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for picture in (runs / "plots").glob("*.png"):
        shutil.copyfile(picture, figures / picture.name)
    draw_crops(grid, runs, figures / "crops.png")
    console.print(f"table    {folder / 'README.md'}\nreport   {report}", soft_wrap=True, highlight=False)


def draw_crops(grid: Comparison, runs: Path, output: Path) -> None:
    """The middle of the first pictures at 400 %, a column for each cell that has pictures of its own."""
    columns: dict[str, list[np.ndarray]] = {}
    for cell in grid.cells:
        files = sorted(run_folder(runs, cell, grid.seeds[0]).glob("samples/test/*.png"))[:CROPS]
        if cell.row is None and len(files) == CROPS:
            columns[cell.name] = [_middle(np.asarray(Image.open(file).convert("RGB"))) for file in files]
    if columns:
        flat = [columns[name][row] for row in range(CROPS) for name in columns]
        image_grid(flat, CROPS, len(columns), list(columns), zoom=ZOOM).save(output)


def _middle(image: np.ndarray) -> np.ndarray:
    top, left = ((side - min(SIDE, side)) // 2 for side in image.shape[:2])
    return image[top : top + SIDE, left : left + SIDE]


def main() -> None:
    """Exit code 1 if a run failed, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m lora_dae.sweep.compare", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_intermixed_args()
    console = Console()
    try:
        grid = read_comparison(given.folder)
        runs = Path("multirun") / f"study_{grid.name}"
        if given.plan:
            words = budget(grid, *make_jobs(grid, runs, given.overrides)).words()
            console.print(words, soft_wrap=True, highlight=False)
        elif given.table:
            write_tables(given.folder, grid, runs, console)
        else:
            sys.exit(int(run_comparison(given.folder, runs, given.jobs, given.overrides, console) > 0))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InterruptedSweepError:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
