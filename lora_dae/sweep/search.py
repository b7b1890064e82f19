"""Optuna over whole runs: ask for a configuration, train and measure it in a process of its own, tell the result.

    <folder>/study.db       every trial (SQLite); the same command goes on with it
    <folder>/<number>/      the run folder of a trial

A trial that was cut off is asked for again with the same values, and its training goes on from its checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.sweep.files import read_json
from lora_dae.sweep.jobs import INPUT_ERROR, last_error
from lora_dae.sweep.launcher import InterruptedSweepError, die_with_parent, end_group, quoted
from lora_dae.sweep.locks import held, try_lock
from lora_dae.sweep.ranks import environment_of_a_job

POLL = 0.2  # seconds
AGAIN = "again"  # user attribute of a trial: the number of the one that was stopped
ASKED = "asked"  # user attribute of a study: what makes its trials' values comparable
STARTUP_TRIALS = 3  # that the median needs before it prunes
DIRECTIONS = ("minimize", "maximize")


@dataclass
class SearchRequest:
    """conf/search.yaml."""

    name: str
    trials: int
    folder: str
    objectives: dict[str, str]
    space: dict[str, dict[str, Any]]
    overrides: list[str]
    pruning: bool
    seed: int


class Pruned(Exception):  # noqa: N818 - an outcome, no error
    """Validation says that this training is not worth its end."""


def check_request(request: SearchRequest) -> None:
    """Raises ConfigError for objectives and spaces that are none, and without Optuna."""
    if request.trials < 1 or not request.objectives or not request.space:
        raise ConfigError("a search needs trials of at least 1, an objective and a space: see conf/search.yaml.")
    for name, direction in request.objectives.items():
        if direction not in DIRECTIONS:
            raise ConfigError(f"objectives.{name}={direction} is unknown: use minimize or maximize.")
    for key, entry in request.space.items():
        range_keys = {"low", "high"} <= set(entry) <= {"low", "high", "log"}
        if set(entry) != {"choice"} and not range_keys:
            raise ConfigError(f"space.{key}={entry} is no space: give choice: [...], or low and high (and log: true).")
        try:
            distribution(entry)
        except ImportError as error:
            raise ConfigError("search.py needs Optuna: pip install 'lora-dae[search]'.") from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"space.{key}={entry} is no space: {str(error).rstrip('.')}.") from error


def distribution(entry: dict[str, Any]) -> Any:
    """Optuna's of an entry of the space. Whole numbers at both ends give whole numbers. Raises ValueError."""
    from optuna import distributions

    if "choice" in entry:
        return distributions.CategoricalDistribution(entry["choice"])
    whole = isinstance(entry["low"], int) and isinstance(entry["high"], int)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(entry["low"], entry["high"], log=entry.get("log", False))


def overrides_of(values: dict[str, Any]) -> list[str]:
    """What Optuna has proposed, as overrides."""
    return [f"{key}={written(value)}" for key, value in values.items()]


def written(value: Any) -> str:
    """A choice as a Hydra override's value. Text that is a value there (``[a,b]``) stays; no comma makes a sweep."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, str):
        return str(value)
    try:
        read = OverridesParser.create().parse_override(f"x={value}")
        meant = not read.is_sweep_override() and read.value() is not None
    except HydraException:
        meant = False
    return value if meant else quoted(value)


def train_command(overrides: list[str], run_dir: Path, options: Sequence[str] = ()) -> list[str]:
    """One trial as a single run that trains nothing twice; a module, which Lightning can start again for rank 1.

    ``options`` of Hydra's own, as ``--config-dir=mine``. Its W&B group is the search's. It is measured on validation
    pairs: what was chosen on test pairs has no honest number on them.
    """
    arguments = [*overrides, f"hydra.run.dir={quoted(run_dir)}"]
    given = {override.split("=")[0] for override in overrides}
    for key, value in (
        ("store", "multirun/store"),
        ("tracking.group", quoted(run_dir.parent.name)),
        ("evaluation.split", "val"),
    ):
        if key not in given:
            arguments.insert(0, f"{key}={value}")
    return [sys.executable, "-m", "lora_dae.training", *options, *arguments]


def search(
    request: SearchRequest, console: Console, make_command: Callable[[list[str], Path], list[str]] = train_command
) -> Any:
    """Run trials until ``request.trials`` have ended; returns the Optuna study.

    Raises ConfigError for a bad request, for a config that train.py refuses, without Optuna, and while another
    process searches in the same folder.
    """
    check_request(request)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(request.folder)
    lock = try_lock(folder / "search.lock")
    if lock is None:
        raise ConfigError(f"another process searches in {folder}: wait for it, or give another name.")
    with held(lock):
        storage = f"sqlite:///{(folder / 'study.db').as_posix()}"
        study = optuna.create_study(
            storage=storage,
            study_name=request.name,
            directions=list(request.objectives.values()),  # type: ignore[arg-type]
            load_if_exists=True,
        )
        if [str(d.name).lower() for d in study.directions] != list(request.objectives.values()):
            raise ConfigError(f"{folder} holds a search with other objectives: give another name.")
        _check_asked(study, request, folder)
        _check_space(study, request.space, folder)  # before a trial is taken up, which would be lost
        # Optuna prunes studies of one objective only; validation loss is one, in a study beside the search.
        validation = optuna.create_study(
            storage=storage, study_name=f"{request.name}-validation", load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(STARTUP_TRIALS, n_warmup_steps=0) if request.pruning
            else optuna.pruners.NopPruner(),
        )  # fmt: skip
        _take_up(study, validation, optuna.trial.TrialState)
        # A sampler that begins anew with the same seed would propose the same values again.
        study.sampler = optuna.samplers.TPESampler(seed=request.seed + len(study.trials))
        while _ended(study, optuna.trial.TrialState) < request.trials:
            _one_trial(study, validation, request, folder, console, make_command)
    return study


def _check_asked(study: Any, request: SearchRequest, folder: Path) -> None:
    """Raises ConfigError where the search was begun with other objectives or overrides: its best would be a mixture."""
    asked = {"objectives": [list(pair) for pair in request.objectives.items()], "overrides": list(request.overrides)}
    told = study.user_attrs.get(ASKED)
    if told is None:
        if not study.trials:  # those of earlier versions do not say what they were asked for
            study.set_user_attr(ASKED, asked)
        return
    for name, value in asked.items():
        if told[name] != value:
            raise ConfigError(f"{folder} holds a search with other {name}: give another name.")


def _check_space(study: Any, space: dict[str, dict[str, Any]], folder: Path) -> None:
    """Raises ConfigError where a choice or a kind of number is not what it was; a range may grow, and keys be added."""
    from optuna.distributions import check_distribution_compatibility

    for trial in study.trials:
        for key in trial.distributions.keys() & space.keys():
            try:
                check_distribution_compatibility(trial.distributions[key], distribution(space[key]))
            except ValueError as error:
                raise ConfigError(
                    f"{folder} holds a search in another space ({key} differs): give another name."
                ) from error


def _take_up(study: Any, validation: Any, states: Any) -> None:
    """Trials that a killed search left running end as failed and are asked for again."""
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params, user_attrs={AGAIN: trial.number})
    for trial in validation.get_trials(states=(states.RUNNING,)):
        validation.tell(trial.number, state=states.FAIL)


def _ended(study: Any, states: Any) -> int:
    return len(study.get_trials(states=(states.COMPLETE, states.PRUNED)))


def _one_trial(
    study: Any,
    validation: Any,
    request: SearchRequest,
    folder: Path,
    console: Console,
    make_command: Callable[[list[str], Path], list[str]],
) -> None:
    import optuna

    trial = study.ask({key: distribution(entry) for key, entry in request.space.items()})
    overrides, watched = overrides_of(trial.params), validation.ask()
    run_dir = folder / str(trial.number)
    run_dir.mkdir(parents=True, exist_ok=True)
    states = optuna.trial.TrialState
    try:
        code = _run(make_command([*request.overrides, *overrides], run_dir), run_dir, watched)
    except Pruned as pruned:
        study.tell(trial, state=states.PRUNED)
        validation.tell(watched, state=states.PRUNED)
        words = f"pruned: {pruned}"
    else:
        loss = _last_reported(validation, watched.number)
        validation.tell(watched, loss, state=states.COMPLETE if loss is not None else states.FAIL)
        if code != 0:
            study.tell(trial, state=states.FAIL)
            error = last_error(run_dir / "job.log") or f"exit code {code}"
            if code == INPUT_ERROR or _failures_in_a_row(study, states) >= STARTUP_TRIALS:
                raise ConfigError(f"trial {trial.number} ({' '.join(overrides)}) failed: {error}")
            words = f"failed: {error}"
        else:
            values = read_objectives(run_dir, list(request.objectives))
            study.tell(trial, values)
            words = ", ".join(f"{n} {v:.4g}" for n, v in zip(request.objectives, values, strict=True))
    console.print(
        f"trial {trial.number}  {' '.join(overrides)}  {words}", soft_wrap=True, highlight=False, markup=False
    )


def _run(command: list[str], run_dir: Path, watched: Any) -> int:
    """The exit code of a trial's process; ends it and raises Pruned when its validation loss says so."""
    with (run_dir / "job.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment_of_a_job(), preexec_fn=die_with_parent() if sys.platform == "linux" else None,
        )  # fmt: skip
    told: set[int] = set()
    try:
        ended = False
        while not ended:
            time.sleep(POLL)
            ended = process.poll() is not None  # and one more look at what it said last
            for step, loss in read_json(run_dir / "status.json").get("validated", {}).items():
                if int(step) not in told:
                    told.add(int(step))
                    watched.report(float(loss), int(step))
                    if watched.should_prune():
                        raise Pruned(f"validation loss {loss:.4g} at step {step}")
        return process.returncode
    except KeyboardInterrupt as error:
        raise InterruptedSweepError from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        end_group(process)


def _last_reported(validation: Any, number: int) -> float | None:
    """The last validation loss that ``_run`` saw: later stages of the run say other things in its status file.

    None where there was none, or one that is not finite, which Optuna does not take.
    """
    seen = validation.trials[number].intermediate_values
    last = float(seen[max(seen)]) if seen else math.nan
    return last if math.isfinite(last) else None


def _failures_in_a_row(study: Any, states: Any) -> int:
    stopped = {trial.user_attrs.get(AGAIN) for trial in study.trials}  # with the search, not by themselves
    count = 0
    for trial in reversed(study.trials):
        if trial.state not in (states.FAIL, states.WAITING):
            break
        count += trial.state == states.FAIL and trial.number not in stopped
    return count


def read_objectives(run_dir: Path, names: list[str]) -> list[float]:
    """The measured values of a run at its own strength. Raises ConfigError where one was not measured.

    Texture is measured inside the garment where photos have masks: ``lsd`` is ``lsd_garment`` there.
    """
    methods = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))["methods"]
    strength = float(OmegaConf.load(run_dir / "config.yaml").enhancement.strength)
    row = methods.get(f"strength {strength:g}", methods["strength 0"])
    found = {name: row.get(name, row.get(f"{name}_garment", {})).get("value") for name in names}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ConfigError(f"objectives.{missing[0]} was not measured: use some of {', '.join(row)}.")
    return [float(found[name]) for name in names]
