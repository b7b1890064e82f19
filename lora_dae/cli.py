"""The three commands: compose the config, call one function, say errors in one sentence."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_dae.config import Config, ConfigError, conf_dir, from_dict, register

# One process draws and trains alone: threads of the tokenizer after a fork would only warn.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
register()
console = Console()
CONF = str(conf_dir())


def _one_sentence(command: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Known errors become one line on stderr and an exit code; anything else keeps its traceback."""

    @functools.wraps(command)
    def wrapped(cfg: DictConfig) -> Any:
        from lora_dae.training.module import NonFiniteLossError
        from lora_dae.training.run import InterruptedRunError

        try:
            return command(cfg)
        except (ConfigError, NonFiniteLossError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except InterruptedRunError as error:
            print(str(error), file=sys.stderr)
            sys.exit(130)

    return wrapped


def typed(cfg: DictConfig) -> Config:
    """The composed config as dataclasses, interpolations resolved."""
    return from_dict(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))  # type: ignore[arg-type]


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
@_one_sentence
def train(cfg: DictConfig) -> None:
    """``python train.py experiment=rank16``: train, export, measure, report."""
    from lora_dae.training.run import run

    run(typed(cfg))


@hydra.main(version_base="1.3", config_path=CONF, config_name="sample")
@_one_sentence
def sample(cfg: DictConfig) -> None:
    """``python sample.py run=<dir> prompt="..."``: draw with a finished run."""
    from lora_dae.sampling.command import SampleRequest, draw_samples

    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    path = draw_samples(SampleRequest(**values), console)
    console.print(f"images   {path}", soft_wrap=True, highlight=False)


@dataclass
class EvaluateRequest:
    run: str
    strength: float | None
    num_samples: int | None
    seed: int | None
    scheduler: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    source_guidance_scale: float | None
    split: str
    lpips: str | None
    dists: bool | None
    clip: str | None
    controls: bool | None


def override_evaluation(cfg: Config, request: EvaluateRequest) -> Config:
    """The run's config with the request's numbers of the evaluation, where given."""
    names = ("num_samples", "lpips", "dists", "clip", "controls")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    return replace(cfg, evaluation=replace(cfg.evaluation, **given))


@hydra.main(version_base="1.3", config_path=CONF, config_name="evaluate")
@_one_sentence
def evaluate(cfg: DictConfig) -> None:
    """``python evaluate.py run=<dir>``: measure a finished run again."""
    from lora_dae.backbone.precision import best_device, choose_precision
    from lora_dae.config import check
    from lora_dae.evaluation.run import evaluate_run
    from lora_dae.sampling.command import override_sampling
    from lora_dae.sampling.load import load_run, read_config

    request = EvaluateRequest(**OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    if request.split not in ("test", "val"):
        raise ConfigError(f"split={request.split} is unknown: use test or val.")
    run_cfg = override_sampling(read_config(Path(request.run)), request)
    if request.strength is not None:
        run_cfg = replace(run_cfg, enhancement=replace(run_cfg.enhancement, strength=request.strength))
    run_cfg = override_evaluation(run_cfg, request)
    check(run_cfg)
    device = best_device()
    loaded = load_run(Path(request.run), device)
    loaded.cfg = run_cfg
    bf16 = choose_precision("auto", device) == "bf16-mixed"
    evaluate_run(Path(request.run), console, split=request.split, run=loaded, bf16=bf16)
