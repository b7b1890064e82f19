"""Going on with a training: where from, whether it fits, also on another number of processes."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from omegaconf import OmegaConf

from lora_dae.config import Config, ConfigError, from_dict, to_dict
from lora_dae.data.pair import PairDataset
from lora_dae.training.trainer import adapter_steps

ORIGIN = "origin"  # its key in a checkpoint
STAGES = ("adapter", "texture", "decoder", "gain")  # in the order in which they train
PLAIN = re.compile(r"[A-Za-z0-9_@%+:./-]+")  # a path that means itself to a shell and to Hydra
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
COMPUTES_THE_SAME = (("backbone", "attention"), ("backbone", "gradient_checkpointing"), ("adapter", "kernel"))


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
            for group, name in COMPUTES_THE_SAME:
                del plain[group][name]
            del plain["backbone"]["path"], plain["adapter"]["init_from"]  # what they hold counts: see check_origin
            own = plain["enhancement"]
            trains = own["enabled"] and own["placement"] != "none"  # as identity.training_part has it
            plain["enhancement"] = {name: own[name] for name in OF_MODULE} if trains else None
        rates = [plain["optimizer"]["source_learning_rate"] for plain in (before, now)]
        if now["conditioning"] == "source" and rates.count(None) == 1:  # layers in other groups of the optimizer
            raise ConfigError(
                f"{next(iter(found.values()))} was trained with optimizer.source_learning_rate="
                f"{'null' if rates[0] is None else rates[0]}: give the same to go on with it."
            )
        for key in ("adapter", "backbone", "conditioning", "enhancement"):
            if before[key] != now[key]:
                raise _another(next(iter(found.values())), key)
    return found


def check_steps(cfg: Config, checkpoints: Mapping[str, Path]) -> None:
    """Raises ConfigError where more steps of the adapter are asked for than those that later stages trained on."""
    path, asked = checkpoints.get("adapter"), adapter_steps(cfg)
    if path is None or len(checkpoints) == 1 or cfg.trainer.get("early_stop_patience") is not None:
        return
    done = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"]
    if done < asked:
        raise ConfigError(
            f"the adapter of {path} ended at step {done}, and later stages went on from there: to train it on to "
            f"trainer.max_steps={asked}, and them anew, give ckpt_path={path}."
        )


def origin(cfg: Config, backbone: str, splits: Mapping[str, PairDataset]) -> dict[str, str | None]:
    """What a training begins with, by content: fingerprints of ``backbone``, train and val, and init_from's hash."""
    begun = cfg.adapter.init_from
    init_from = None if begun is None else hashlib.sha256(Path(begun).read_bytes()).hexdigest()
    photos = {f"data.{name}": splits[name].fingerprint for name in ("train", "val")}
    return {"backbone": backbone, "adapter.init_from": init_from, **photos}


def check_origin(checkpoints: Mapping[str, Path], now: Mapping[str, str | None]) -> None:
    """Raises ConfigError where a checkpoint's training began with other weights or data than ``now``.

    Older ones do not say; on other data a trained photo could become one to test on.
    """
    for path in checkpoints.values():
        told = torch.load(path, map_location="cpu", mmap=True, weights_only=True).get(ORIGIN) or {}
        for key in now:
            if key not in told or told[key] == now[key]:
                continue
            if key.startswith("data."):
                raise ConfigError(
                    f"{path} was trained on other photos, captions or splits ({key} differs): give it the data and "
                    "data.* that it had, or start anew without ckpt_path (adapter.init_from begins with its LoRA)."
                )
            raise _another(path, key)


class KeepOrigin(Callback):
    """Writes the training's ``origin`` into its checkpoints; ConfigError where it is not the same on all processes."""

    def __init__(self, own: Mapping[str, str | None]) -> None:
        self.own = dict(own)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        alike = trainer.strategy.broadcast(self.own) == self.own
        if not trainer.strategy.reduce_boolean_decision(alike):
            raise ConfigError(
                "the processes of this training do not see the same photos, captions, splits or weights: give each "
                "machine the same files under data.root, backbone.path and adapter.init_from."
            )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[ORIGIN] = self.own


def _another(path: Path, key: str) -> ConfigError:
    return ConfigError(
        f"{path} was written with another `{key}` than this run's: resume with the same overrides, or start anew "
        "without ckpt_path."
    )


def run_dir_override(run_dir: Path) -> str:
    """``hydra.run.dir=...`` as a user types it: the shell's quotes around Hydra's, where the path needs them."""
    if PLAIN.fullmatch(str(run_dir)):
        return f"hydra.run.dir={run_dir}"
    escaped = str(run_dir).replace('"', '\\"')  # the grammar knows no other escape
    return shlex.quote(f'hydra.run.dir="{escaped}"')


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
