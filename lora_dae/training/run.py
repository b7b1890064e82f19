"""One run, from a config to a folder that a person likes to open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from lora_dae.adapter.atomic import atomic
from lora_dae.adapter.initial import check_file
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.parts import load_scheduler
from lora_dae.backbone.usage import settled
from lora_dae.config import Config, to_dict
from lora_dae.data.buckets import parse_buckets
from lora_dae.data.masks import check_garments
from lora_dae.data.pair import PairDataset, replace_pixels
from lora_dae.data.sources import check_mask, check_outside, check_source, load_splits
from lora_dae.enhancement.module import build_enhancement
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.metrics.extras import check_networks
from lora_dae.evaluation.report.table import ResultsTable
from lora_dae.evaluation.report.table_files import COLUMNS, table_rows
from lora_dae.evaluation.run import evaluate_run, row_name
from lora_dae.export.command import write_card
from lora_dae.rules import check
from lora_dae.sampling.load import load_run
from lora_dae.training import together, tracking
from lora_dae.training.finish import check_chains, export, export_enhancement
from lora_dae.training.plan import make_plan, print_plan
from lora_dae.training.resume import check_origin, check_steps, find_checkpoints, origin
from lora_dae.training.stages import Training, planned_stages
from lora_dae.training.trainer import check_trainer, quiet

console = Console()
NUM_PICTURES = 8


@dataclass(frozen=True)
class Result:
    """What a finished run gives back: its folder and its table (None on ranks other than 0)."""

    run_dir: Path
    table: ResultsTable | None


def run(cfg: Config) -> Result:
    """Train, export, measure and report. Raises ConfigError for bad input before weights are loaded."""
    if cfg.plan:
        check(cfg)
        print_plan(cfg, make_plan(cfg), console)
        return Result(Path(cfg.run_dir), None)
    check(cfg)
    HeldOut.check(load_splits(cfg.data), cfg)  # what cannot be measured is not trained
    check_networks(cfg.evaluation)
    trained = train(cfg)
    if trained.rank != 0:
        return Result(trained.run_dir, None)
    result = measure(cfg, trained.loggers, trained.device, trained.precision.startswith("bf16"))
    console.print(f"adapter  {result.run_dir / 'adapter'}", soft_wrap=True, highlight=False)
    if trained.stopped_early:
        console.print(trained.stopped_early, soft_wrap=True, highlight=False)
    return result


@tracking.closed_on_failure()
def train(cfg: Config, extra_callbacks: Sequence[lightning.Callback] = ()) -> Training:
    """Train every stage and, on rank 0, export. Raises ConfigError for bad input before weights are loaded."""
    check(cfg)
    quiet()
    first = check_trainer(cfg).is_global_zero
    run_dir = Path(cfg.run_dir)
    check_outside(cfg.data, run_dir, "run_dir")
    checkpoints = find_checkpoints(cfg, run_dir)
    folder = inspect_backbone(cfg.backbone, cfg.data.resolution)
    for bucket in parse_buckets(cfg.data.buckets, cfg.data.resolution, cfg.data.bucket_step):
        folder.check_bucket(bucket)
    check_chains(cfg, load_scheduler(folder))
    if cfg.adapter.init_from is not None:
        check_file(cfg.adapter.init_from)
    if checkpoints:
        check_steps(cfg, checkpoints)
    tracking.check_tracking(cfg.tracking)
    splits = load_splits(cfg.data)
    check_source(cfg, splits["train"])
    check_mask(cfg, splits["train"])
    check_garments(splits["train"], cfg.data)
    if cfg.conditioning == "none":
        splits = {name: _without_source(split) for name, split in splits.items()}
    if checkpoints:
        check_origin(checkpoints, origin(cfg, folder.fingerprint(), splits))
    if first:
        console.print(f"run folder {run_dir}", soft_wrap=True, highlight=False)
    backbone = load_backbone(cfg.backbone)
    lightning.seed_everything(cfg.seed, verbose=False)  # before the adapter draws its weights
    trained = Training(cfg, run_dir, backbone, splits, extra_callbacks)
    if trained.rank == 0:
        write_config(cfg)
    trained.fit(checkpoints)
    together.leave()
    if trained.rank == 0:
        export(trained)  # first: no mishap in judging costs the adapter
        export_enhancement(trained)
    del trained.module
    trained.leave_device()
    return trained


def write_config(cfg: Config) -> None:
    """``config.yaml`` of the run folder: everything that was set."""
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))
    with atomic(Path(cfg.run_dir) / "config.yaml") as partial:  # half of one would keep the training from going on
        partial.write_text(text, encoding="utf-8")


@tracking.closed_on_failure()
def measure(cfg: Config, loggers: list[Any], device: torch.device, bf16: bool) -> Result:
    """Measure and report the finished training in the run folder, and tell the loggers."""
    run_dir, split = Path(cfg.run_dir), cfg.evaluation.split
    loaded = load_run(run_dir, device)
    if device.type != "cpu":  # text encoders and VAE wait on the host, as they did while it trained
        loaded.backbone.rest(device)
    others = tracking.trackers(loggers)

    def log_table(held_out: HeldOut, rows: dict[str, np.ndarray]) -> None:
        count = cfg.tracking.num_grid_prompts
        shown = held_out.shown
        columns = {} if shown is None else {"source": shown}
        columns |= {**rows, "real": np.stack([pair.image for pair in held_out.pairs])}
        save_pictures(rows.get(row_name(cfg.enhancement.strength), rows[row_name(0.0)]), run_dir / "samples" / split)
        tracking.log_samples(others, f"{split}/samples", held_out.captions[:count], columns)

    table, grid = evaluate_run(run_dir, console, run=loaded, bf16=bf16, on_images=log_table)
    flat = {f"{split}/{m}/{k}".replace(" ", "_"): v.value for m, row in table.methods.items() for k, v in row.items()}
    own = table.methods.get(row_name(cfg.enhancement.strength)) or table.methods.get(row_name(0.0), {})
    flat |= {f"{split}/{name}": metric.value for name, metric in own.items()}  # the run's own row, for comparing runs
    whole = build_enhancement(cfg.enhancement, loaded.backbone.latent_channels, cfg.conditioning)
    last = sum(steps for _, steps, _ in planned_stages(cfg, whole))
    for logger in others:
        if isinstance(logger, tracking.StagedLogger):
            logger.offset = 0
    tracking.log_metrics(others, flat, last)
    tracking.log_image(others, f"{split}/grid", grid, last)
    tracking.log_table(others, f"{split}/table", list(COLUMNS), table_rows(table))
    tracking.finish(loggers)
    write_card(run_dir, settled(cfg, loaded.backbone.folder), loaded.backbone.folder.family, run_dir / "adapter")
    return Result(run_dir, table)


def save_pictures(images: np.ndarray, folder: Path) -> None:
    """The first few of the run's own pictures, uint8 (N, H, W, 3), without loss."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images[:NUM_PICTURES]):
        Image.fromarray(image).save(folder / f"{number}.png")


class _WithoutSource:
    """A view of a data set that hides the source photos."""

    has_source = False

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset, self.has_mask = dataset, dataset.has_mask
        self.blocks = getattr(dataset, "blocks", None)
        if hasattr(dataset, "size_labels"):
            self.size_labels = dataset.size_labels
        self.fingerprint = dataset.fingerprint + "-text"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return replace_pixels(self.dataset[index], source=None)

    def as_trained(self) -> PairDataset:
        """As PhotoPairs has it."""
        return _WithoutSource(self.dataset.as_trained() if hasattr(self.dataset, "as_trained") else self.dataset)


def _without_source(dataset: PairDataset) -> PairDataset:
    return _WithoutSource(dataset) if dataset.has_source else dataset
