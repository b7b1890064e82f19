"""What a comparison is: named cells (overrides of conf/train.yaml), each trained and measured with several seeds.

experiments/<name>/study.yaml    title, seeds, baseline, metrics, common overrides, cells
experiments/cells/<hash>.json    a measured cell of one training seed, whichever studies ask for it
multirun/store/                  trainings, shared with all sweeps
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_dae.backbone.layout import inspect_backbone
from lora_dae.config import Config, ConfigError, EnhancementConfig, conf_dir, from_dict, register
from lora_dae.data.studio.dataset import RENDERER_VERSION
from lora_dae.evaluation.references import CEILING, CONTROLS
from lora_dae.evaluation.run import FROZEN
from lora_dae.rules import check
from lora_dae.sweep.identity import TRAINING_VERSION, content_hash, training_part
from lora_dae.sweep.name import register_sweep_name

FILE = "study.yaml"
CELL_VERSION = 1  # raise it when the same cell begins to give other numbers
# Options of ``evaluation`` that came later: at the value that does nothing they are left out of what matters.
LATER = {"split": "test", "first_pair": 0, "wrong_source": False, "reconstructions": False}
REVISED = {"wavelet": 2, "detail_daemon": 2}  # methods that drew other pictures before
UNTRAINED = (FROZEN, CEILING, *CONTROLS)  # rows in which nothing trained takes part
OFF = EnhancementConfig(enabled=False, placement="none", strength=0.0)


@dataclass(frozen=True)
class Cell:
    """One line of the table, tested against the cell ``against`` (None: the comparison's baseline).

    ``row``: None for pictures of the trained cell, else one of UNTRAINED.
    """

    name: str
    overrides: tuple[str, ...]
    row: str | None = None
    against: str | None = None


@dataclass(frozen=True)
class Comparison:
    """study.yaml. ``ours``: cells that are also compared with all others of their baseline, one for each baseline.

    ``own_pairs``: each training seed is measured on pairs of its own, the second on the next
    ``evaluation.num_samples`` of the split and so on; else all on the same."""

    name: str
    title: str
    seeds: tuple[int, ...]
    baseline: str
    metrics: tuple[str, ...]
    common: tuple[str, ...]
    cells: tuple[Cell, ...]
    own_pairs: bool = False
    ours: tuple[str, ...] = ()


def read_comparison(folder: Path) -> Comparison:
    """Raises ConfigError for a missing file, unknown keys and rows, and a baseline that is no cell."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"there is no {path}: give a folder of experiments/ that has one.")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
    expected = {"title", "seeds", "baseline", "metrics", "common", "cells"}
    if (
        not isinstance(values, dict)
        or set(values) - {"own_pairs", "ours"} != expected
        or not isinstance(values["cells"], dict)
    ):
        keys = ", ".join(map(str, values)) or "no keys"
        raise ConfigError(f"{path} has {keys}: give {', '.join(sorted(expected))}, cells by name.")
    cells = []
    for name, given in values["cells"].items():
        entry = given if isinstance(given, dict) else {"overrides": given}
        if not isinstance(entry.get("overrides"), list) or not set(entry) <= {"overrides", "row", "against"}:
            raise ConfigError(f"{path}: cell '{name}' is a list of overrides, or overrides with row and against.")
        if entry.get("row") not in (None, *UNTRAINED):
            raise ConfigError(f"{path}: cell '{name}' has the row '{entry['row']}': use one of {', '.join(UNTRAINED)}.")
        cells.append(Cell(str(name), tuple(map(str, entry["overrides"])), entry.get("row"), entry.get("against")))
    names = {cell.name for cell in cells}
    for baseline in (values["baseline"], *(cell.against for cell in cells if cell.against is not None)):
        if baseline not in names:
            raise ConfigError(f"{path}: the baseline '{baseline}' is none of its cells.")
    ours = values.get("ours", [])
    bases = {cell.name: cell.against or values["baseline"] for cell in cells}
    if not isinstance(ours, list) or not set(ours) <= names or len({bases[name] for name in ours}) < len(ours):
        raise ConfigError(f"{path}: ours is {ours}: give a list of its cells, one for each baseline.")
    metrics = values["metrics"]
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise ConfigError(f"{path}: metrics is {metrics}: give a list of at least one name.")
    seeds = values["seeds"]
    if not isinstance(seeds, list) or not seeds or len({*map(str, seeds)}) < len(seeds):
        raise ConfigError(f"{path}: seeds is {seeds}: give a list of at least one, each once.")
    return Comparison(
        folder.resolve().name, values["title"], tuple(seeds), values["baseline"], tuple(metrics),
        tuple(map(str, values["common"])), tuple(cells), bool(values.get("own_pairs", False)), tuple(ours),
    )  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """A cell with one training seed. ``digest``, the hash of what ``matters``, names its file; equal ones are one
    measurement.

    ``training`` and ``adapter`` are the keys of what it trains: all of it, and the adapter alone, which cells share
    that differ in the enhancement; None where nothing trained takes part.
    """

    cell: Cell
    seed: int
    overrides: tuple[str, ...]
    cfg: Config
    matters: dict[str, Any]
    digest: str
    training: str | None
    adapter: str | None

    @property
    def label(self) -> str:
        return self.cell.name if self.cell.row is not None else f"{self.cell.name}, seed {self.seed}"


def wanted_cells(grid: Comparison, extra: Sequence[str] = ()) -> list[Wanted]:
    """Every cell with every seed; the first seed of all cells comes first: soon a whole table.

    ``extra`` overrides hold for every cell. Raises ConfigError for a cell that train.py would refuse.
    """
    found = []
    for cell in grid.cells:
        overrides = (*grid.common, *cell.overrides, *extra)
        if not grid.own_pairs:
            found.append(with_seeds(cell, grid.seeds, overrides))
            continue
        if any("evaluation.first_pair" in override for override in overrides):
            raise ConfigError(f"{cell.name}: own_pairs gives each seed its evaluation.first_pair: leave it out.")
        found.append(_with_own_pairs(cell, grid.seeds, overrides))
    return [of_seed for together in zip(*found, strict=True) for of_seed in together]


def _with_own_pairs(cell: Cell, seeds: Sequence[int], overrides: tuple[str, ...]) -> list[Wanted]:
    """The cell with each seed on pairs of its own, composed once: composing is what takes a study's start its time."""
    cfg = compose_cell(overrides)
    found = []
    for k, seed in enumerate(seeds):
        first = k * cfg.evaluation.num_samples
        own = replace(cfg, evaluation=replace(cfg.evaluation, first_pair=first))
        check(own)
        found += _of_config(cell, [seed], (*overrides, f"evaluation.first_pair={first}"), own)
    return found


def with_seeds(cell: Cell, seeds: Sequence[int], overrides: tuple[str, ...]) -> list[Wanted]:
    """The cell that all of ``overrides`` compose, with each seed."""
    return _of_config(cell, seeds, overrides, compose_cell(overrides))


def _of_config(cell: Cell, seeds: Sequence[int], overrides: tuple[str, ...], cfg: Config) -> list[Wanted]:
    enhanced = cell.row is None and cfg.enhancement.enabled and cfg.enhancement.placement != "none"
    together = enhanced and cfg.enhancement.joint
    if not enhanced or (cfg.enhancement.strength == 0 and not together):  # such a module draws nothing
        cfg = replace(cfg, enhancement=OFF)
    matters = what_matters(cfg, cell.row)
    found = []
    for seed in seeds:
        own = replace(cfg, seed=seed)
        if cell.row is not None:
            found.append(Wanted(cell, seed, overrides, own, matters, content_hash(matters), None, None))
            continue
        training = {**matters["training"], "seed": seed}
        whole, alone = (content_hash([matters["weights"], t]) for t in (training, {**training, "enhancement": None}))
        alone = whole if together else alone
        told = {**matters, "training": training}
        found.append(Wanted(cell, seed, overrides, own, told, content_hash(told), whole, alone))
    return found


def what_matters(cfg: Config, row: str | None) -> dict[str, Any]:
    """What a cell's numbers depend on, as plain data: training, sampling, pictures, frozen weights, renderer.

    Single files count by what they hold, photos and networks in folders by the path that is given. How many images are
    drawn at once does not matter.
    """
    training = training_part(cfg)
    training["adapter"]["init_from"] = _content(cfg.adapter.init_from)
    training["data"]["captions"] = {**training["data"]["captions"], "file": _content(cfg.data.captions.file)}
    del training["backbone"]["path"]  # what lies there counts
    asked = {k: v for k, v in asdict(cfg.evaluation).items() if k not in ("frozen", "controls")}
    asked["lpips"] = None  # adds a metric and changes none: ``is_measured`` asks whether a file has it
    if row is not None:
        asked["wrong_source"] = False  # they see none
    found = {
        "version": [CELL_VERSION, TRAINING_VERSION, RENDERER_VERSION],
        "weights": _fingerprint(cfg),
        "row": row,
        "evaluation": {k: v for k, v in asked.items() if k not in LATER or v != LATER[k]},
    }
    sampling = {key: value for key, value in asdict(cfg.sampling).items() if key != "batch_size"}
    if not sampling["tiled_decode"]:
        del sampling["tiled_decode"]  # younger than measured cells, which are without
    if cfg.sampling.method in REVISED:
        sampling["revision"] = REVISED[cfg.sampling.method]
    if row is None:
        return {**found, "training": training, "strength": cfg.enhancement.strength, "sampling": sampling}
    seen = {"data": training["data"], "backbone": training["backbone"], "conditioning": cfg.conditioning}
    if row == FROZEN:  # it is drawn, in the precision that the others are trained and drawn in
        seen |= {"sampling": sampling, "precision": str(cfg.trainer.get("precision", "auto"))}
        if cfg.conditioning == "source":  # resampled with the photos of its captions since
            seen["revision"] = 2
    return {**found, **seen}


def _content(path: str | None) -> str | None:
    """A file by what it holds; what is no file as it is."""
    if path is None or not Path(path).is_file():
        return path
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


_fingerprints: dict[str, str] = {}


def _fingerprint(cfg: Config) -> str:
    """Of the frozen weights, read once per process."""
    key = repr(cfg.backbone)
    if key not in _fingerprints:
        _fingerprints[key] = inspect_backbone(cfg.backbone, cfg.data.resolution).fingerprint()
    return _fingerprints[key]


def distinct(found: Iterable[Wanted]) -> list[Wanted]:
    """Each measurement once, in order of the seeds, those that share an adapter together."""
    once: dict[str, Wanted] = {}
    for one in found:
        once.setdefault(one.digest, one)
    groups: dict[str, list[Wanted]] = {}
    for one in once.values():
        groups.setdefault(one.adapter or "", []).append(one)
    ordered = sorted(groups.values(), key=lambda group: group[0].seed)  # stable
    return [
        one for group in ordered for one in sorted(group, key=lambda w: (w.training != w.adapter, w.training or ""))
    ]


def compose_cell(overrides: Sequence[str]) -> Config:
    """The checked config of a cell. Raises ConfigError for one that train.py would refuse."""
    try:
        parsed = [_parsed(override) for override in (*overrides, "run_dir=unused")]
        values = [o for o in parsed if "." in o.key_or_group and o.type is OverrideType.CHANGE and o.package is None]
        cfg = deepcopy(_compose(tuple(str(o.input_line) for o in parsed if o not in values)))
        for override in values:  # as Hydra does, after all groups
            OmegaConf.update(cfg, override.key_or_group, override.value())
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)} cannot be composed: {str(error).splitlines()[0]}") from error
    typed = from_dict(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    check(typed)
    return typed


@cache
def _parsed(override: str) -> Override:
    """Many cells share an override, and to parse one takes Hydra milliseconds."""
    return OverridesParser.create().parse_overrides([override])[0]


@cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    """Of what chooses config groups: composing them costs most, and few choices are in many cells."""
    register()
    register_sweep_name()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", list(overrides))
