"""Hydra finds launchers in the namespace package ``hydra_plugins``; the work is in ``lora_dae.sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ProcessLauncher(Launcher):
    """``hydra/launcher=process``: every job in a fresh process. Options: conf/hydra/launcher/process.yaml."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs; ends the program with exit code 1 if one of them failed."""
        from lora_dae.sweep.launcher import launch  # Hydra imports every plugin at every start

        assert self.config is not None and self.hydra_context is not None
        return launch(self.options, self.config, self.hydra_context, job_overrides, initial_job_idx)
