"""One run, from a config to a folder that a person likes to open."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console

from lora_dae.adapter.files import save_adapter, save_merged
from lora_dae.adapter.initial import check_file, initialize
from lora_dae.adapter.inject import inject, make_full_finetune, trainable_parameters
from lora_dae.adapter.source_input import attach_source_input, save_source_input
from lora_dae.adapter.table import adapter_table
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.backbone.precision import choose_precision
from lora_dae.config import Config, ConfigError, check, from_dict, to_dict
from lora_dae.data.buckets import parse_buckets
from lora_dae.data.captions import long_captions
from lora_dae.data.module import PairDataModule
from lora_dae.data.pair import PairDataset, replace_pixels
from lora_dae.data.sources import check_mask, check_source, load_splits
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.gates import EnhancementModule
from lora_dae.evaluation.run import HeldOut, evaluate_run, row_name, write_grid
from lora_dae.evaluation.table import ResultsTable
from lora_dae.evaluation.table_files import COLUMNS, table_rows
from lora_dae.export.command import export_beside, write_card
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.load import ENHANCEMENT_FILE, load_run, prepare_unet
from lora_dae.training import callbacks, tracking
from lora_dae.training.ema import EMACallback
from lora_dae.training.module import LoraDae
from lora_dae.training.plan import make_plan, print_plan

console = Console()
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


@dataclass(frozen=True)
class Result:
    """What a finished run gives back: its folder and its table (None on ranks other than 0)."""

    run_dir: Path
    table: ResultsTable | None


class InterruptedRunError(RuntimeError):
    """Training was stopped by Ctrl-C after writing a checkpoint."""


def run(cfg: Config) -> Result:
    """Train, export, measure and report. Raises ConfigError for bad input before weights are loaded."""
    if cfg.plan:
        check(cfg)
        print_plan(cfg, make_plan(cfg), console)
        return Result(Path(cfg.run_dir), None)
    trained = train(cfg)
    if trained.rank != 0:
        return Result(trained.run_dir, None)
    result = measure(cfg, trained.loggers, trained.device, trained.precision.startswith("bf16"))
    console.print(f"adapter  {result.run_dir / 'adapter'}", soft_wrap=True, highlight=False)
    return result


def train(cfg: Config, extra_callbacks: Sequence[lightning.Callback] = ()) -> Training:
    """Train both stages and, on rank 0, export. Raises ConfigError for bad input before weights are loaded."""
    check(cfg)
    run_dir = Path(cfg.run_dir)
    checkpoints = find_checkpoints(cfg, run_dir)
    folder = inspect_backbone(cfg.backbone, cfg.data.resolution)
    for bucket in parse_buckets(cfg.data.buckets, cfg.data.resolution, cfg.data.bucket_step):
        folder.check_bucket(bucket)
    if cfg.adapter.init_from is not None:
        check_file(cfg.adapter.init_from)
    tracking.check_tracking(cfg.tracking)
    _quiet()
    splits = load_splits(cfg.data)
    check_source(cfg, splits["train"])
    check_mask(cfg, splits["train"])
    if cfg.conditioning == "none":
        splits = {name: _without_source(split) for name, split in splits.items()}
    console.print(f"run folder {run_dir}", soft_wrap=True, highlight=False)
    backbone = load_backbone(cfg.backbone)
    lightning.seed_everything(cfg.seed, verbose=False)  # before the adapter draws its weights
    trained = Training(cfg, run_dir, backbone, splits, extra_callbacks)
    if trained.rank == 0:
        write_config(cfg)
    trained.fit(checkpoints)
    if trained.rank == 0:
        trained.export()
    del trained.module
    return trained


def write_config(cfg: Config) -> None:
    """``config.yaml`` of the run folder: everything that was set."""
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    plain = OmegaConf.create(to_dict(cfg))
    (Path(cfg.run_dir) / "config.yaml").write_text(OmegaConf.to_yaml(plain), encoding="utf-8")


def measure(cfg: Config, loggers: list[Any], device: torch.device, bf16: bool) -> Result:
    """Measure and report the finished training in the run folder, and tell the loggers."""
    run_dir = Path(cfg.run_dir)
    loaded = load_run(run_dir, device)
    others = tracking.trackers(loggers)

    def log_table(held_out: HeldOut, rows: dict[str, np.ndarray]) -> None:
        count = cfg.tracking.num_grid_prompts
        columns = {} if held_out.sources is None else {"source": held_out.sources}
        columns |= {**rows, "real": np.stack([pair.image for pair in held_out.pairs])}
        tracking.log_samples(others, "test/samples", held_out.captions[:count], columns)

    table, grid = evaluate_run(run_dir, console, run=loaded, bf16=bf16, on_images=log_table)
    flat = {f"test/{m}/{k}".replace(" ", "_"): v.value for m, row in table.methods.items() for k, v in row.items()}
    own = table.methods.get(row_name(cfg.enhancement.strength)) or table.methods.get(row_name(0.0), {})
    flat |= {f"test/{name}": metric.value for name, metric in own.items()}  # the run's own row, for comparing runs
    # The enhancement's steps came after the adapter's.
    last = int(cfg.trainer.get("max_steps", 500)) + (cfg.enhancement.max_steps if cfg.enhancement.enabled else 0)
    for logger in others:
        if isinstance(logger, tracking.StagedLogger):
            logger.offset = 0
    tracking.log_metrics(others, flat, last)
    tracking.log_image(others, "test/grid", grid, last)
    tracking.log_table(others, "test/table", list(COLUMNS), table_rows(table))
    tracking.finish(loggers)
    write_card(run_dir, cfg, loaded.backbone.folder.family, run_dir / "adapter")
    return Result(run_dir, table)


def find_checkpoints(cfg: Config, run_dir: Path) -> dict[str, Path]:
    """Which stages can go on from where; ``ckpt_path=last`` looks into the run folder."""
    if cfg.ckpt_path is None:
        return {}
    if cfg.ckpt_path == "last":
        found = {s: run_dir / "checkpoints" / f"{s}.ckpt" for s in ("adapter", "enhancement")}
        found = {s: p for s, p in found.items() if p.is_file()}
        if not found:
            raise ConfigError(
                f"ckpt_path=last found no checkpoint in {run_dir / 'checkpoints'}: give the run folder to go on "
                "with as hydra.run.dir=<run folder>."
            )
    else:
        path = Path(cfg.ckpt_path)
        if not path.is_file():
            raise ConfigError(f"ckpt_path={path} does not exist: give a .ckpt file, or last.")
        found = {"enhancement" if path.stem.startswith("enhancement") else "adapter": path}
    saved = next(iter(found.values())).parent.parent / "config.yaml"
    if saved.is_file():
        before = to_dict(from_dict(OmegaConf.to_container(OmegaConf.load(saved))))  # type: ignore[arg-type]
        now = to_dict(cfg)
        for key in ("adapter", "backbone", "conditioning"):
            if before[key] != now[key]:
                raise ConfigError(
                    f"{next(iter(found.values()))} was written with another `{key}` than this run's: resume with "
                    "the same overrides, or start anew without ckpt_path."
                )
    return found


class Training:
    """The two stages on one set of weights, and what they share."""

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        backbone: Backbone,
        splits: dict[str, PairDataset],
        extra_callbacks: Sequence[lightning.Callback] = (),
    ) -> None:
        self.cfg, self.run_dir, self.backbone, self.splits = cfg, run_dir, backbone, splits
        self.extra_callbacks = list(extra_callbacks)
        self.steps = int(cfg.trainer.get("max_steps", 500))
        self.enhancement = None
        if cfg.enhancement.enabled and cfg.enhancement.placement != "none":
            e = cfg.enhancement
            self.enhancement = EnhancementModule(e.levels, e.hidden, e.max_log_gain)
        probe = _trainer(cfg, run_dir, "32-true", self.steps, [], False)
        self.rank = probe.global_rank
        self.device = probe.strategy.root_device
        backbone.vae.to(self.device)  # they fill the cache
        backbone.text_encoders_to(self.device)
        self.precision = choose_precision(str(cfg.trainer.get("precision", "auto")), self.device)
        if cfg.backbone.weights != "fp32" and self.precision == "32-true":
            raise ConfigError(
                f"backbone.weights={cfg.backbone.weights} needs mixed precision, but trainer.precision is 32-true "
                "here: set trainer.precision=bf16-mixed, or backbone.weights=fp32."
            )
        self.stores: dict[str, Any] = {}  # both stages read the same rows
        self.data = self._data(cfg.data.batch_size)
        attention = prepare_unet(backbone, cfg)
        if cfg.adapter.full_finetune:
            make_full_finetune(backbone.unet)
        else:
            inject(backbone.unet, cfg.adapter)
            if cfg.adapter.init_from is not None:
                started = initialize(backbone.unet, cfg.adapter.init_from, cfg.adapter.allow_partial)
                if self.rank == 0:
                    console.print(started, highlight=False)
        if cfg.conditioning == "source":
            attach_source_input(backbone.unet)
        null = backbone.encode_text([""])[0]
        if self.rank == 0:
            too_long = long_captions(self.data.captions("train"), backbone.tokenizer, backbone.text_chunks)
            if too_long:
                console.print(too_long, soft_wrap=True, highlight=False)
        if self.rank == 0:  # before the stages take turns in what requires a gradient
            extra = {} if self.enhancement is None else {"enhancement": self.enhancement}
            console.print(adapter_table(backbone.unet, extra))  # type: ignore[arg-type]
            console.print(f"{self.device}, {self.precision}, {attention} attention", highlight=False)
        self.module = LoraDae(backbone, cfg, self.enhancement, null, "adapter")
        self.loggers: list[Any] = []
        if self.rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.loggers = tracking.build_loggers(cfg, run_dir, to_dict(cfg), console)

    def _data(self, batch_size: int) -> PairDataModule:
        return PairDataModule(
            self.splits["train"], self.splits["val"], self.splits["test"],
            cache_dir=Path(self.cfg.data.cache_dir) / "latents", encode_images=self._encode_images,
            encode_text=self.backbone.encode_text,
            vae=f"{self.backbone.folder.fingerprint('vae')}-{self.precision}",
            text_encoder=f"{self.backbone.folder.fingerprint(*TEXT_PARTS)}-{self.backbone.text_chunks}",
            batch_size=batch_size, seed=self.cfg.seed, cache=self.cfg.data.cache,
            masks=self.cfg.objective.garment_weight != 1, stores=self.stores,
        )  # fmt: skip

    def _encode_images(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """In the training precision: on a CPU with bfloat16 this halves the wait before the first step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.startswith("bf16")):
            mean, std = self.backbone.encode_images(images)
        return mean.float(), std.float()

    def fit(self, checkpoints: dict[str, Path]) -> None:
        """Adapter first, then the enhancement on the adapter's averaged weights."""
        if self.device.type != "cpu":  # everything is cached before the first step, so their memory is free for it
            if self.rank == 0:
                self.data.prepare_data()
            self.backbone.rest(self.device)
        if "enhancement" not in checkpoints:
            self._stage("adapter", self.steps, self.data, checkpoints.get("adapter"))
        if self.enhancement is not None:
            data = self._data(self.cfg.enhancement.batch_size)
            self._stage("enhancement", self.cfg.enhancement.max_steps, data, checkpoints.get("enhancement"))

    def _stage(self, stage: str, steps: int, data: PairDataModule, checkpoint: Path | None) -> None:
        cfg = self.cfg
        self.module.set_stage(stage)
        ema = EMACallback(cfg.optimizer.ema_decay if stage == "adapter" else 0.0)
        interrupt = callbacks.CleanInterrupt()
        every = min(int(cfg.trainer.get("val_check_interval") or steps), steps)
        path = self.run_dir / "checkpoints" / f"{stage}.ckpt"
        extra: list[Any] = [
            ema, interrupt, callbacks.Checkpoint(path, every), callbacks.Throughput(data.batch_size),
            callbacks.StepProgress(stage), *self.extra_callbacks,
        ]  # fmt: skip
        if stage == "adapter" and self.rank == 0 and cfg.tracking.sample_every_n_steps > 0:
            grids = callbacks.SampleGrid(cfg.tracking.sample_every_n_steps, lambda step: self._grid(ema, step))
            extra.append(grids)
        loggers = self.loggers
        if stage == "enhancement":
            loggers = tracking.stage_loggers(loggers, self.run_dir, stage, self.steps)
        trainer = _trainer(cfg, self.run_dir, self.precision, steps, extra, stage == "adapter", loggers)
        self.module.unet.train(stage == "adapter")
        trainer.fit(self.module, datamodule=data, ckpt_path=checkpoint, weights_only=checkpoint is not None or None)
        if interrupt.interrupted:
            raise InterruptedRunError(
                f"stopped at step {trainer.global_step} of {steps}; go on with: python train.py <same overrides> "
                f"hydra.run.dir={self.run_dir} ckpt_path=last"
            )
        if ema.ema is not None:
            ema.ema.swap_in(trainable_parameters(self.module))

    @torch.no_grad()
    def _grid(self, ema: EMACallback, step: int) -> None:
        """The fixed validation prompts on the averaged weights, as they stand now."""
        cfg = self.cfg
        held_out = HeldOut.take(self.splits["val"], cfg.tracking.num_grid_prompts, cfg.conditioning)
        drawer = Drawer(
            self.backbone, None, "none", cfg.conditioning, cfg.data.resolution,
            cfg.sampling, self.precision.startswith("bf16"),
        )  # fmt: skip
        with ema.swapped(self.module):
            images = drawer.images(held_out.captions, held_out.sources)
        grid = write_grid(
            {f"step {step}": images}, held_out, self.run_dir / "samples" / f"step_{step:06d}.png", len(images)
        )
        tracking.log_image(self.loggers, "val/samples", grid, step)

    def export(self) -> None:
        """Write adapter/: the averaged weights in the formats that other programs read."""
        folder = self.run_dir / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        unet = self.backbone.unet
        if self.cfg.adapter.full_finetune:
            save_merged(unet, folder / "unet")
        else:
            save_adapter(unet, folder, {"backbone": self.cfg.backbone.name, "fingerprint": self.backbone.fingerprint})
            if self.cfg.conditioning == "source":
                save_source_input(unet, folder)
        if self.enhancement is not None:
            save_enhancement(self.enhancement, folder / ENHANCEMENT_FILE)
        backbone = self.backbone
        export_beside(
            self.run_dir, self.cfg, backbone.folder.family, backbone.folder.unet_config, backbone.prediction_type
        )


class _WithoutSource:
    """A view of a data set that hides the source photos."""

    has_source = False

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset, self.has_mask = dataset, dataset.has_mask
        self.blocks = getattr(dataset, "blocks", None)
        self.fingerprint = dataset.fingerprint + "-text"

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return replace_pixels(self.dataset[index], source=None)


def _without_source(dataset: PairDataset) -> PairDataset:
    return _WithoutSource(dataset) if dataset.has_source else dataset


def _trainer(
    cfg: Config,
    run_dir: Path,
    precision: str,
    steps: int,
    extra: list[Any],
    validate: bool,
    loggers: Any = False,
) -> lightning.Trainer:
    """lightning.Trainer from ``trainer.*``, with what this project needs to be exact."""
    options = {k: v for k, v in cfg.trainer.items() if k not in ("precision", "max_steps", "val_check_interval")}
    every = min(int(cfg.trainer.get("val_check_interval") or steps), steps)
    try:
        return lightning.Trainer(
            **{
                **options,
                "precision": precision,
                "max_steps": steps,
                "default_root_dir": run_dir,
                "callbacks": extra,
                "logger": loggers,
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "enable_progress_bar": bool(extra),
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "check_val_every_n_epoch": None,
                "val_check_interval": every,
                # The enhancement's steps are few and long: each is logged.
                "log_every_n_steps": options.get("log_every_n_steps", 50) if validate else 1,
                "limit_val_batches": options.get("limit_val_batches", 1.0) if validate else 0,
            }
        )
    except TypeError as error:
        raise ConfigError(f"trainer.* does not fit lightning.Trainer: {error}.") from error


def _quiet() -> None:
    """Lightning's hints are for other set-ups; warnings that repeat what the console says are dropped."""
    for name in (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
        "diffusers",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (
        ".*does not have many workers.*",
        ".*srun.*",
        ".*LeafSpec.*",
        ".*eval mode at the start.*",
        ".*_pytree.*",
        ".*weights_only.*",
    ):
        warnings.filterwarnings("ignore", text)
