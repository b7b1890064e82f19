"""Who am I among the processes of one job, before torch.distributed knows: rank 0 decides, the others follow."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError
from lora_dae.sweep.files import read_json, write_json

POLL = 0.2  # seconds
# What srun tells its tasks, and sbatch a script of one task: with these, Lightning starts no process itself.
SLURM_TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


def rank() -> int:
    """0 for the process that decides: alone, the first of torchrun or srun, or the one that starts the others."""
    names = ["RANK", "LOCAL_RANK"]  # LOCAL_RANK alone: started by Lightning on one machine
    if _slurm_tasks() > 1:  # of a single task, all that it starts have the same SLURM_PROCID
        names.insert(1, "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def environment_of_a_job() -> dict[str, str]:
    """This process's environment for one that starts its own: it is no task of Slurm, wherever the sweep itself is."""
    return {name: value for name, value in os.environ.items() if name not in SLURM_TASK}


def tell(path: Path, must_train: bool) -> None:
    """Rank 0's decision, for ``ask``; told only where others wait for it."""
    _tell(path, {"must_train": must_train})


def tell_failure(path: Path, sentence: str) -> None:
    """In place of a decision: why rank 0 comes to none."""
    _tell(path, {"failed": sentence})


def _tell(path: Path, told: dict[str, Any]) -> None:
    if _by_torchrun():
        _torchruns_store().set(_key(), json.dumps(told))
    elif _slurm_tasks() > 1:
        write_json(path, {"step": _slurm_step(), **told})


def ask(path: Path, patience: float) -> bool:
    """Wait for rank 0's decision. Raises ConfigError after ``patience`` seconds, and where rank 0 failed before it."""
    if _by_torchrun():
        store = _torchruns_store()
        try:
            store.wait([_key()], timedelta(seconds=patience))
        except RuntimeError as error:
            raise ConfigError(f"rank {rank()} heard nothing from rank 0: see what that one printed.") from error
        return _decided(json.loads(store.get(_key())))
    if _slurm_tasks() <= 1:
        return True  # Lightning starts processes only to train
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        told = read_json(path)
        if told.get("step") == _slurm_step():
            return _decided(told)
        time.sleep(POLL)
    raise ConfigError(f"rank {rank()} heard nothing from rank 0 at {path}: is the run folder on a shared disk?")


def _decided(told: dict[str, Any]) -> bool:
    if "failed" in told:
        raise ConfigError(f"rank 0 failed: {told['failed']}")
    return bool(told["must_train"])


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _torchruns_store() -> Any:
    """What torchrun's own process keeps for its workers, from their start to their end: no earlier start is in it.

    Its id and port, by contrast, are the same on every start unless somebody gives others.
    """
    from torch.distributed import TCPStore  # the launcher needs this module too, and never torch

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _key() -> str:
    return f"lora_dae/must_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _slurm_tasks() -> int:
    return int(os.environ.get("SLURM_NTASKS") or 1)


def _slurm_step() -> str:
    """The same on all tasks of one srun, another one on the next."""
    return "-".join(os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
