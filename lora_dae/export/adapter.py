"""The adapter's files, converted from the one that training wrote."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_dae.adapter.atomic import atomic, load_tensors, save_tensors
from lora_dae.adapter.files import FILE_NAME
from lora_dae.adapter.kohya import KOHYA_FILE, kohya_metadata, to_kohya
from lora_dae.adapter.peft_layout import from_peft, to_peft
from lora_dae.adapter.weights import LoraWeights, cast, check_finite
from lora_dae.config import ConfigError


def read_adapter(folder: Path) -> tuple[dict[str, LoraWeights], dict[str, str]]:
    """(layers, what the header says) of a run's adapter folder; ConfigError if it is missing or damaged."""
    file = folder / FILE_NAME
    if not file.is_file():
        raise ConfigError(f"there is no adapter at {file}: a fully fine-tuned run is exported with format=merged.")
    tensors, header = load_tensors(file, "it is damaged, export it anew")
    layers = from_peft(tensors, header, str(file))
    check_finite(layers, str(file))
    return layers, header


def write_kohya(
    layers: Mapping[str, LoraWeights],
    folder: Path,
    family: str,
    unet_config: Mapping[str, Any],
    dtype: str,
    **facts: Any,
) -> Path:
    """``adapter_kohya.safetensors``; ``facts`` are those of kohya_metadata."""
    tensors = to_kohya(cast(layers, dtype), family, unet_config)
    return save_tensors(tensors, folder / KOHYA_FILE, kohya_metadata(layers, family, **facts))


def write_diffusers(layers: Mapping[str, LoraWeights], folder: Path, dtype: str, extra: Mapping[str, str]) -> Path:
    """``pytorch_lora_weights.safetensors``, with ``extra`` beside the configuration in the header."""
    tensors, header = to_peft(cast(layers, dtype))
    return save_tensors(tensors, folder / FILE_NAME, {**extra, **header})


def copy_beside(source: Path, folder: Path) -> list[str]:
    """The run's other parts (enhancement, source input), unchanged; returns their names."""
    found = sorted(source.glob("[!.]*.safetensors"))  # a killed write leaves .x.partial123.safetensors
    names = [file.name for file in found if file.name not in (FILE_NAME, KOHYA_FILE)]
    for name in names:
        if source.resolve() != folder.resolve():
            with atomic(folder / name) as partial:
                shutil.copyfile(source / name, partial)
    return names
