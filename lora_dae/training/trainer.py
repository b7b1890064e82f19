"""lightning.Trainer as this project needs it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lora_dae.config import Config, ConfigError

OWN = ("precision", "max_steps", "val_check_interval", "early_stop_patience")  # of cfg.trainer: not passed on as given
# Arguments of lightning.Trainer that would do nothing here, or not what they say; and why.
REFUSED = {
    "callbacks": "they are this project's own",
    "check_val_every_n_epoch": "trainer.val_check_interval counts steps",
    "default_root_dir": "hydra.run.dir names the folder",
    "enable_checkpointing": "checkpoints are always written",
    "enable_model_summary": "a table of the adapter is printed instead",
    "limit_train_batches": "the same few batches would come again and again; trainer.max_steps ends a training",
    "logger": "the group logger= chooses one",
    "max_epochs": "the training stream has no epochs; trainer.max_steps ends a training",
    "min_epochs": "the training stream has no epochs; trainer.max_steps ends a training",
    "num_sanity_val_steps": "nothing is validated before the first step",
    "use_distributed_sampler": "processes always share the samples",
}


def check_trainer(cfg: Config) -> lightning.Trainer:
    """A trainer as ``trainer.*`` asks for it, to look at.

    Raises ConfigError where there is none on this machine, or where it would not do what is asked for.
    """
    for name, why in REFUSED.items():
        if name in cfg.trainer:
            raise ConfigError(f"trainer.{name} cannot be given here ({why}): leave it out.")
    trainer = build_trainer(cfg, Path(cfg.run_dir), "32-true", adapter_steps(cfg), [], False)
    check_processes(trainer)
    check_deterministic(cfg, trainer.strategy.root_device)
    return trainer


def adapter_steps(cfg: Config) -> int:
    """Optimizer steps of the adapter's stage."""
    return int(cfg.trainer["max_steps"])


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
                "enable_progress_bar": any(isinstance(one, ProgressBar) for one in extra),
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "check_val_every_n_epoch": None,
                "val_check_interval": every,
                # The enhancement's steps are few and long: each is logged.
                "log_every_n_steps": options.get("log_every_n_steps", 50) if validate else 1,
                "limit_val_batches": options.get("limit_val_batches", 1.0) if validate else 0,
            }
        )
    except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
        said = " ".join(str(error).split()).split(". ")[0].rstrip(".!")
        raise ConfigError(
            f"trainer.* does not fit lightning.Trainer or this machine ({said}): correct it, or leave it out."
        ) from error
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


def check_deterministic(cfg: Config, device: torch.device) -> None:
    """Raises ConfigError where ``trainer.deterministic=true`` would end a later stage, with the adapter trained."""
    e = cfg.enhancement
    matches = e.enabled and e.placement != "none" and cfg.conditioning == "source" and (e.texture or e.decoder)
    if device.type == "cuda" and cfg.trainer.get("deterministic") is True and matches:
        raise ConfigError(
            "trainer.deterministic=true: what carries a source photo's texture (grid_sample) has no deterministic "
            "gradient on a GPU: give trainer.deterministic=warn, or leave texture and decoder out (enhancement=gain)."
        )
