"""``backbone.weights=int8``: the frozen UNet's linear layers in 8 bits, by torchao, for GPUs whose memory is short.

One scale for each output, weights alone (activations stay bfloat16). Convolutions stay bfloat16, so it is SDXL, whose
weights are mostly linear layers, that shrinks most. The adapter trains in float32 as ever.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from lora_dae.config import ConfigError


def check_int8(weights: str, device: torch.device) -> None:
    """Raises ConfigError for ``int8`` on a CPU, where it would save little and cost much, and without torchao."""
    if weights != "int8":
        return
    if device.type == "cpu":
        raise ConfigError("backbone.weights=int8 saves the memory of a GPU, and there is none here: use bf16 or fp32.")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("backbone.weights=int8 needs torchao: pip install 'lora-dae[quantize]'.")


def quantize(unet: nn.Module) -> None:
    """Linear layers to int8 in place, before an adapter is injected; PEFT knows how to adapt them."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(unet, Int8WeightOnlyConfig())
