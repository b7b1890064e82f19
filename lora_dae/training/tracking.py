"""Where numbers and pictures go: a CSV file always, Weights & Biases as far as it is wanted and possible."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from rich.console import Console

from lora_dae.config import Config, ConfigError

WANDB_MODES = ("auto", "online", "offline", "disabled")


def wandb_mode(setting: str) -> str:
    """``auto``: WANDB_MODE if set, online with an API key or login, else offline. Never asks, never blocks."""
    if setting not in WANDB_MODES:
        raise ConfigError(f"tracking.wandb={setting} is unknown: use one of {', '.join(WANDB_MODES)}.")
    if setting != "auto":
        return setting
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _logged_in() else "offline"


def _logged_in() -> bool:
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].rstrip("/")
    for name in (os.environ.get("NETRC", "~/.netrc"), "~/_netrc"):
        path = Path(name).expanduser()
        if path.is_file():
            try:
                return netrc.netrc(path).authenticators(host) is not None
            except netrc.NetrcParseError:
                continue
    return False


def csv_logger(run_dir: Path, stage: str = "") -> CSVLogger:
    """``csv/metrics.csv``, or ``csv/<stage>/metrics.csv``; a resumed run keeps what was logged before."""
    log = run_dir / "csv" / stage / "metrics.csv"
    if log.is_file():  # CSVLogger would delete it
        log.rename(log.with_name(f"metrics_before_{len(list(log.parent.glob('metrics_before_*')))}.csv"))
    return CSVLogger(run_dir, name="csv", version=stage)


def build_loggers(cfg: Config, run_dir: Path, plain: dict[str, Any], console: Console) -> list[Logger]:
    """The CSV logger (``csv/metrics.csv``) and, unless disabled, W&B."""
    return [csv_logger(run_dir), *wandb_loggers(cfg, run_dir, plain, console)]


def wandb_loggers(cfg: Config, run_dir: Path, plain: dict[str, Any], console: Console) -> list[Logger]:
    """The W&B logger, or none where ``tracking.wandb`` is disabled."""
    mode = wandb_mode(cfg.tracking.wandb)
    if mode == "disabled":
        return []
    if mode == "offline":
        console.print(
            f"W&B is offline; upload later with: wandb sync {run_dir / 'wandb'}/offline-run-*", soft_wrap=True
        )
    os.environ.setdefault("WANDB_SILENT", "true")
    return [
        WandbLogger(
            name=run_dir.name,
            save_dir=run_dir,
            offline=mode == "offline",
            project=cfg.tracking.project,
            group=cfg.tracking.group or cfg.name,
            job_type=cfg.tracking.job_type,
            tags=[*cfg.tracking.tags, cfg.name, cfg.conditioning],
            config=plain,
            log_model=False,  # every checkpoint would be uploaded
        )
    ]


def trackers(loggers: list[Logger]) -> list[Logger]:
    """All but the CSV log, which holds training's curves alone."""
    return [logger for logger in loggers if not isinstance(logger, CSVLogger)]


def log_image(loggers: list[Logger], key: str, image: np.ndarray) -> None:
    """One picture, uint8 (H, W, 3), to the loggers that take pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [image])


def log_metrics(loggers: list[Logger], metrics: dict[str, float], step: int) -> None:
    for logger in loggers:
        logger.log_metrics(metrics, step)


def finish(loggers: list[Logger]) -> None:
    """Close the W&B run, so that the next job of a sweep gets one of its own."""
    for logger in loggers:
        logger.finalize("success")
        if isinstance(logger, WandbLogger):
            import wandb

            wandb.finish()
