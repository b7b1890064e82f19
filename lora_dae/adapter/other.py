"""Files of PEFT's other adapters, LoHa and LoKr: for comparison, in PEFT's own layout, which few programs read."""

from __future__ import annotations

from pathlib import Path

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from lora_dae.adapter.atomic import load_tensors, save_tensors
from lora_dae.adapter.inject import ADAPTER_NAME, adapter_config
from lora_dae.config import AdapterConfig, ConfigError

FILE_NAME = "peft_adapter.safetensors"


def save_other(unet: UNet2DConditionModel, folder: Path, cfg: AdapterConfig, metadata: dict[str, str]) -> Path:
    """Write the adapter's weights to FILE_NAME in ``folder``; returns the file."""
    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME)
    return save_tensors(state, folder / FILE_NAME, {**metadata, "format": "pt", "kind": cfg.kind})


def load_other(unet: UNet2DConditionModel, folder: Path, cfg: AdapterConfig) -> None:
    """Load what save_other wrote into a plain UNet; frozen afterwards. ``cfg`` is that of the training.

    Raises ConfigError if the file is damaged or of another configuration.
    """
    weights, header = load_tensors(folder / FILE_NAME, "it is damaged, train it anew")
    unet.add_adapter(adapter_config(unet, cfg), adapter_name=ADAPTER_NAME)
    expected = {key: value.shape for key, value in get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME).items()}
    if header.get("kind") != cfg.kind or {key: value.shape for key, value in weights.items()} != expected:
        raise ConfigError(
            f"{folder / FILE_NAME} holds another adapter than the run's config says: give the folder as it was trained."
        )
    set_peft_model_state_dict(unet, weights, adapter_name=ADAPTER_NAME)
    unet.requires_grad_(False)
