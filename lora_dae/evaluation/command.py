"""``evaluate.py``: a finished run, anybody's folder of pictures, or several methods beside each other."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_dae.backbone.precision import best_device, draws_in_bf16
from lora_dae.config import Config, ConfigError, EvaluationConfig, overridden, overridden_sampling, to_dict
from lora_dae.evaluation.compare_runs import CompareRequest, compare_runs
from lora_dae.evaluation.folder_run import FolderRequest, evaluate_folder
from lora_dae.evaluation.heldout import enlarged
from lora_dae.evaluation.photo_mode import NOISE_STRENGTH, PhotoMode, photo_mode
from lora_dae.evaluation.report.page import OnPage, override
from lora_dae.evaluation.run import evaluate_run
from lora_dae.rules import check, check_evaluation
from lora_dae.sampling.finished import read_config

LONGEST_NAME = 100  # characters of a folder that is named by what differs
OF_DRAWN = ("split", "num_samples", "clip")
OF_SAMPLING = (
    "scheduler", "sampling_method", "num_inference_steps", "guidance_scale", "source_guidance_scale", "batch_size",
    "tiled_decode",
)  # fmt: skip
OF_RUN = ("strength", *OF_SAMPLING, "frozen", "first_pair", "wrong_source", "reconstructions")
OF_FOLDER = ("reference", "train", "masks", "paired", "resolution", "cache_dir")
OF_COMPARISON = ("baseline", "vqa", "study")
MODELS = ("lpips", "clip", "dinov2", "cmmd")  # null means the run's own, so that "none" leaves one out


@dataclass
class EvaluateRequest:
    """The keys of conf/evaluate.yaml."""

    run: str | None
    images: str | None
    runs: list[str] | None
    reference: str | None
    masks: str | None
    train: str | None
    paired: bool | None
    resolution: int | None
    baseline: str | None
    vqa: str | None
    study: str | None
    strength: float | None
    seed: int | None
    scheduler: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    source_guidance_scale: float | None
    sampling_method: str | None
    batch_size: int | None
    tiled_decode: bool | None
    mode: str | None
    noise_strength: float | None
    split: str | None
    num_samples: int | None
    first_pair: int | None
    wrong_source: bool | None
    reconstructions: bool | None
    features: str | None
    frozen: bool | None
    bootstrap: int | None
    lpips: str | None
    dists: bool | None
    clip: str | None
    clean_fid: bool | None
    dinov2: str | None
    cmmd: str | None
    controls: bool | None
    cache_dir: str | None
    output: str | None
    tracking: dict[str, Any]  # for ``on_page``: where else the page goes


def evaluate(request: EvaluateRequest, console: Console, on_page: OnPage | None = None) -> None:
    """Carry out a request. Raises ConfigError, before any weight is loaded where that is possible."""
    if request.split not in (None, "test", "val"):
        raise ConfigError(f"split={request.split} is unknown: use test or val.")
    modes = [name for name in ("run", "images", "runs") if getattr(request, name)]
    if len(modes) != 1:
        raise ConfigError(
            "give one of run=<run folder>, images=<folder> reference=<folder>, runs=[<run>,<run>]"
            + (f", not {' and '.join(modes)} together." if modes else ".")
        )
    for mode, options in (("run", OF_RUN), ("images", OF_FOLDER), ("runs", OF_COMPARISON)):
        for option in options:
            if mode != modes[0] and getattr(request, option) is not None:
                raise ConfigError(f"{option} belongs to {mode}=, not to {modes[0]}=: leave it out.")
    for option in OF_DRAWN:
        if modes[0] == "images" and getattr(request, option) is not None:
            raise ConfigError(f"{option} needs prompts, which images= does not have: leave it out.")
    if modes[0] != "images" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{modes[0]}= draws in one process, and each of these would draw all: leave torchrun out.")
    given = photo_mode(request.mode, request.noise_strength)
    if given is not None and modes[0] == "images":
        raise ConfigError(f"mode={given.name} draws from real photos: give run= or runs= to draw with, not images=.")
    {"run": _run, "images": _folder, "runs": _compare}[modes[0]](request, console, on_page)


def _run(request: EvaluateRequest, console: Console, on_page: OnPage | None) -> None:
    run_dir = Path(str(request.run))
    own = read_config(run_dir)
    cfg = requested(own, request)
    check(cfg, trains=False)
    check_evaluation(cfg.evaluation)
    if request.strength and not (own.enhancement.enabled and own.enhancement.placement != "none"):
        raise ConfigError(f"run={run_dir} was trained without enhancement: leave strength out, or give 0.")
    mode = photo_mode(request.mode, request.noise_strength)
    output = folder_of(run_dir, own, cfg, mode) if request.output is None else Path(request.output)
    if output != run_dir:
        console.print(f"other settings than the run's own: its report stays, this one goes to {output}", soft_wrap=True)
    bf16 = draws_in_bf16(cfg, best_device())
    evaluate_run(
        run_dir,
        console,
        cfg=cfg,
        bf16=bf16,
        output=output,
        command=command_of(request),
        mode=mode,
        on_page=on_page,
    )


def _folder(request: EvaluateRequest, console: Console, on_page: OnPage | None) -> None:
    if request.reference is None:
        raise ConfigError("images= needs reference=<folder of real photos>: what should they be measured against?")
    cfg = measured(EvaluationConfig(), request)
    check_evaluation(cfg)
    images = Path(str(request.images))
    folder = FolderRequest(
        images=images,
        reference=Path(request.reference),
        train=None if request.train is None else Path(request.train),
        masks=None if request.masks is None else Path(request.masks),
        paired=bool(request.paired),
        resolution=request.resolution,
        cache_dir=Path(request.cache_dir or "cache"),
        seed=request.seed or 0,
        output=Path(request.output or f"evaluations/{images.resolve().name}"),
        command=command_of(request),
    )
    evaluate_folder(folder, cfg, console, on_page)


def _compare(request: EvaluateRequest, console: Console, on_page: OnPage | None) -> None:
    if isinstance(request.runs, str):  # else each letter would be a method
        raise ConfigError(f"runs={request.runs} is no list: write runs=[{request.runs}].")
    cfg = measured(EvaluationConfig(), request)
    check_evaluation(cfg)
    mode = photo_mode(request.mode, request.noise_strength)
    comparison = CompareRequest(
        runs=list(request.runs or []),
        baseline=request.baseline,
        split=request.split or "test",
        vqa=None if request.vqa is None else Path(request.vqa),
        study=None if request.study is None else Path(request.study),
        seed=request.seed or 0,
        output=Path(request.output or "evaluations/comparison" + ("" if mode is None else f",mode={mode.name}")),
        command=command_of(request),
        mode=mode,
        num_samples=request.num_samples,
    )
    compare_runs(comparison, cfg, console, on_page)


def requested(own: Config, request: Any) -> Config:
    """The run's config with the request's numbers, where given; the studio renders as many pairs as are asked for."""
    sampling, evaluation = overridden_sampling(own.sampling, request), measured(own.evaluation, request)
    cfg = replace(own, sampling=sampling, evaluation=evaluation)
    if request.num_samples is not None or request.first_pair is not None:
        last = evaluation.first_pair + evaluation.num_samples
        cfg = replace(cfg, data=enlarged(own.data, evaluation.split, last))
    if request.strength is not None:
        cfg = replace(cfg, enhancement=replace(cfg.enhancement, strength=request.strength))
    return cfg


def measured(own: EvaluationConfig, request: Any) -> EvaluationConfig:
    """``own`` with the request's values, where given; models that it calls "none" are left out."""
    cfg = overridden(own, request)
    without: dict[str, Any] = {name: None for name in MODELS if getattr(cfg, name) == "none"}
    return replace(cfg, **without)


def folder_of(run_dir: Path, own: Config, cfg: Config, mode: PhotoMode | None = None) -> Path:
    """The run's own folder for its own settings; for others ``evaluations/<what differs>`` inside it.

    So that an evaluation with another guidance never stands where the run's own numbers are looked for. How many
    pictures are drawn at once makes no difference to them.
    """
    before, now = to_dict(own), to_dict(cfg)
    words = [] if mode is None else [f"mode={mode.name}"]
    if mode is not None and mode.noise_strength not in (None, NOISE_STRENGTH):
        words.append(f"noise_strength={mode.noise_strength:g}")
    for part in ("enhancement", "sampling", "evaluation"):
        for key, value in now[part].items():
            if value != before[part][key] and key != "batch_size":
                said = str(value).lower() if value is None or isinstance(value, bool) else value
                words.append(f"{key}={Path(said).stem if isinstance(said, str) else said}")
    if not words:
        return run_dir
    name = ",".join(words)
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}~{hashlib.blake2b(repr(now).encode(), digest_size=4).hexdigest()}"
    return run_dir / "evaluations" / name


def command_of(request: EvaluateRequest) -> str:
    """The command that makes the same page again."""
    given = {field.name: getattr(request, field.name) for field in fields(request) if field.name != "tracking"}
    words = [override(name, value) for name, value in given.items() if value is not None]
    return " ".join(["python evaluate.py", *words])
