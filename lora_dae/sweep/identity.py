"""What a training depends on, as a content hash: two configs of one hash train to the same weights.

Strength, sampling, evaluation, tracking, folders and what NOT_TRAINING_IN names are left out, so that a sweep over them
trains once. Some ways of computing the same thing count (backbone.gradient_checkpointing, data.cache, adapter.kernel):
to leave them out now would lose all that was trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_dae.config import LOSSES, Config, from_dict, to_dict

TRAINING_VERSION = 5  # raise it when the same config begins to train to other weights
ENHANCEMENT_VERSION = 6  # raise it when the same config begins to give another enhancement on the same adapter

NOT_TRAINING = ("name", "run_dir", "ckpt_path", "store", "sampling", "evaluation", "tracking")
NOT_TRAINING_IN = {
    "backbone": ("attention",),
    "data": ("cache_dir", "test_size"),
    "enhancement": ("strength",),
    "trainer": (
        "accelerator", "strategy", "log_every_n_steps", "val_check_interval", "limit_val_batches",
        "enable_progress_bar", "benchmark", "profiler",
    ),
}  # fmt: skip
# Options that came later: at the value that does nothing they are left out, and what was trained before is found.
LATER: dict[str, dict[str, Any]] = {
    "data": {"missing_source": "error"},
    "objective": {"low_resolution_share": 0.0, "token_share": 1.0},
    "optimizer": {"source_learning_rate": None},
    "enhancement": {
        "gate_inputs": "energy",
        "losses": list(LOSSES),
        "joint": False,
        "registered": False,
        "judged_guidance": [],
        "judged_steps": 0,
    },
}
NOT_DRAWING = ("batch_size", "method", "method_options", "tiled_decode")


def training_part(cfg: Config) -> dict[str, Any]:
    """The values that the trained weights depend on, as plain data. ``cfg`` is a checked one, of ``from_dict``."""
    values = {key: value for key, value in asdict(cfg).items() if key not in NOT_TRAINING}
    for group, names in NOT_TRAINING_IN.items():
        values[group] = {key: value for key, value in values[group].items() if key not in names}
    for group, defaults in LATER.items():
        values[group] = {k: v for k, v in values[group].items() if k not in defaults or v != defaults[k]}
    if cfg.conditioning == "none":
        values["optimizer"].pop("source_learning_rate", None)
    if cfg.trainer.get("early_stop_patience") is None:
        values["trainer"].pop("early_stop_patience", None)
    else:  # then training ends where validation says so
        values["trainer"] |= {key: cfg.trainer.get(key) for key in ("val_check_interval", "limit_val_batches")}
        if cfg.data.buckets:  # a few batches are of all sizes since
            values["trainer"]["validated"] = 2
    if cfg.objective.prior_weight > 0:  # the backbone's own pictures are drawn before the first step
        values["sampling"] = {key: value for key, value in asdict(cfg.sampling).items() if key not in NOT_DRAWING}
    else:
        for name in ("prior_weight", "prior_images", "prior_caption"):
            del values["objective"][name]
    if not cfg.enhancement.enabled or cfg.enhancement.placement == "none":
        values["enhancement"] = None  # there is no module to train
    else:
        values["enhancement"]["version"] = ENHANCEMENT_VERSION
        if cfg.data.buckets and cfg.enhancement.texture and cfg.conditioning == "source":
            values["enhancement"]["trust"] = 2  # judged in the frames that are drawn since
        if cfg.enhancement.gain and cfg.enhancement.texture and cfg.conditioning == "source":
            values["enhancement"]["judged"] = 2  # by fidelity as well since
        if cfg.enhancement.placement == "direction":  # its gain learned on the other placement before
            values["enhancement"]["direction"] = 1
    return values


def content_hash(values: Any) -> str:
    """16 hex digits of plain data; the order of keys does not matter."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def training_key(cfg: DictConfig) -> str:
    """The hash of a composed config alone, for the launcher: jobs of one key train the same thing.

    Knows nothing of photos and weights behind the paths; those are in ``training_hash``.
    """
    return content_hash(training_part(_typed(cfg)))


def inputs_of(cfg: DictConfig) -> dict[str, str]:
    """What a job with this composed config would train and be measured on now, for the launcher.

    A finished job's ``trained.json`` says the same of itself. Raises ConfigError where something is not there.
    """
    return inputs(_typed(cfg))


def inputs(cfg: Config) -> dict[str, str]:
    """The hash of a run's training, and of the photos that it is measured on."""
    photos, backbone = _fingerprints(json.dumps({key: to_dict(cfg)[key] for key in ("data", "backbone")}))
    return {"hash": training_hash(cfg, photos, backbone), "measured_on": photos[cfg.evaluation.split]}


@functools.cache  # the jobs of a sweep share most of it
def _fingerprints(sections: str) -> tuple[dict[str, str], str]:
    from lora_dae.backbone.layout import inspect_backbone
    from lora_dae.data.sources import load_splits

    cfg = from_dict({"run_dir": "", **json.loads(sections)})
    splits, backbone = load_splits(cfg.data), inspect_backbone(cfg.backbone, cfg.data.resolution)
    return {name: split.fingerprint for name, split in splits.items()}, backbone.fingerprint()


def _typed(cfg: DictConfig) -> Config:
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    plain["run_dir"] = ""  # an interpolation that only a started job can resolve
    return from_dict(OmegaConf.to_container(OmegaConf.create(plain), resolve=True))  # type: ignore[arg-type]


def training_hash(cfg: Config, photos: Mapping[str, str], backbone_fingerprint: str) -> str:
    """The hash under which a finished training is kept: config, photos and frozen weights, wherever they lie.

    ``photos``: fingerprints of the splits by name. Validation photos end trainings early, and judge the enhancement;
    the studio's are told by the config.
    """
    config = training_part(cfg)
    config["data"].pop("root")
    config["backbone"].pop("path")
    if cfg.adapter.init_from is not None:  # what it holds, not where it lies
        from lora_dae.adapter.initial import check_file  # torch and diffusers: the launcher knows this module too

        check_file(cfg.adapter.init_from)
        config["adapter"]["init_from"] = hashlib.sha256(Path(cfg.adapter.init_from).read_bytes()).hexdigest()
    return content_hash(
        {
            "version": TRAINING_VERSION,
            "config": config,
            "data": photos["train"] if cfg.data.name == "studio" else [photos["train"], photos["val"]],
            "backbone": backbone_fingerprint,
        }
    )
