"""lightning.Trainer as this project needs it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.strategies import DDPStrategy

from lora_dae.config import Config, ConfigError

OWN = ("precision", "max_steps", "val_check_interval", "early_stop_patience")  # of cfg.trainer: not passed on as given


def build_trainer(
    cfg: Config,
    run_dir: Path,
    precision: str,
    steps: int,
    extra: list[Any],
    validate: bool,
    loggers: Any = False,
) -> lightning.Trainer:
    """lightning.Trainer from ``trainer.*``, with what this project needs to be exact."""
    options = {k: v for k, v in cfg.trainer.items() if k not in OWN}
    # Lightning counts batches here, and several of them may make one step.
    every = validation_interval(cfg, steps) * int(cfg.trainer.get("accumulate_grad_batches") or 1)
    try:
        trainer = lightning.Trainer(
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
    if isinstance(trainer.strategy, DDPStrategy):
        # All ranks hold the same buffers. DDP would send them in every forward, in validation too, where one rank may
        # have a batch more than another: what it sends then meets another rank's reduction.
        trainer.strategy._ddp_kwargs.setdefault("broadcast_buffers", False)
    return trainer


def validation_interval(cfg: Config, steps: int) -> int:
    """Optimizer steps between validations, and between checkpoints."""
    return min(int(cfg.trainer.get("val_check_interval") or steps), steps)


def quiet() -> None:
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


def check_processes(trainer: lightning.Trainer) -> None:
    """Raises ConfigError unless as many processes were started as the trainer asks for, or can be.

    Inside Slurm and under torchrun Lightning starts none itself, and trains with those that are there. Elsewhere it
    gives this process's command again, which is no training's where Hydra runs a sweep in this process, or in a worker.
    """
    environment = trainer._accelerator_connector.cluster_environment
    started, devices, nodes = environment.world_size(), trainer.num_devices, trainer.num_nodes
    sweeping = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    asked = f"trainer.devices={devices}" + (f" with trainer.num_nodes={nodes}" if nodes > 1 else "")
    if devices * nodes > 1 and not environment.creates_processes_externally and (sweeping or sys.argv[0] == "-c"):
        raise ConfigError(
            f"{asked}: from here no other process can be started. Sweep with hydra/launcher=process, its default, or "
            f"on Slurm with hydra.launcher.tasks_per_node={devices}; compare studies on one device."
        )
    if devices * nodes != started:
        start = f"srun --ntasks-per-node={devices}, or torchrun --nproc-per-node={devices}"
        if sweeping:  # which starts what its launcher is told
            start = f"hydra.launcher.nodes={nodes} hydra.launcher.tasks_per_node={devices}"
        raise ConfigError(
            f"{asked} needs {devices * nodes} processes, but {started} were started: start {devices} on each node "
            f"({start}), or set trainer.devices to what there is."
        )
