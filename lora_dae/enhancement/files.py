"""One safetensors file per enhancement module: weights, and the numbers needed to build it again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lora_dae.adapter.atomic import load_tensors, save_tensors
from lora_dae.config import ConfigError
from lora_dae.enhancement.module import EnhancementModule

FORMAT = "lora-dae-enhancement"
# 3: the finest band of source texture is carried as the others are; 4: agreement with the caption; 5: gates of source
# texture see what guidance has amplified; 6: the finest band of pictures gets louder only where the source has more;
# 7: source photos may be registered
VERSION = "7"
READABLE = ("3", "4", "5", "6", VERSION)


def save_enhancement(module: EnhancementModule, path: str | Path) -> Path:
    """Write ``module`` to ``path`` (a .safetensors file), atomically, folders are made; returns the path."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "levels": str(module.levels),
        "hidden": str(module.hidden),
        "max_log_gain": repr(module.max_log_gain),
        "source_channels": str(module.source_channels),
        "decoder": str(int(module.decoder is not None)),
        "gate_inputs": module.gate_inputs,
        "finest_log_gain": repr(module.finest_log_gain),
        "sourced": str(int(module.sourced)),
        "placement": module.placement,
        "registered": str(int(module.preview is not None)),
        "text_channels": str(0 if module.agreement is None else module.agreement.text.in_features),
        "text_tokens": str(77 if module.agreement is None else module.agreement.tokens),
    }
    return save_tensors(module.state_dict(), path, metadata)


def load_enhancement(path: str | Path) -> EnhancementModule:
    """Read a module that ``save_enhancement`` wrote, on CPU. Any other file raises ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no enhancement file {path}; give the enhancement.safetensors of a run.")
    tensors, metadata = load_tensors(path, "give the enhancement.safetensors of a run")
    if metadata.get("format") != FORMAT:
        raise ConfigError(
            f"{path} holds no enhancement module (format {metadata.get('format')!r}); "
            "give an enhancement.safetensors, not an adapter or a backbone."
        )
    if metadata.get("version") not in READABLE:
        raise ConfigError(
            f"{path} has enhancement format version {metadata.get('version')}, this program reads "
            f"{' and '.join(READABLE)}; use the version of lora-dae that wrote it."
        )
    try:
        module = EnhancementModule(
            int(metadata["levels"]), int(metadata["hidden"]), float(metadata["max_log_gain"]),
            int(metadata["source_channels"]), metadata["decoder"] == "1",
            metadata.get("gate_inputs", "energy"), float(metadata.get("finest_log_gain", 0)),  # older files do not say
            int(metadata.get("text_channels", 0)), int(metadata.get("text_tokens", 77)),
            metadata.get("sourced", "0") == "1", metadata.get("placement", "prediction"),
            metadata.get("registered", "0") == "1",
        )  # fmt: skip
        if metadata["version"] in ("3", "4") and module.texture is not None:
            tensors["texture.input.weight"] = _blind_to_guidance(tensors["texture.input.weight"], module.levels)
        module.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} is damaged: its weights do not fit its description; save it again.") from error
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ConfigError(f"{path} holds weights that are not finite: it is damaged, or training diverged.")
    return module


def _blind_to_guidance(weight: Tensor, levels: int) -> Tensor:
    """The gates' first layer of a file before version 5, with zeros for what those gates did not see."""
    energies = 3 * levels
    unseen = weight.new_zeros(len(weight), levels, *weight.shape[2:])
    return torch.cat([weight[:, :energies], unseen, weight[:, energies:]], dim=1)
