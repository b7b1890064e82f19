"""Where numbers and pictures go: a CSV file, and Weights & Biases or TensorBoard as far as wanted and possible."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from rich.console import Console

from lora_dae.config import Config, ConfigError, TrackingConfig

STEP = "trainer/global_step"  # Lightning's name for the axis
# With any summary named, W&B keeps {"last": value}, which no plot of summaries and no sweep's metric finds.
SUMMARIES = {"train/loss": "min", "val/loss": "min", "images/s": "max", "test/*": None}
WANDB_MODES = ("auto", "online", "offline", "disabled")
OLD_MODES = {"dryrun": "offline", "run": "online"}  # W&B's; Lightning sets the first for an offline run
SAAS = "api.wandb.ai"  # W&B's own server, which newer versions call by another name and find logins of either


def check_tracking(cfg: TrackingConfig) -> None:
    """Raises ConfigError for a mode that is none, and for a logger whose library is missing."""
    wandb_mode(cfg.wandb)
    if cfg.logger == "tensorboard" and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        raise ConfigError("logger=tensorboard needs TensorBoard: pip install 'lora-dae[tensorboard]'.")


def wandb_mode(setting: str) -> str:
    """``auto``: WANDB_MODE if set, online with an API key or login, else offline. Never asks, never blocks."""
    if setting not in WANDB_MODES:
        raise ConfigError(f"tracking.wandb={setting} is unknown: use one of {', '.join(WANDB_MODES)}.")
    if setting != "auto":
        return setting
    if mode := os.environ.get("WANDB_MODE"):
        return OLD_MODES.get(mode, mode)
    return "online" if os.environ.get("WANDB_API_KEY") or _logged_in() else "offline"


def _logged_in() -> bool:
    """Whether there is a login to W&B's server where W&B itself looks for one."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for name in (os.environ.get("NETRC", "~/.netrc"), "~/_netrc"):
        path = Path(name).expanduser()
        if path.is_file():
            try:
                logins = netrc.netrc(path)
            except netrc.NetrcParseError:
                continue
            return any(logins.authenticators(host) is not None for host in _hosts())
    return False


def _hosts() -> set[str]:
    """The names of W&B's server: what the environment or ``wandb login --host`` says, or this version's own."""
    import wandb

    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    except configparser.Error:
        pass  # W&B does without it as well
    own = urlsplit(str(wandb.Settings().base_url)).netloc
    url = str(os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback=""))
    host = str(urlsplit(url).netloc) or own
    return {host, SAAS} if host == own else {host}


def csv_logger(run_dir: Path, stage: str = "") -> CSVLogger:
    """``csv/metrics.csv``, or ``csv/<stage>/metrics.csv``; a resumed run keeps what was logged before."""
    log = run_dir / "csv" / stage / "metrics.csv"
    if log.is_file():  # CSVLogger would delete it
        log.rename(log.with_name(f"metrics_before_{len(list(log.parent.glob('metrics_before_*')))}.csv"))
    return CSVLogger(run_dir, name="csv", version=stage)


class StagedLogger:
    """Steps that go on where the stage before ended, so that they never run backwards in one log."""

    offset = 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else step + self.offset)  # type: ignore[misc]


class StagedWandbLogger(StagedLogger, WandbLogger):
    pass


class StagedTensorBoardLogger(StagedLogger, TensorBoardLogger):
    pass


def build_loggers(cfg: Config, run_dir: Path, plain: dict[str, Any], console: Console) -> list[Logger]:
    """What ``tracking.logger`` names: the CSV log (``csv/metrics.csv``) first, unless it is ``none``."""
    return [] if cfg.tracking.logger == "none" else [csv_logger(run_dir), *build_trackers(cfg, run_dir, plain, console)]


def build_trackers(cfg: Config, run_dir: Path, plain: dict[str, Any], console: Console) -> list[Logger]:
    """The loggers beside the CSV log."""
    if cfg.tracking.logger == "tensorboard":
        return [StagedTensorBoardLogger(run_dir, name="tensorboard", version="")]
    tags = [*cfg.tracking.tags, cfg.name, cfg.conditioning]
    tracking = replace(cfg.tracking, group=cfg.tracking.group or cfg.name, tags=tags)
    logger = wandb_logger(tracking, run_dir, plain, console)
    if logger is None:
        return []
    for name, summary in SUMMARIES.items():
        logger.experiment.define_metric(name, step_metric=STEP, step_sync=True, summary=summary)
    return [logger]


def wandb_logger(
    cfg: TrackingConfig, folder: Path, plain: dict[str, Any], console: Console
) -> StagedWandbLogger | None:
    """A W&B run named like ``folder``, its files in there, or None where W&B is not wanted."""
    mode = wandb_mode(cfg.wandb)
    if cfg.logger != "wandb" or mode == "disabled":
        return None
    if mode == "offline":
        runs = f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*"
        console.print(f"W&B is offline; upload later with: wandb sync {runs}", soft_wrap=True, markup=False)
    os.environ.setdefault("WANDB_SILENT", "true")
    return StagedWandbLogger(
        name=folder.name,
        save_dir=folder,
        offline=mode == "offline",
        mode=mode,  # else WANDB_MODE would overrule what was asked for
        project=cfg.project,
        group=cfg.group,
        job_type=cfg.job_type,
        tags=cfg.tags,
        config=plain,
        log_model=False,  # every checkpoint would be uploaded
    )


def trackers(loggers: list[Logger]) -> list[Logger]:
    """All but the CSV log, which holds training's curves alone."""
    return [logger for logger in loggers if not isinstance(logger, CSVLogger)]


def stage_loggers(loggers: list[Logger], run_dir: Path, stage: str, offset: int) -> list[Logger]:
    """For a later stage: a CSV log of its own (columns of two fits do not mix), the same trackers, later steps."""
    for logger in loggers:
        if isinstance(logger, StagedLogger):
            logger.offset = offset
    return [csv_logger(run_dir, stage), *trackers(loggers)] if loggers else []


def log_image(loggers: list[Logger], key: str, image: np.ndarray, step: int | None = None) -> None:
    """One picture, uint8 (H, W, 3), to the loggers that take pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [image])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(key, image, step, dataformats="HWC")


def log_samples(
    loggers: list[Logger],
    key: str,
    captions: list[str],
    columns: Mapping[str, np.ndarray],
) -> None:
    """A W&B table of samples: the caption, then a picture per column, each uint8 (N, H, W, 3)."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            rows = [
                [caption, *(wandb.Image(images[i]) for images in columns.values())]
                for i, caption in enumerate(captions)
            ]
            logger.log_table(key, columns=["prompt", *columns], data=rows)


def log_table(loggers: list[Logger], key: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A W&B table of plain values."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key, columns=columns, data=rows)


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


@contextmanager
def closed_on_failure() -> Iterator[None]:
    """As a decorator: what fails closes its W&B run as failed; the next job of the process would log into it."""
    try:
        yield
    except BaseException:
        wandb = sys.modules.get("wandb")  # without it there is no run
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=1)
        raise
