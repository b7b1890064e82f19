"""``python -m lora_dae.sweep.compare experiments/mainstream -j 2``: run comparisons, or go on with them.

Without a folder: all of experiments/. Cells that several of them ask for are measured once. It ends with the studies'
tables, also of what is not finished. ``--plan`` says what it costs and stops; ``--table`` writes the tables of what is
there. A table that would lose cells stays as it is, unless ``--drop`` is given. Words with "=" are overrides for every
cell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_dae.config import ConfigError
from lora_dae.sweep.budget import budget
from lora_dae.sweep.cell_files import is_measured
from lora_dae.sweep.cell_worker import write_list
from lora_dae.sweep.cells import FILE, Comparison, Wanted, distinct, read_comparison, wanted_cells
from lora_dae.sweep.devices import Devices, visible_gpus
from lora_dae.sweep.figures import draw_crops, draw_plots
from lora_dae.sweep.identity import content_hash
from lora_dae.sweep.jobs import DONE, Job
from lora_dae.sweep.launcher import InterruptedSweepError, run_jobs
from lora_dae.sweep.results import build_results, check_readme, read_results, write_results

MULTIRUN = Path("multirun")
CAPTION = (
    "Pictures in each cell: training seeds x pictures. Measured: cells and seeds, each once. Trained: adapters and "
    "modules. Hours of 2 CPU cores: alone, and added to the lines above."
)


@dataclass(frozen=True)
class Study:
    """A comparison, its folder, and its cells with every seed."""

    folder: Path
    grid: Comparison
    cells: list[Wanted]
    extra: tuple[str, ...] = ()  # overrides that make other cells of the study's

    @property
    def results(self) -> Path:
        """Where the files of measured cells are: beside the studies, which share them."""
        return self.folder.resolve().parent / "cells"


def read_studies(folders: Sequence[Path], extra: Sequence[str]) -> list[Study]:
    """Raises ConfigError for a study that cannot be run, and for studies that do not lie side by side."""
    if len({folder.resolve().parent for folder in folders}) > 1:
        raise ConfigError("these studies lie in several folders, and share their cells in none: run them one by one.")
    grids = [read_comparison(folder) for folder in folders]
    for folder in folders:
        check_readme(folder)
    return [_study(folder, grid, extra) for folder, grid in zip(folders, grids, strict=True)]


def _study(folder: Path, grid: Comparison, extra: Sequence[str]) -> Study:
    cells = wanted_cells(grid, extra)
    same = not extra or [one.digest for one in cells] == [one.digest for one in wanted_cells(grid)]
    return Study(folder, grid, cells, () if same else tuple(extra))


def already_measured(results: Path, cells: Sequence[Wanted]) -> set[str]:
    """The digests of those ``cells`` that a run would not measure again."""
    return {one.digest for one in cells if is_measured(results, one.digest, one.cfg.evaluation.lpips is not None)}


def plan_table(studies: Sequence[Study]) -> Table:
    """A line per study: what it costs alone, and what it adds to those above it; the sum; what is left to do."""
    table = Table("study", "cells", "pictures", "measured", "trained", "hours", "added", caption=CAPTION)
    table.columns[0].no_wrap = True
    before: list[Wanted] = []
    for study in studies:
        alone = budget(study.cells)
        added = budget([*before, *study.cells]).hours - budget(before).hours
        before += study.cells
        sizes = sorted({one.cfg.evaluation.num_samples for one in study.cells})
        pictures = f"{len(study.grid.seeds)} x {'-'.join(map(str, sizes))}"
        table.add_row(
            study.grid.name, str(len(study.grid.cells)), pictures, str(alone.cells), str(alone.trainings),
            f"{alone.hours:.1f}", f"{added:.1f}",
        )  # fmt: skip
    whole = budget(before)
    left = budget(before, already_measured(studies[0].results, before))
    table.add_section()
    for name, cost in (("all", whole), ("to do", left)):
        table.add_row(name, "", "", str(cost.cells), str(cost.trainings), "", f"{cost.hours:.1f}")
    return table


def make_jobs(studies: Sequence[Study], multirun: Path) -> list[Job]:
    """A process for each adapter and seed of which a cell is not measured yet, the first seeds first."""
    results = studies[0].results
    missing: dict[str, list[Wanted]] = {}
    for one in distinct(w for study in studies for w in study.cells):
        if not is_measured(results, one.digest, one.cfg.evaluation.lpips is not None):
            missing.setdefault(one.adapter or "untrained", []).append(one)
    jobs: list[Job] = []
    for name, cells in missing.items():
        folder = multirun / "cells" / name
        # Done or not is told by the cells' files: of an earlier start of this process nothing counts.
        (folder / "job.json").unlink(missing_ok=True)
        first = cells[0]
        jobs.append(
            Job(
                number=len(jobs),
                overrides=list(first.overrides),
                label=first.label + (f" and {len(cells) - 1} more" if len(cells) > 1 else ""),
                directory=folder,
                digest=content_hash([one.digest for one in cells]),
                work=name,
            )
        )
        write_list(list_file(jobs[-1]), cells, results, (multirun / "store").resolve())
    return jobs


def list_file(job: Job) -> Path:
    """What the job's process is to measure."""
    return job.directory / f"list_{job.digest}.json"


def worker_command(job: Job) -> list[str]:
    call = "import sys; from lora_dae.cli import cells; cells(sys.argv[1])"
    return [sys.executable, "-c", call, str(list_file(job))]


def run_comparisons(
    studies: Sequence[Study], multirun: Path, jobs_at_once: int, console: Console, drop: bool = False
) -> int:
    """Measure what is missing and write the tables; returns the number of processes that failed."""
    console.print(plan_table(studies))
    jobs = make_jobs(studies, multirun)
    try:
        if jobs:
            run_jobs(jobs, worker_command, Devices(jobs_at_once, visible_gpus()), console)
    finally:  # also after Ctrl-C: what is there is worth a table
        write_tables(studies, multirun, console, drop)
    failed = [job for job in jobs if job.state != DONE]
    for job in failed:
        console.print(f"{job.label} {job.state}: {job.error}; log {job.log}", soft_wrap=True, markup=False)
    return len(failed)


def write_tables(studies: Sequence[Study], multirun: Path, console: Console, drop: bool = False) -> None:
    """Results, README's table and figures of what is there of each study.

    What results.json has and the present code would measure anew (another module, weights or renderer) keeps a study's
    files as they are, or goes with ``drop``; it is named.
    """
    for study in studies:
        have = sum(is_measured(study.results, one.digest, lpips=False) for one in study.cells)
        words = f"{study.grid.name}: {have} of {len(study.cells)} measurements"
        if have:
            results = build_results(study.grid, study.cells, study.results, study.extra)
            gone = lost_cells(read_results(study.folder), results, study.grid.seeds)
            if gone:
                console.print(
                    f"{study.grid.name}: of the table that was there {', '.join(gone)} "
                    f"{('go' if gone[1:] else 'goes') if drop else 'would go'}, "
                    "which the present code would measure anew (another module, weights or renderer)",
                    soft_wrap=True, highlight=False, markup=False,
                )  # fmt: skip
            if gone and not drop:
                words += ", the study's files stay as they are: measure those anew, or give --drop"
            else:
                words += _write_study(study, results, multirun)
        console.print(words, soft_wrap=True, highlight=False)


def _write_study(study: Study, results: Mapping[str, Any], multirun: Path) -> str:
    """Write the study's files; returns what there is to say of them."""
    write_results(study.folder, results)
    draw_plots(study.cells, results, study.folder / "figures")
    words, crops = "", study.folder / "figures" / "crops.png"
    if not draw_crops(study.cells, results["cells"], multirun / "cells", crops):
        words = f", {crops.name} stays: not all pictures are on this machine"
    words += f", table {study.folder / 'README.md'}"
    known_metrics = {name for cell in results["cells"].values() for name in cell["metrics"]}
    lacking = [name for name in study.grid.metrics if name not in known_metrics]
    return words + (f"; no cell has {', '.join(lacking)}" if lacking else "")


def lost_cells(old: Mapping[str, Any], new: Mapping[str, Any], seeds: Sequence[int]) -> list[str]:
    """Cells of old results that new ones lack, or lack a training seed of, of the ``seeds`` that are asked for."""
    found = []
    for name, cell in old.get("cells", {}).items():
        kept = new["cells"].get(name, {}).get("training_seeds", [])
        if not kept or (set(cell["training_seeds"]) & set(seeds)) - set(kept):
            found.append(name)
    return found


def main() -> None:
    """Exit code 1 if a process failed, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m lora_dae.sweep.compare", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="folder or override")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--drop", action="store_true")
    given = parser.parse_intermixed_args()
    console = Console()
    extra = [word for word in given.words if "=" in word]
    folders = [Path(word) for word in given.words if "=" not in word]
    try:
        studies = read_studies(folders or sorted(path.parent for path in Path("experiments").glob(f"*/{FILE}")), extra)
        if not studies:
            raise ConfigError(f"there is no experiments/*/{FILE} here: give folders, or start where they are.")
        if given.plan:
            console.print(plan_table(studies))
        elif given.table:
            write_tables(studies, MULTIRUN, console, given.drop)
        else:
            sys.exit(int(run_comparisons(studies, MULTIRUN, given.jobs, console, given.drop) > 0))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InterruptedSweepError:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
