"""Configs for tests: composed from conf/ like the commands do, shortened to seconds."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from lora_dae.cli import typed
from lora_dae.config import Config, conf_dir, register

# Small enough for seconds, large enough that every part of a run does something.
SHORT = [
    "data.resolution=64",
    "data.train_size=24",
    "data.val_size=6",
    "data.test_size=6",
    "data.batch_size=4",
    "trainer.max_steps=4",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "optimizer.warmup_steps=1",
    "enhancement.max_steps=1",
    "enhancement.batch_size=2",
    "enhancement.texture_steps=2",
    "enhancement.texture_batch_size=4",
    "enhancement.decoder_steps=2",
    "enhancement.steps_range=[2,3]",
    "enhancement.judged_steps=2",
    "sampling.num_inference_steps=2",
    "evaluation.num_samples=4",
    "evaluation.bootstrap=20",
    "evaluation.controls=false",
    "tracking.wandb=disabled",
    "tracking.sample_every_n_steps=0",
    "backbone.attention=plain",
]


def config(backbone: Path, run_dir: Path, cache: Path, *overrides: str) -> Config:
    """The composed, typed config of a shortened run."""
    own = [f"data.cache_dir={cache}", f"backbone.path={backbone}"]
    given = [_parsed(o) for o in (*own, *SHORT, *overrides)]
    values = [o for o in given if "." in o.key_or_group and o.type is OverrideType.CHANGE and o.package is None]
    cfg = deepcopy(_composed(tuple(str(o.input_line) for o in given if o not in values)))
    for override in values:  # as Hydra does, after all groups
        OmegaConf.update(cfg, override.key_or_group, override.value())
    cfg.run_dir = str(run_dir)
    return typed(cfg)


@cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_overrides([override])[0]


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Of what is no value of a group's: to compose takes a third of a second, and hundreds of tests do."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", ["run_dir=unused", *overrides])
