"""Configs for tests: composed from conf/ like the commands do, shortened to seconds."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

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
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose(
            "train",
            [
                f"run_dir={run_dir}",
                f"data.cache_dir={cache}",
                f"backbone.path={backbone}",
                *[f for f in SHORT if f.split("=")[0] not in {o.split("=")[0] for o in overrides}],
                *overrides,
            ],
        )
    return typed(cfg)
