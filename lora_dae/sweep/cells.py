"""What a comparison is: named cells (overrides of conf/train.yaml), each trained and measured with several seeds.

experiments/<name>/study.yaml    title, seeds, baseline, metrics, common overrides, cells
multirun/study_<name>/           a run folder per cell and seed
multirun/store/                  trainings, shared with all sweeps: cells that differ in sampling alone train once
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_dae.config import Config, ConfigError, conf_dir, from_dict, register
from lora_dae.rules import check
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
    """One line of the table, tested against the cell ``against`` (None: the comparison's baseline).

    ``row``: which row of a run's own table it is; None: that of the run's strength.
    """

    name: str
    overrides: tuple[str, ...]
    row: str | None = None
    against: str | None = None


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
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
    expected = {"title", "seeds", "baseline", "metrics", "common", "cells"}
    if not isinstance(values, dict) or set(values) != expected or not isinstance(values["cells"], dict):
        keys = ", ".join(map(str, values)) or "no keys"
        raise ConfigError(f"{path} has {keys}: give {', '.join(sorted(expected))}, cells by name.")
    cells = []
    for name, given in values["cells"].items():
        entry = given if isinstance(given, dict) else {"overrides": given}
        if "overrides" not in entry or not set(entry) <= {"overrides", "row", "against"}:
            raise ConfigError(f"{path}: cell '{name}' is a list of overrides, or overrides with row and against.")
        cells.append(Cell(str(name), tuple(map(str, entry["overrides"])), entry.get("row"), entry.get("against")))
    names = {cell.name for cell in cells}
    for baseline in (values["baseline"], *(cell.against for cell in cells if cell.against is not None)):
        if baseline not in names:
            raise ConfigError(f"{path}: the baseline '{baseline}' is none of its cells.")
    if not values["seeds"]:
        raise ConfigError(f"{path}: seeds is empty; give at least one.")
    return Comparison(
        folder.resolve().name, values["title"], tuple(values["seeds"]), values["baseline"], tuple(values["metrics"]),
        tuple(map(str, values["common"])), tuple(cells),
    )  # fmt: skip


def slug(name: str) -> str:
    """A cell's name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def run_folder(runs: Path, cell: Cell, seed: int) -> Path:
    return runs / f"{slug(cell.name)}_seed{seed}"


def make_jobs(grid: Comparison, runs: Path, extra: Sequence[str] = ()) -> tuple[list[Job], list[Config]]:
    """A job and its config, checked, per seed and cell; the first seed of all cells comes first: soon a whole table.

    ``extra`` overrides hold for every cell. Raises ConfigError for a cell that train.py would refuse.
    """
    composed = {cell: _compose([*grid.common, *cell.overrides, *extra]) for cell in grid.cells}
    typed = {cell: _typed(cfg) for cell, cfg in composed.items()}
    keys = {cell: training_key(cfg) for cell, cfg in composed.items()}
    jobs: list[Job] = []
    configs: list[Config] = []
    for seed in grid.seeds:
        for cell in grid.cells:
            plain = OmegaConf.to_container(composed[cell], resolve=False)
            overrides = [*grid.common, *cell.overrides, *extra, f"seed={seed}", f"tracking.group=study_{grid.name}"]
            jobs.append(
                Job(
                    number=len(jobs),
                    overrides=overrides,
                    label=f"{cell.name}, seed {seed}",
                    directory=run_folder(runs, cell, seed),
                    digest=content_hash([plain, seed]),
                    work=f"{keys[cell]} {seed}",
                )
            )
            configs.append(typed[cell])
    if len({job.directory for job in jobs}) < len(jobs):
        raise ConfigError(f"two cells of {grid.name} have the same folder: give them names that differ in letters.")
    return jobs, configs


def _compose(overrides: Sequence[str]) -> DictConfig:
    register()
    register_sweep_name()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("train", [*overrides, "run_dir=unused"])
    except HydraException as error:
        raise ConfigError(f"{' '.join(overrides)} cannot be composed: {str(error).splitlines()[0]}") from error


def _typed(cfg: DictConfig) -> Config:
    typed = from_dict(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    check(typed)
    return typed


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


def budget(grid: Comparison, jobs: Sequence[Job], configs: Sequence[Config]) -> Budget:
    """Hours of all jobs; each training counts once."""
    training = measuring = 0.0
    seen: set[str] = set()
    for job, cfg in zip(jobs, configs, strict=True):
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
