"""Going on with a training: where from, whether it fits, also on another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lora_dae.config import Config, ConfigError, from_dict, to_dict

STAGES = ("adapter", "texture", "decoder", "gain")  # in the order in which they train
OF_MODULE = (
    "enabled",
    "gain",
    "texture",
    "decoder",
    "levels",
    "hidden",
    "gate_inputs",
    "joint",
)  # what its parameters depend on


def find_checkpoints(cfg: Config, run_dir: Path) -> dict[str, Path]:
    """Which stages can go on from where; ``ckpt_path=last`` looks into the run folder."""
    if cfg.ckpt_path is None:
        return {}
    if cfg.ckpt_path == "last":
        found = {s: run_dir / "checkpoints" / f"{s}.ckpt" for s in STAGES}
        found = {s: p for s, p in found.items() if p.is_file()}
        if not found:
            raise ConfigError(
                f"ckpt_path=last found no checkpoint in {run_dir / 'checkpoints'}: give the run folder to go on "
                "with as hydra.run.dir=<run folder>."
            )
    else:
        path = Path(cfg.ckpt_path)
        if not path.is_file():
            raise ConfigError(f"ckpt_path={path} does not exist: give a .ckpt file, or last.")
        found = {next((s for s in STAGES if path.stem.startswith(s)), "adapter"): path}
    saved = next(iter(found.values())).parent.parent / "config.yaml"
    if saved.is_file():
        before = to_dict(from_dict(OmegaConf.to_container(OmegaConf.load(saved))))  # type: ignore[arg-type]
        now = to_dict(cfg)
        for plain in (before, now):
            del plain["backbone"]["attention"]  # how it computes may change
            own = plain["enhancement"]
            plain["enhancement"] = {name: own[name] for name in OF_MODULE}
        for key in ("adapter", "backbone", "conditioning", "enhancement"):
            if before[key] != now[key]:
                raise ConfigError(
                    f"{next(iter(found.values()))} was written with another `{key}` than this run's: resume with "
                    "the same overrides, or start anew without ckpt_path."
                )
    return found


def read_run_config(run_dir: Path) -> Config:
    """The config that a run was started with."""
    return from_dict(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))  # type: ignore[arg-type]


def align_progress(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let Lightning's count of batches in a checkpoint be that of its optimizer steps, in place.

    A run goes on after its last optimizer step: half-accumulated gradients are in no checkpoint, and on another
    number of processes a step may take another number of batches. Lightning would start in the middle of a step.
    """
    batches = checkpoint["global_step"] * accumulate
    for counts in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
        if isinstance(counts, dict):  # of this epoch, and of all
            behind = counts["ready"] - counts["completed"]  # 1 in a checkpoint that was written at a batch's end
            counts |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - behind}
