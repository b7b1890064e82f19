"""One process of a comparison: it trains what its cells need and the store lacks, draws, measures, writes their files.

Its list is a JSON file: {"results", "store", "cells": [{"name", "row", "seed", "overrides", "digest"}]}. What is
there already is left as it is, so a killed process goes on with the cell it was at.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from lora_dae.adapter.files import trained_megabytes
from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.backbone.precision import best_device, choose_precision, draws_in_bf16
from lora_dae.config import Config, ConfigError
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.metrics.extras import Extras, load_extras
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features, load_features
from lora_dae.evaluation.metrics.measure import Reference
from lora_dae.evaluation.references import CEILING, CONTROLS, reconstructed, reconstructed_features
from lora_dae.evaluation.run import FROZEN, measure_rows, row_name
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.load import LoadedRun, load_run, prepare_unet
from lora_dae.sweep.budget import drawn_calls
from lora_dae.sweep.cell_files import MeasuredCell, is_measured, write_cell
from lora_dae.sweep.cells import Cell, Wanted, with_seeds
from lora_dae.sweep.files import read_json, write_json
from lora_dae.sweep.identity import content_hash, training_part
from lora_dae.sweep.status import say
from lora_dae.sweep.store import train_shared
from lora_dae.training.ended import NonFiniteLossError

PICTURES = 3  # of every cell are kept, for crops
NOT_ASKED_FOR = ("ms_ssim", "lpips_alex")  # told of whenever they are not there; bad LPIPS weights are refused
BOOTSTRAP_SEED = 0  # the same for all training seeds: all cells resample the same images


def write_list(file: Path, cells: Sequence[Wanted], results: Path, store: Path) -> None:
    """The list that ``measure_cells`` reads."""
    told = [
        {"name": w.cell.name, "row": w.cell.row, "seed": w.seed, "overrides": list(w.overrides), "digest": w.digest}
        for w in cells
    ]
    write_json(file, {"results": str(results), "store": str(store), "cells": told})


def measure_cells(file: Path, console: Console) -> None:
    """Measure every cell of a list that has no whole file yet.

    Raises ConfigError if one is no longer what was listed, and, after all others, if one cannot be measured.
    """
    told = read_json(file)
    results, work = Path(told["results"]), Work(file.parent, Path(told["store"]))
    failed: list[str] = []
    for entry in told["cells"]:
        overrides = tuple(entry["overrides"])
        (one,) = with_seeds(Cell(entry["name"], overrides, entry["row"]), [entry["seed"]], overrides)
        if one.digest != entry["digest"]:
            raise ConfigError(f"{one.label} is not what it was when its process started: give the command again.")
        if not is_measured(results, one.digest, one.cfg.evaluation.lpips is not None):
            console.print(one.label, highlight=False)
            try:
                # Where the LPIPS weights lie is this machine's affair: cells are kept in git.
                told_by = " ".join(o for o in overrides if not o.startswith("evaluation.lpips="))
                write_cell(results, one.digest, f"{one.label}: {told_by}", work.measure(one))
            except (ConfigError, NonFiniteLossError, torch.OutOfMemoryError) as error:
                failed.append(f"{one.label}: {str(error).splitlines()[0]}")
    if failed:
        raise ConfigError("; ".join(failed))


@dataclass(frozen=True)
class Seen:
    """What cells of the same pairs and metrics share; ``real`` is known from the first of them on."""

    held_out: HeldOut
    extras: Extras
    extractor: FeatureExtractor
    real: Reference | None
    recon: Features | None


class Work:
    """Draws and measures cells; keeps what the next one needs too. ``folder`` gets status.json and a few pictures."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store
        self._run: LoadedRun | None = None
        self._training: str | None = None  # that run's, as in Wanted
        self._seen: dict[str, Seen] = {}

    def measure(self, one: Wanted) -> MeasuredCell:
        """Train if it has to be, draw, measure."""
        cfg = one.cfg
        part = training_part(cfg)
        key = content_hash(
            [part["data"], cfg.data.test_size, part["backbone"], cfg.conditioning, asdict(cfg.evaluation)]
        )
        seen = self._seen.get(key) or _look(cfg)  # first: what cannot be measured is not trained
        trained = None
        if one.cell.row is None:
            if one.training != self._training:
                self._run = None  # off the device before another one trains there
            self._training = one.training
            trained = train_shared(replace(cfg, store=str(self.store), run_dir=str(self.folder)))
        say(self.folder / "status.json", f"measuring {one.label}")
        started = time.time()
        images = self._draw(one, seen.held_out, trained)
        plain = replace(cfg, seed=BOOTSTRAP_SEED, evaluation=replace(cfg.evaluation, controls=False))
        name = one.cell.row or row_name(cfg.enhancement.strength)
        table, real, _ = measure_rows(
            plain, {name: images}, seen.held_out, seen.extractor, seen.extras, real=seen.real, recon=seen.recon
        )
        self._seen = {key: replace(seen, real=real)}  # one at a time: memory
        keep_pictures(images, self.folder / "pictures" / one.digest)
        return MeasuredCell(
            one.matters, table.methods[name], table.protocol,
            0.0 if trained is None else trained_megabytes(trained / "adapter"),
            drawn_calls(one), round(time.time() - started, 1),
            _precision(cfg),
        )  # fmt: skip

    def _draw(self, one: Wanted, held_out: HeldOut, trained: Path | None) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        cfg, row = one.cfg, one.cell.row
        device = _device(cfg)
        bf16 = draws_in_bf16(cfg, device)
        originals = [pair.image for pair in held_out.pairs]
        if row in CONTROLS:
            return np.stack([CONTROLS[row](image) for image in originals])
        if row == CEILING:
            return reconstructed(load_backbone(cfg.backbone, device), np.stack(originals))
        if row == FROZEN:
            return _frozen(cfg, device, bf16).images(held_out.captions, indices=held_out.numbers)
        assert trained is not None
        if self._run is None or self._run.directory != trained:
            self._run = None  # before the next one is loaded
            self._run = load_run(trained, device)
        drawer = replace(self._run, cfg=cfg).drawer(bf16)
        return drawer.images(held_out.captions, held_out.shown, cfg.enhancement.strength, held_out.numbers)


def _device(cfg: Config) -> torch.device:
    return torch.device("cpu") if cfg.trainer.get("accelerator") == "cpu" else best_device()


def _precision(cfg: Config) -> str:
    """What ``trainer.precision`` is here."""
    return choose_precision(str(cfg.trainer.get("precision", "auto")), _device(cfg))


def _look(cfg: Config) -> Seen:
    asked = cfg.evaluation
    held_out = HeldOut.asked_for(load_splits(cfg.data), cfg)
    if len(held_out.pairs) < asked.num_samples:
        raise ConfigError(
            f"the {asked.split} split has {len(held_out.pairs)} pairs from number {asked.first_pair} on, and "
            f"evaluation.num_samples={asked.num_samples} are asked for: ask for fewer, or raise "
            f"data.{asked.split}_{'size' if cfg.data.name == 'studio' else 'fraction'}."
        )
    extras = load_extras(asked, cfg.data.resolution, held_out.captions)
    lacking = {k: v for k, v in extras.not_available.items() if k not in NOT_ASKED_FOR}
    if lacking:  # a file without them would count as the whole measurement
        raise ConfigError(
            "; ".join(f"{name} was asked for and is not to be had: {why}" for name, why in lacking.items())
        )
    extractor, recon = load_features(asked.features).to(best_device()), None
    if asked.reconstructions:
        recon = reconstructed_features(load_backbone(cfg.backbone, best_device()), held_out, extractor)
    return Seen(held_out, extras, extractor, None, recon)


def _frozen(cfg: Config, device: torch.device, bf16: bool) -> Drawer:
    backbone: Backbone = load_backbone(cfg.backbone, device)
    prepare_unet(backbone, cfg)
    return Drawer(backbone, None, "none", "none", cfg.data.resolution, cfg.sampling, bf16)


def keep_pictures(images: np.ndarray, folder: Path) -> None:
    """The first few, without loss."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images[:PICTURES]):
        Image.fromarray(image).save(folder / f"{number}.png")
