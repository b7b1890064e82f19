"""Lines of Python that load a backbone in plain diffusers, for pages and cards that tell how to use a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_dae.backbone.hub import repository
from lora_dae.backbone.layout import BackboneFolder
from lora_dae.config import BackboneConfig, Config

PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def settled(cfg: Config, folder: BackboneFolder) -> Config:
    """``cfg`` and what a checkpoint says by its markers, or by the configs given with it: diffusers reads neither."""
    if folder.single_file is None:
        return cfg
    told: dict[str, Any] = {}
    if folder.prediction_type == "v_prediction":
        told["prediction_type"] = folder.prediction_type
    if folder.zero_terminal_snr:
        told["zero_terminal_snr"] = True
    return replace(cfg, backbone=replace(cfg.backbone, **told))


def plain_pipeline(cfg: BackboneConfig, family: str, place: str | None = None) -> str:
    """The expression that loads the plain pipeline; files and folders as ``place``, or by name: cards are published."""
    pipeline, named = PIPELINES[family], repository(cfg)
    if named is not None:
        revision = "" if named[1] is None else f', revision="{named[1]}"'
        return f'{pipeline}.from_pretrained("{named[0]}"{revision})'
    if cfg.path is None:
        return f'{pipeline}.from_pretrained(lora_dae.__path__[0] + "/backbone/studio/weights")'
    how = "from_single_file" if cfg.path.endswith(".safetensors") else "from_pretrained"
    return f'{pipeline}.{how}("{place or f"path/to/{Path(cfg.path).name}"}")'


def own_scheduler(cfg: BackboneConfig, ddim: bool = False) -> list[str]:
    """Lines that tell a loaded pipeline what the backbone's own files do not say; ``ddim``: that solver in any case.

    ``cfg`` as ``settled`` gives it.
    """
    told: dict[str, Any] = {}
    if cfg.prediction_type != "auto":
        told["prediction_type"] = cfg.prediction_type
    if cfg.zero_terminal_snr:
        told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif cfg.zero_terminal_snr is False:
        told["rescale_betas_zero_snr"] = False
    if not told and not ddim:
        return []
    arguments = "".join(f", {name}={value!r}" for name, value in told.items())
    return [
        "from diffusers import DDIMScheduler",
        f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{arguments})",
    ]
