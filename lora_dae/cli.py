"""The commands: compose the config, call one function, say errors in one sentence."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_dae.backbone.allocator import keep_freed_memory
from lora_dae.config import Config, ConfigError, TrackingConfig, conf_dir, from_dict, register
from lora_dae.rules import check
from lora_dae.sweep.jobs import INPUT_ERROR
from lora_dae.sweep.launcher import InterruptedSweepError
from lora_dae.sweep.name import register_sweep_name
from lora_dae.sweep.ranks import rank
from lora_dae.sweep.report import SweepReport
from lora_dae.training.ended import InterruptedRunError, NonFiniteLossError, PeerFailedError

# One process draws and trains alone: threads of the tokenizer after a fork would only warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A step needs some 400 kernels for each size of batch and picture; oneDNN keeps 1,024 and makes the others anew.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
register()
register_sweep_name()
console = Console()
CONF = str(conf_dir())
SWEEP_STORE = "multirun/store"  # as in conf/hydra/launcher/process.yaml


class JobError(Exception):
    """A known error of a job, in one sentence."""


def _one_sentence(command: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Known errors become one line on stderr and an exit code; anything else keeps its traceback.

    In a job of Ray or Slurm, which run in Hydra's own processes, JobError instead: an exit would take the sweep along.
    """

    @functools.wraps(command)
    def wrapped(cfg: DictConfig) -> Any:
        keep_freed_memory()

        def end(sentence: str, code: int) -> NoReturn:
            print(sentence, file=sys.stderr)
            if _is_job_of_hydra():
                raise JobError(sentence.removeprefix("error: ")) from None
            sys.exit(code)

        try:
            return command(cfg)
        except ConfigError as error:
            end(f"error: {error}", INPUT_ERROR)
        except (NonFiniteLossError, InterruptedRunError, PeerFailedError) as error:
            # All ranks know. Rank 0 says it, and is given the time to: Lightning kills it as soon as another one fails.
            if rank() != 0 and not _is_job_of_hydra():
                sys.exit(0)
            interrupted = isinstance(error, InterruptedRunError)
            # A loss that is not finite is no mistake in the input: a search goes on with other values.
            end(str(error) if interrupted else f"error: {error}", 130 if interrupted else 1)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or "a file"
            end(f"error: no room left to write {where}: make some; earlier files stay.", INPUT_ERROR)
        except InterruptedSweepError:
            print("stopped; the same command goes on", file=sys.stderr)
            sys.exit(130)

    return wrapped


def _is_job_of_hydra() -> bool:
    """Whether this is a job that Hydra runs itself; our own launcher's jobs are single runs."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def typed(cfg: DictConfig) -> Config:
    """The composed config as dataclasses, interpolations resolved."""
    return from_dict(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]


def train() -> None:
    """``python train.py experiment=rank16``: one run. With ``-m`` and lists of values: a sweep, ``-j 2`` at once."""
    sys.argv[1:] = expand_jobs(sys.argv[1:])
    try:
        _train()
    except SystemExit as ended:
        if ended.code == 1:  # jobs failed; Hydra tells no callback of that end
            SweepReport.write_if_due()
        raise


def expand_jobs(arguments: list[str]) -> list[str]:
    """``-j 2``, ``-j2`` or ``--jobs 2`` to Hydra's ``hydra.launcher.jobs=2``."""
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-j", "--jobs"):
            expanded.append(f"hydra.launcher.jobs={next(rest, '')}")
        elif re.fullmatch(r"-j\d+", argument):
            expanded.append(f"hydra.launcher.jobs={argument[2:]}")
        else:
            expanded.append(argument)
    return expanded


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@_one_sentence
def _train(cfg: DictConfig) -> None:
    """Train, export, measure, report; in a sweep, only what no earlier run has trained."""
    try:
        _train_or_reuse(cfg)
    except ConfigError:
        _leave_nothing()
        raise


def _train_or_reuse(cfg: DictConfig) -> None:
    run_cfg = typed(cfg)
    check(run_cfg)  # before torch and lightning are imported, which takes longer than all else
    if run_cfg.tracking.group is None:
        run_cfg = replace(run_cfg, tracking=replace(run_cfg.tracking, group=sweep_of(Path(run_cfg.run_dir))))
    store = run_cfg.store
    if store == "auto":
        store = SWEEP_STORE if HydraConfig.get().mode == RunMode.MULTIRUN else None
    if store is None or run_cfg.plan:
        from lora_dae.training.run import run

        run(run_cfg)
    else:
        from lora_dae.sweep.store import run_in_store

        run_in_store(replace(run_cfg, store=store))


def _leave_nothing() -> None:
    """Of a run that was refused: the folder that Hydra made for it, unless something else is in it."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if rank() == 0 and [path.name for path in folder.iterdir()] == [".hydra"]:
        shutil.rmtree(folder)


def _is_a_run(cfg: DictConfig) -> None:
    """Raises ConfigError where ``run`` is none: before torch is imported, which takes longer than all else."""
    if not OmegaConf.is_missing(cfg, "run") and isinstance(cfg.run, str):
        from lora_dae.sampling.finished import read_config

        read_config(Path(cfg.run))


def sweep_of(run_dir: Path) -> str | None:
    """The name of the sweep that a run belongs to, whatever started it: Hydra keeps a sweep's config in its folder."""
    return run_dir.parent.name if (run_dir.parent / "multirun.yaml").is_file() else None


@hydra.main(version_base="1.3", config_path=CONF, config_name="sample")
@_one_sentence
def sample(cfg: DictConfig) -> None:
    """``python sample.py run=<dir> prompt="..."``: draw with a finished run."""
    _is_a_run(cfg)
    from lora_dae.sampling.command import draw_samples, request_of

    path = draw_samples(request_of(cfg), console)
    console.print(f"images   {path}", soft_wrap=True, highlight=False)


@hydra.main(version_base="1.3", config_path=CONF, config_name="export")
@_one_sentence
def export(cfg: DictConfig) -> None:
    """``python export.py run=<dir> format=kohya``: a finished run for other programs."""
    _is_a_run(cfg)
    from lora_dae.export.command import ExportRequest, export_run

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    console.print(f"export   {export_run(ExportRequest(**values), console)}", soft_wrap=True, highlight=False)


@hydra.main(version_base="1.3", config_path=CONF, config_name="search")
@_one_sentence
def search(cfg: DictConfig) -> None:
    """``python search.py name=first trials=20``: look for good configurations with Optuna."""
    from lora_dae.sweep.launcher import config_options
    from lora_dae.sweep.report import report_if_any
    from lora_dae.sweep.search import SearchRequest, train_command
    from lora_dae.sweep.search import search as run_search

    request = SearchRequest(**OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    # Trials compose train.py's config, from the same folders.
    folders = [option for option in config_options() if option.startswith("--config-dir")]
    study = run_search(request, console, functools.partial(train_command, options=folders))
    for trial in study.best_trials:
        values = ", ".join(f"{n} {v:.4g}" for n, v in zip(request.objectives, trial.values, strict=True))
        words = " ".join(f"{key}={value}" for key, value in trial.params.items())
        console.print(f"best     trial {trial.number}: {words}  ({values})", soft_wrap=True, highlight=False)
    report_if_any(Path(request.folder))


def cells(list_file: str) -> None:
    """One process of ``python -m lora_dae.sweep.compare``: measure the cells of a list."""
    from lora_dae.sweep.cell_worker import measure_cells

    _one_sentence(lambda _: measure_cells(Path(list_file), console))(DictConfig({}))


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
@_one_sentence
def evaluate(cfg: DictConfig) -> None:
    """``python evaluate.py run=<dir>``, ``images=<dir> reference=<dir>`` or ``runs=[<dir>,<dir>]``: measure."""
    _is_a_run(cfg)
    from lora_dae.evaluation.command import EvaluateRequest
    from lora_dae.evaluation.command import evaluate as run_evaluation
    from lora_dae.training.page_log import page_logger

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    request = EvaluateRequest(**values)
    run_evaluation(request, console, page_logger(TrackingConfig(**request.tracking), console))
