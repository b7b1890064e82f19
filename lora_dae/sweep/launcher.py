"""Runs the jobs of a sweep, each in a fresh process, a few at once; survives whatever happens to any of them.

Why processes: Lightning's DDP starts the script again with the same arguments, which inside a multirun is the whole
sweep; and a job that dies of memory must not take the others with it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.sweep.devices import Devices, named_devices, visible_gpus
from lora_dae.sweep.files import unwritten
from lora_dae.sweep.identity import content_hash
from lora_dae.sweep.jobs import DONE, ELSEWHERE, FAILED, RUNNING, STOPPED, WAITING, Job
from lora_dae.sweep.live import LiveTable
from lora_dae.sweep.locks import try_lock
from lora_dae.sweep.ranks import environment_of_a_job

POLL = 0.2  # seconds between looks at the processes
PATIENCE = 30.0  # seconds between SIGINT and SIGTERM, and again until SIGKILL
OWN_OVERRIDES = ("hydra/launcher", "hydra.launcher.", "hydra.sweep.", "hydra.mode", "hydra/sweeper", "hydra.sweeper.")
CONFIG_OPTIONS = ("config_path", "config_name", "config_dir")
PR_SET_PDEATHSIG = 1


class InterruptedSweepError(RuntimeError):
    """Ctrl-C or SIGTERM; jobs were told to write a checkpoint and stop."""


def launch(
    options: dict[str, Any],
    config: DictConfig,
    hydra_context: HydraContext,
    job_overrides: Sequence[Sequence[str]],
    first: int,
) -> list[JobReturn]:
    """Run every job that is not done yet; one failure stops no other. Exits with 1 at the end if any failed.

    ``options`` are those of conf/hydra/launcher/process.yaml.
    """
    setup_globals()
    console = Console()
    try:
        if OmegaConf.select(config, "hydra.sweeper.max_batch_size") is not None:
            raise ConfigError(  # a failure would end the sweep with its batch
                "hydra.sweeper.max_batch_size is not for this launcher: hydra.launcher.jobs says how many run at once."
            )
        given = {str(override).split("=")[0] for overrides in job_overrides for override in overrides}
        extra = [str(override) for override in options["overrides"] if str(override).split("=")[0] not in given]
        key, inputs = (_named(options[name]) if options[name] else None for name in ("same_work", "inputs"))
        jobs = [
            make_job(config, hydra_context, list(overrides), extra, first + i, key, inputs)
            for i, overrides in enumerate(job_overrides)
        ]
        sweep_dir = Path(str(config.hydra.sweep.dir))
        console.print(f"sweep folder {sweep_dir}: {len(jobs)} jobs", soft_wrap=True, highlight=False)
        names = visible_gpus() if options["devices"] is None else named_devices(options["devices"])
        devices = Devices(int(options["jobs"]), names, chosen=options["devices"] is not None)
        for job in jobs:
            devices.check(job.gpus)  # before any starts
        run_jobs(jobs, lambda job: command(job, config, bool(options["torchrun"])), devices, console)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except InterruptedSweepError:
        print("stopped; the same command goes on where the jobs stopped", file=sys.stderr)
        sys.exit(130)
    failed = [job for job in jobs if job.state != DONE]
    if failed:
        for job in failed:
            print(f"job {job.number} {job.state}: {job.error or 'no error'}; log {job.log}", file=sys.stderr)
        sys.exit(1)
    return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED, _return_value=None) for job in jobs]


def make_job(
    config: DictConfig,
    hydra_context: HydraContext,
    overrides: list[str],
    extra: list[str],
    number: int,
    key: Callable[[DictConfig], str] | None,
    inputs: Callable[[DictConfig], dict[str, str]] | None,
) -> Job:
    """Compose one grid point; what it is follows from its composed config, not from how it was written."""
    composed = hydra_context.config_loader.load_sweep_config(config, [*overrides, *extra])
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = f"job_{number}", number
    directory = Path(str(config.hydra.sweep.dir)) / str(composed.hydra.sweep.subdir)
    task = OmegaConf.create({k: v for k, v in composed.items_ex(resolve=False) if k != "hydra"})
    told = OmegaConf.select(task, "trainer.devices", default=1)
    if OmegaConf.is_list(told):
        raise ConfigError(
            f"trainer.devices={OmegaConf.to_container(told)} in a sweep: give how many, and which ones there are by "
            "hydra.launcher.devices."
        )
    nodes = OmegaConf.select(task, "trainer.num_nodes", default=1)
    if isinstance(nodes, int) and nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={nodes} in a sweep: its jobs have this machine alone; sweep with hydra/launcher="
            f"submitit_slurm hydra.launcher.nodes={nodes}, or give experiments/multi_node.sbatch one run."
        )
    processes = told if isinstance(told, int) and told > 0 else 1
    return Job(
        number=number,
        overrides=[*overrides, *extra],
        label=" ".join(filter_overrides(overrides)),
        directory=directory,
        digest=content_hash(OmegaConf.to_container(task, resolve=False)),
        work=key(task) if key is not None else f"job {number}",
        inputs=partial(inputs, task) if inputs is not None else None,
        processes=processes,
        gpus=0 if OmegaConf.select(task, "trainer.accelerator") == "cpu" else processes,
    )


def command(job: Job, config: DictConfig, torchrun: bool) -> list[str]:
    """The job as a single run of the same script, with a folder of its own."""
    given = [o for o in config.hydra.overrides.hydra if not o.startswith(OWN_OVERRIDES)]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [os.path.abspath(sys.argv[0])]
    distributed = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.processes}"]
    # The mode: a config file may name the sweep's, and the job would be the same sweep once more.
    own = [f"hydra.run.dir={quoted(job.directory)}", "hydra.mode=RUN"]
    arguments = [*config_options(), *job.overrides, *given, *own]
    return [sys.executable, *(distributed if torchrun else []), *script, *arguments]


def config_options() -> list[str]:
    """Hydra's own options that say which configs this sweep composes: its jobs compose the same."""
    told = vars(get_args_parser().parse_args())
    return [f"--{name.replace('_', '-')}={told[name]}" for name in CONFIG_OPTIONS if told[name] is not None]


def quoted(value: Path | str) -> str:
    """A value of a Hydra override: commas, equals signs and brackets mean something there."""
    escaped = str(value).replace('"', '\\"')  # the grammar knows no other escape
    return f'"{escaped}"'


def run_jobs(jobs: list[Job], make_command: Callable[[Job], list[str]], devices: Devices, console: Console) -> None:
    """Start, watch and end the jobs' processes. Raises InterruptedSweepError on Ctrl-C and SIGTERM."""
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        with LiveTable(jobs, console) as live:
            for job in jobs:
                job.finished_before()
            while any(job.state in (WAITING, RUNNING, ELSEWHERE) for job in jobs):
                for job in jobs:
                    if job.state in (WAITING, ELSEWHERE) and may_start(job, jobs):
                        _start(job, jobs, make_command, devices)
                    elif job.state == RUNNING:
                        _look(job, devices)
                live.update()
                time.sleep(POLL)
            live.update()
    except KeyboardInterrupt as error:
        raise InterruptedSweepError from error
    finally:
        _stop([job for job in jobs if job.state == RUNNING])
        signal.signal(signal.SIGTERM, previous)


def may_start(job: Job, jobs: Sequence[Job]) -> bool:
    """Whether no other job is just training the same: then waiting is cheaper than a second process."""
    same = [other for other in jobs if other.work == job.work and other is not job]
    return any(other.state == DONE for other in same) or not any(other.state == RUNNING for other in same)


def at_once(jobs: Sequence[Job]) -> int:
    """How many of them can still run side by side: one of those that would train the same, until that is done."""
    left = [job for job in jobs if job.state in (WAITING, RUNNING, ELSEWHERE)]
    trained = {job.work for job in jobs if job.state == DONE}
    return sum(job.work in trained for job in left) + len({job.work for job in left} - trained)


def _start(job: Job, jobs: Sequence[Job], make_command: Callable[[Job], list[str]], devices: Devices) -> None:
    taken = devices.take(job.gpus)
    if taken is None:
        return
    environment = {**environment_of_a_job(), **devices.environment(taken, job.processes, at_once(jobs))}
    try:
        job.lock = try_lock(job.directory / ".job.lock")
        if job.lock is None:  # the same sweep on another machine has it
            job.state = ELSEWHERE
        elif not job.finished_before():  # nor had it
            job.devices, job.state, job.started = taken, RUNNING, time.time()
            job.save()
            job.process = _process(job, make_command(job), environment)
            return
    except (ConfigError, OSError) as error:  # with what is this job's own: the others go on
        job.state = FAILED
        job.error = unwritten(error, job.directory) if isinstance(error, OSError) else str(error)
    devices.give_back(taken)
    _release(job)


def _process(job: Job, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with job.log.open("ab") as log:
        job.log_start = log.tell()
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=die_with_parent() if sys.platform == "linux" else None,
        )  # fmt: skip


def _look(job: Job, devices: Devices) -> None:
    assert job.process is not None
    code = job.process.poll()
    if code is None:
        return
    end_group(job.process)
    job.end(code)
    devices.give_back(job.devices)
    _release(job)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a process that has ended left in its group: Lightning's other ranks, which would keep their GPUs.

    W&B's service, which may still upload, has a session of its own, and so have torchrun's workers, which it ends.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _release(job: Job) -> None:
    if job.lock is not None:
        job.lock.release()


def _stop(running: list[Job]) -> None:
    """Ask for a checkpoint and an end; insist after a while."""
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for job in running:
            if job.process is not None and job.process.poll() is None:
                os.killpg(job.process.pid, sent)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(j.process is not None and j.process.poll() is None for j in running):
            time.sleep(POLL)
    for job in running:
        if job.process is not None:
            code = job.process.wait()
            end_group(job.process)
            job.end(code)
            job.state = STOPPED if job.state == FAILED else job.state
            job.note()
        _release(job)


def die_with_parent() -> Callable[[], None]:
    """For the child, between fork and exec: if the launcher is killed, finish the step, write a checkpoint, end."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a sweep in the background was told to ignore it
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGINT))

    return ask


def _raise_interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _named(dotted: str) -> Callable[..., Any]:
    """A function by its dotted name."""
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
