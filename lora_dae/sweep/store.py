"""Nothing is trained twice: finished trainings by content hash, and jobs that measure what is there.

    <store>/<hash>/                a training's run folder: config, checkpoints, csv, adapter
    <store>/<hash>/trained.json    written last: the training is finished and exported
    <store>/<hash>.lock            held by the process that trains; the system gives it back when that ends

A training that was cut off is taken over from its last checkpoint by whoever gets the lock next.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from lora_dae.backbone.layout import inspect_backbone
from lora_dae.backbone.precision import best_device, draws_in_bf16
from lora_dae.config import Config, ConfigError, to_dict
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.metrics.extras import check_networks
from lora_dae.evaluation.report.table import load_table
from lora_dae.rules import check
from lora_dae.sweep import ranks
from lora_dae.sweep.files import read_json, write_json
from lora_dae.sweep.identity import training_hash, training_part
from lora_dae.sweep.locks import held, holder, try_lock
from lora_dae.sweep.status import Status, say
from lora_dae.training import tracking
from lora_dae.training.ended import InterruptedRunError
from lora_dae.training.prior import PRIOR_FILE
from lora_dae.training.run import Result, measure, train, write_config

POLL = 1.0  # seconds between tries for a lock
PATIENCE = 24 * 3600.0  # seconds that the other ranks wait: rank 0 may itself wait for another job
console = Console()


def run_in_store(cfg: Config) -> Result:
    """Train unless the store has it, then measure and report in the run folder.

    A job of Hydra's own sweep (Ray, Slurm) that an earlier start has finished is left as it is; ours skips such itself.
    Raises what ``training.run.run`` raises.
    """
    assert cfg.store is not None
    check(cfg)
    if cfg.ckpt_path is not None:
        raise ConfigError("ckpt_path and store exclude each other: with store, a training goes on by itself.")
    splits = load_splits(cfg.data)
    HeldOut.check(splits, cfg)
    check_networks(cfg.evaluation)
    folder, run_dir = training_folder(cfg), Path(cfg.run_dir)
    decision = run_dir / "decision.json"
    if ranks.rank() != 0:
        if ranks.ask(decision, PATIENCE):
            train(_training_config(cfg, folder))
        return Result(run_dir, None)
    inputs = {"hash": folder.name, "measured_on": splits[cfg.evaluation.split].fingerprint}
    if _is_job_of_hydra() and _finished_before(cfg, inputs):
        ranks.tell(decision, False)
        console.print(f"measured already: {run_dir}", soft_wrap=True, highlight=False)
        return Result(run_dir, load_table(run_dir / "metrics.json"))
    train_once(cfg, folder, decision)
    say(run_dir / "status.json", "measuring")
    (run_dir / "metrics.json").unlink(missing_ok=True)  # of other settings, perhaps
    take_over(folder, run_dir)
    (run_dir / "adapter" / "README.md").unlink(missing_ok=True)  # a link into the store: this run's strength is its own
    write_config(cfg)
    told = {**read_json(folder / "trained.json"), **inputs}
    write_json(run_dir / "trained.json", told)  # what a later start of the sweep compares: identity.inputs
    evaluated = replace(cfg, tracking=replace(cfg.tracking, job_type="evaluate"))
    loggers = tracking.build_trackers(evaluated, run_dir, to_dict(cfg), console)
    device = torch.device("cpu") if cfg.trainer.get("accelerator") == "cpu" else best_device()
    bf16 = draws_in_bf16(cfg, device)
    return measure(cfg, loggers, device, bf16)


def _is_job_of_hydra() -> bool:
    """Whether Hydra itself runs this job; our launcher's are single runs."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _finished_before(cfg: Config, inputs: Mapping[str, str]) -> bool:
    """Whether the run folder holds exactly this, to its end: the card of the adapter is what a run writes last."""
    run_dir = Path(cfg.run_dir)
    whole = all((run_dir / name).is_file() for name in ("config.yaml", "metrics.json", "adapter/README.md"))
    return (
        whole
        and OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")) == to_dict(cfg)
        and inputs.items() <= read_json(run_dir / "trained.json").items()
    )


def train_once(cfg: Config, folder: Path, decision: Path) -> None:
    """Return when ``folder`` holds the finished training: found, waited for, or trained here."""
    try:
        lock = _lock_to_train(cfg, folder)
    except BaseException as error:  # the other ranks would wait for a decision
        ranks.tell_failure(decision, str(error) or type(error).__name__)
        raise
    if lock is None:
        ranks.tell(decision, False)
        console.print(f"trained already: {folder}", soft_wrap=True, highlight=False)
        return
    with held(lock):
        started = time.time()
        ranks.tell(decision, True)
        training = _training_config(cfg, folder)
        try:
            trained = train(training, [Status(Path(cfg.run_dir) / "status.json")])
        except InterruptedRunError as error:  # its own words name a folder that the store alone writes into
            raise InterruptedRunError(f"{str(error).split(';')[0]}; the same command goes on") from error
        tracking.finish(trained.loggers)
        seconds = round(time.time() - started, 1)
        write_json(
            folder / "trained.json",
            {"hash": folder.name, "by": cfg.run_dir, "seconds": seconds, "config": training_part(cfg)},
        )


def _lock_to_train(cfg: Config, folder: Path) -> FileLock | None:
    """Waits for the lock of a training that is to be done; None once it is finished, by whomever."""
    lock_path = folder.with_name(folder.name + ".lock")
    while not (folder / "trained.json").is_file():
        lock = try_lock(lock_path)
        if lock is None:
            say(Path(cfg.run_dir) / "status.json", f"waits for {holder(lock_path)}")
            time.sleep(POLL)
        elif (folder / "trained.json").is_file():  # finished while this process was asking
            lock.release()
        else:
            return lock
    return None


def train_shared(cfg: Config) -> Path:
    """Train what the store lacks of ``cfg``, the adapter alone first; returns the store's folder of it.

    Configs that differ in the enhancement alone share the adapter: the enhancement begins where that training ended, if
    the two do not train together. For one process. Raises what ``training.run.train`` raises.
    """
    folder = training_folder(cfg)
    later = training_part(cfg)["enhancement"] is not None and not cfg.enhancement.joint
    if later and not (folder / "trained.json").is_file():
        alone = train_shared(replace(cfg, enhancement=replace(cfg.enhancement, enabled=False)))
        if (alone / PRIOR_FILE).is_file():  # what that checkpoint goes on with
            _begin_with(alone / PRIOR_FILE, folder / PRIOR_FILE)
        _begin_with(alone / "checkpoints" / "adapter.ckpt", folder / "checkpoints" / "adapter.ckpt")
    train_once(cfg, folder, Path(cfg.run_dir) / "decision.json")
    return folder


def training_folder(cfg: Config) -> Path:
    """Where the store keeps the training of ``cfg``."""
    assert cfg.store is not None
    backbone = inspect_backbone(cfg.backbone, cfg.data.resolution)
    photos = {name: split.fingerprint for name, split in load_splits(cfg.data).items()}
    return Path(cfg.store) / training_hash(cfg, photos, backbone.fingerprint())


def _begin_with(checkpoint: Path, own: Path) -> None:
    """Nothing writes into a checkpoint that is there, so that a link is enough."""
    own.parent.mkdir(parents=True, exist_ok=True)
    partial = own.with_name(f"{own.name}.{os.getpid()}.partial")
    _link(str(checkpoint), str(partial))
    partial.replace(own)


def _training_config(cfg: Config, folder: Path) -> Config:
    """The config of the training proper; all ranks come to the same, from the same files."""
    begun = any((folder / "checkpoints").glob("*.ckpt"))
    return replace(cfg, run_dir=str(folder), store=None, ckpt_path="last" if begun else None)


def take_over(folder: Path, run_dir: Path) -> None:
    """Put what was trained into the job's folder, so that it is a run folder like any other.

    Files are hard links where the disk has them: a fully fine-tuned UNet is gigabytes.
    """
    for name in ("adapter", "csv", "tensorboard"):
        partial = run_dir / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(run_dir / name, ignore_errors=True)
        if not (folder / name).is_dir():  # it depends on the logger
            continue
        shutil.copytree(folder / name, partial, copy_function=_link)
        partial.rename(run_dir / name)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
