"""Which devices a job may see, found without importing torch: the launcher stays a small process."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

from lora_dae.config import ConfigError


def visible_gpus() -> list[str]:
    """The GPUs of this machine: those of CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [part.strip() for part in told.split(",") if part.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return [str(i) for i, line in enumerate(x for x in listed.stdout.splitlines() if x.startswith("GPU "))]


def cores() -> int:
    """Those that this process may use: under Slurm not all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def named_devices(given: Any) -> list[str]:
    """``hydra.launcher.devices`` as names: a list, one device, or text with commas."""
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else list(given)
    return [str(part).strip() for part in parts]


class Devices:
    """Hands out devices to jobs. Without any, ``jobs`` alone limits how many run, and cores are shared out.

    ``chosen``: somebody named them, so that a job alone is told of them, too, and of none where there are none.
    """

    def __init__(self, jobs: int, names: list[str], chosen: bool = False) -> None:
        if jobs < 1:
            raise ConfigError(f"hydra.launcher.jobs={jobs} is below 1: give at least 1.")
        self.jobs, self.names, self.chosen = jobs, names, chosen
        self.free = list(names)
        self.running = 0

    def check(self, count: int) -> None:
        """Raises ConfigError if a job that asks for ``count`` could never start."""
        if self.names and count > len(self.names):
            raise ConfigError(f"a job asks for {count} GPUs and there are {len(self.names)}: lower trainer.devices.")

    def take(self, count: int) -> list[str] | None:
        """Devices for one more job, or None while there are too few. One job at a time sees all of them."""
        if self.running >= self.jobs:
            return None
        taken: list[str] = []
        if self.names and self.jobs > 1:
            if count > len(self.free):
                return None
            taken, self.free = self.free[:count], self.free[count:]
        elif self.chosen:
            taken, self.free = self.free, []
        self.running += 1
        return taken

    def give_back(self, devices: list[str]) -> None:
        self.running -= 1
        self.free += devices

    def environment(self, devices: list[str], processes: int = 1, at_once: int | None = None) -> dict[str, str]:
        """What a job of ``processes`` is told of its share, where at most ``at_once`` (None: ``jobs``) can run."""
        told = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices or self.chosen else {}
        if devices:
            return told
        jobs = self.jobs if at_once is None else min(self.jobs, at_once)
        if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            told["OMP_NUM_THREADS"] = str(max(cores() // (jobs * processes), 1))
        return told
