"""Who am I among the processes of one job, before torch.distributed knows: rank 0 decides, the others follow."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lora_dae.config import ConfigError
from lora_dae.sweep.files import read_json, write_json

POLL = 0.2  # seconds


def rank() -> int:
    """0 for the process that decides: alone, the first of torchrun or srun, or the one that starts the others."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):  # LOCAL_RANK alone: started by Lightning on one machine
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def started_from_outside() -> bool:
    """Whether all processes were started at once (torchrun, srun) rather than by rank 0 when it trains."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1") or 1) > 1


def attempt() -> str:
    """The same on all processes of one start of one job, another one on the next start."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID",
             "SLURM_RESTART_COUNT")  # fmt: skip
    return "-".join(os.environ.get(name, "") for name in names)


def tell(path: Path, must_train: bool) -> None:
    """Rank 0's decision, for ``ask``; written only where others wait for it."""
    if started_from_outside():
        write_json(path, {"attempt": attempt(), "must_train": must_train})


def ask(path: Path, patience: float) -> bool:
    """Wait for rank 0's decision. Raises ConfigError after ``patience`` seconds."""
    if not started_from_outside():
        return True  # Lightning starts processes only to train
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        told = read_json(path)
        if told.get("attempt") == attempt():
            return bool(told["must_train"])
        time.sleep(POLL)
    raise ConfigError(f"rank {rank()} heard nothing from rank 0 at {path}: is the run folder on a shared disk?")
