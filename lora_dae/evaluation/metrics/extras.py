"""Metrics that need weights of their own: loaded before anything is drawn, so that a mistake costs no drawing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_dae.backbone.precision import best_device
from lora_dae.config import ConfigError, EvaluationConfig
from lora_dae.evaluation.metrics.clip_score import ClipScore
from lora_dae.evaluation.metrics.features import FeatureExtractor, load_features
from lora_dae.evaluation.metrics.networks import CleanFid, ClipEmbeddings, DinoV2
from lora_dae.evaluation.metrics.perceptual import MS_SSIM_SIDE, Distance, Lpips, load_dists


@dataclass(frozen=True)
class Extras:
    """What was asked for and could be had, how it is defined, and what could not be had."""

    perceptual: dict[str, Distance]
    clip: ClipScore | None
    more: list[FeatureExtractor]  # further distances between sets
    definitions: list[str]
    not_available: dict[str, str]  # metric -> why


def load_extras(cfg: EvaluationConfig, resolution: int, captions: list[str] | None, paired: bool = True) -> Extras:
    """What ``evaluation.lpips``, ``dists``, ``clip``, ``clean_fid``, ``dinov2`` and ``cmmd`` ask for.

    Raises ConfigError for an LPIPS that does not fit. What a hub or a download server does not give, and a CLIP that
    cannot be loaded or would cut captions off, is ``not_available``, and the rest is measured without it. ``paired``:
    some pictures have a real photo each; LPIPS, DISTS and MS-SSIM of others are neither loaded nor missed.
    """
    device = best_device()
    perceptual: dict[str, Distance] = {}
    more: list[FeatureExtractor] = []
    definitions: list[str] = []
    not_available: dict[str, str] = {}
    if cfg.features == "inception":
        definitions.append("fid, kid, is: torchmetrics' Inception with its antialiased resize, not clean-fid's")
    if paired and resolution < MS_SSIM_SIDE:
        not_available["ms_ssim"] = f"needs {MS_SSIM_SIDE} pixels"
    if paired and cfg.lpips is None:
        not_available["lpips_alex"] = "evaluation.lpips names no weights"
    elif paired and cfg.lpips is not None:
        perceptual["lpips_alex"] = Lpips(Path(cfg.lpips)).to(device)
        definitions.append("lpips: version 0.1, AlexNet")
    if paired and cfg.dists:
        try:
            perceptual["dists"] = load_dists(device)
        except ConfigError as error:
            not_available["dists"] = str(error)
    wanted: list[tuple[bool, str, Callable[[], FeatureExtractor], str]] = [
        (cfg.clean_fid, "fid, kid", lambda: CleanFid(device), "fid and kid: clean-fid, mode clean, 299 x 299"),
        (
            cfg.dinov2 is not None,
            "fd_dinov2",
            lambda: DinoV2(str(cfg.dinov2)),
            f"fd_dinov2: {cfg.dinov2}, class token, 224 x 224 squashed (PIL bicubic)",
        ),
        (
            cfg.cmmd is not None,
            "cmmd",
            lambda: ClipEmbeddings(str(cfg.cmmd)),
            f"cmmd: {cfg.cmmd}, sigma 10, times 1000, biased estimate, whole picture squashed (no center crop)",
        ),
    ]
    for asked, name, load, definition in wanted:
        if asked:
            try:
                more.append(load().to(device))
                definitions.append(definition)
            except ConfigError as error:
                not_available[name] = str(error).rstrip(".")
    clip: ClipScore | None = None
    if cfg.clip is not None:
        try:
            clip = ClipScore(cfg.clip, device)
            clip.check(captions or [])
            definitions.append(f"clip score: 2.5 max(cos, 0), no words before the caption, {clip.name}")
        except ConfigError as error:
            clip = None  # loaded, perhaps, and not for these captions
            not_available["clip_score"] = str(error).rstrip(".")
    return Extras(perceptual, clip, more, definitions, not_available)


def check_networks(cfg: EvaluationConfig) -> None:
    """Raises ConfigError for ``features`` and an ``lpips`` that cannot be had: before a training, not after it.

    Nothing of what it loads is kept.
    """
    load_features(cfg.features)
    if cfg.lpips is not None:
        Lpips(Path(cfg.lpips))
