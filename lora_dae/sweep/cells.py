"""What a comparison is: named cells (overrides of conf/train.yaml), each trained and measured with several seeds.

experiments/<name>/study.yaml    title, seeds, baseline, metrics, common overrides, cells
multirun/study_<name>/           a run folder per cell and seed
multirun/store/                  trainings, shared with all sweeps: cells that differ in sampling alone train once
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lora_dae.config import Config, ConfigError, check, conf_dir, from_dict, register
from lora_dae.sweep.identity import content_hash, training_key
from lora_dae.sweep.jobs import Job
from lora_dae.sweep.name import register_sweep_name
from lora_dae.sweep.table import network_calls

FILE = "study.yaml"
# Seconds on 2 CPU cores, for the budget alone: from a run of experiment=rank16, which trained on 20 photos a second. A
# network call is counted as a third of that.
TRAINING_IMAGE, NETWORK_CALL, MEASURING = 0.05, 0.017, 60.0
CHAIN_CALLS = 2.5  # mean calls per step and image while the enhancement trains


@dataclass(frozen=True)
class Cell:
    """One line of the table. ``row``: which row of a run's own table it is; None: that of the run's strength."""

    name: str
    overrides: tuple[str, ...]
    row: str | None = None


@dataclass(frozen=True)
class Comparison:
    """study.yaml."""

    name: str
    title: str
    seeds: tuple[int, ...]
    baseline: str
    metrics: tuple[str, ...]
    common: tuple[str, ...]
    cells: tuple[Cell, ...]


def read_comparison(folder: Path) -> Comparison:
    """Raises ConfigError for a missing file, unknown keys, and a baseline that is no cell."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"there is no {path}: give a folder of experiments/ that has one.")
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = {"title", "seeds", "baseline", "metrics", "common", "cells"}
    if set(values) != expected:
        raise ConfigError(f"{path} has the keys {', '.join(values)}: give {', '.join(sorted(expected))}.")
    cells = []
    for name, given in values["cells"].items():
        row = None
        if isinstance(given, dict):
            given, row = given["overrides"], given["row"]
        cells.append(Cell(str(name), tuple(map(str, given)), row))
    if values["baseline"] not in {cell.name for cell in cells} or not values["seeds"]:
        raise ConfigError(f"{path} needs seeds, and a baseline that is one of its cells.")
    return Comparison(
        folder.resolve().name, values["title"], tuple(values["seeds"]), values["baseline"], tuple(values["metrics"]),
        tuple(map(str, values["common"])), tuple(cells),
    )  # fmt: skip


def slug(name: str) -> str:
    """A cell's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def run_folder(runs: Path, cell: Cell, seed: int) -> Path:
    return runs / f"{slug(cell.name)}_seed{seed}"


def make_jobs(grid: Comparison, runs: Path, extra: Sequence[str] = ()) -> list[Job]:
    """A job per seed and cell; the first seed of all cells comes first: there soon is a whole table."""
    jobs = []
    with _composer() as composed:
        for seed in grid.seeds:
            for cell in grid.cells:
                overrides = [*grid.common, *cell.overrides, f"seed={seed}", f"tracking.group=study_{grid.name}", *extra]
                cfg = composed(overrides)
                job = Job(
                    number=len(jobs),
                    overrides=overrides,
                    label=f"{cell.name}, seed {seed}",
                    directory=run_folder(runs, cell, seed),
                    digest=content_hash(OmegaConf.to_container(cfg, resolve=False)),
                    work=training_key(cfg),
                )
                jobs.append(job)
    if len({job.directory for job in jobs}) < len(jobs):
        raise ConfigError(f"two cells of {grid.name} have the same folder: give them names that differ in letters.")
    return jobs


def configs(jobs: Sequence[Job]) -> list[Config]:
    """The typed configs of jobs, each checked as train.py does it."""
    found = []
    with _composer() as composed:
        for job in jobs:
            plain = OmegaConf.to_container(composed([*job.overrides, "run_dir=unused"]), resolve=True)
            cfg = from_dict(plain)  # type: ignore[arg-type]
            check(cfg)
            found.append(cfg)
    return found


@dataclass(frozen=True)
class Budget:
    """What a comparison costs on 2 CPU cores, hours, by arithmetic."""

    cells: int
    trainings: int
    runs: int
    training: float
    measuring: float

    def words(self) -> str:
        hours = self.training + self.measuring
        return (
            f"{self.cells} cells, {self.runs} runs, {self.trainings} trainings: about {hours:.1f} hours on 2 CPU cores "
            f"({self.training:.1f} training, {self.measuring:.1f} drawing and measuring), less what is there already"
        )


def budget(grid: Comparison, jobs: Sequence[Job]) -> Budget:
    """Hours of the jobs that are not done; each training counts once."""
    training = measuring = 0.0
    seen: set[str] = set()
    for job, cfg in zip(jobs, configs(jobs), strict=True):
        enhanced = cfg.enhancement.enabled and cfg.enhancement.placement != "none"
        if job.work not in seen:
            seen.add(job.work)
            steps = int(cfg.trainer["max_steps"]) * int(cfg.trainer.get("accumulate_grad_batches", 1))
            prior = 2 if cfg.objective.prior_weight > 0 else 1
            training += steps * cfg.data.batch_size * prior * TRAINING_IMAGE
            if enhanced:
                chain = sum(cfg.enhancement.steps_range) / 2 * CHAIN_CALLS * cfg.enhancement.batch_size
                training += cfg.enhancement.max_steps * chain * NETWORK_CALL
        rows = 1 + int(enhanced and cfg.enhancement.strength > 0) + int(cfg.evaluation.frozen)
        measuring += rows * cfg.evaluation.num_samples * network_calls(cfg) * NETWORK_CALL + MEASURING
    return Budget(len(grid.cells), len(seen), len(jobs), training / 3600, measuring / 3600)


@contextmanager
def _composer() -> Iterator[Any]:
    register()
    register_sweep_name()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):

        def composed(overrides: Sequence[str]) -> DictConfig:
            return compose("train", list(overrides))

        yield composed
