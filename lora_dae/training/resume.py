"""Going on with a training: where from, whether it fits, also on another number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from omegaconf import OmegaConf

from lora_dae.config import Config, ConfigError, from_dict, to_dict

ORIGIN = "origin"  # its key in a checkpoint
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
            del plain["backbone"]["path"], plain["adapter"]["init_from"]  # what they hold counts: see check_origin
            own = plain["enhancement"]
            trains = own["enabled"] and own["placement"] != "none"  # as identity.training_part has it
            plain["enhancement"] = {name: own[name] for name in OF_MODULE} if trains else None
        for key in ("adapter", "backbone", "conditioning", "enhancement"):
            if before[key] != now[key]:
                raise _another(next(iter(found.values())), key)
    return found


def check_steps(cfg: Config, checkpoints: Mapping[str, Path]) -> None:
    """Raises ConfigError where more steps of the adapter are asked for than those that later stages trained on."""
    path, asked = checkpoints.get("adapter"), int(cfg.trainer.get("max_steps", 500))
    if path is None or len(checkpoints) == 1 or cfg.trainer.get("early_stop_patience") is not None:
        return
    done = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    if done < asked:
        raise ConfigError(
            f"the adapter of {path} ended at step {done}, and later stages went on from there: to train it on to "
            f"trainer.max_steps={asked}, and them anew, give ckpt_path={path}."
        )


def origin(cfg: Config, backbone: str) -> dict[str, str | None]:
    """What a training begins with, by content: the fingerprint of its ``backbone``, and init_from's hash."""
    begun = cfg.adapter.init_from
    init_from = None if begun is None else hashlib.sha256(Path(begun).read_bytes()).hexdigest()
    return {"backbone": backbone, "adapter.init_from": init_from}


def check_origin(checkpoints: Mapping[str, Path], now: Mapping[str, str | None]) -> None:
    """Raises ConfigError where a checkpoint's training began with other weights than ``now``; older ones do not say."""
    for path in checkpoints.values():
        told = torch.load(path, map_location="cpu", mmap=True, weights_only=True).get(ORIGIN)
        for key in () if told is None else now:
            if told[key] != now[key]:
                raise _another(path, key)


class KeepOrigin(Callback):
    """Writes the training's ``origin`` into its checkpoints."""

    def __init__(self, own: Mapping[str, str | None]) -> None:
        self.own = dict(own)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[ORIGIN] = self.own


def _another(path: Path, key: str) -> ConfigError:
    return ConfigError(
        f"{path} was written with another `{key}` than this run's: resume with the same overrides, or start anew "
        "without ckpt_path."
    )


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
