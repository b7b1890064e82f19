"""Which device and precision are fastest here: measured, not assumed."""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import nn

from lora_dae.config import Config

CLEAR_WIN = 1.2  # two runs of one seed must not differ because a clock was noisy
_HOPELESS = 3.0  # times as long as float32, once warm: emulated, and slow to measure


def choose_precision(setting: str, device: torch.device) -> str:
    """Lightning's ``precision`` for ``trainer.precision``; ``auto`` is bf16-mixed where that is clearly faster.

    On a GPU with bfloat16 it always is. On a CPU one convolution, forward and backward, decides.
    """
    if setting != "auto":
        return setting
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if device.type != "cpu":
        return "32-true"
    return "bf16-mixed" if _cpu_gains() else "32-true"


def draws_in_bf16(cfg: Config, device: torch.device) -> bool:
    """Whether a run's pictures are drawn in bfloat16 on ``device``, by the ``trainer.precision`` that it trained in."""
    return choose_precision(str(cfg.trainer.get("precision", "auto")), device).startswith("bf16")


def half_type(device: torch.device) -> torch.dtype:
    """bfloat16; float16 on GPUs that only emulate it, many times slower."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def round_frozen(model: nn.Module, precision: str) -> int:
    """Hold weights that never change in the type to which autocast rounds them in every call; returns how many layers.

    The same to the bit, without the rounding's time and with half the memory. ``precision`` is Lightning's; without
    autocast nothing happens. A layer with an adapter keeps its own: the sum with the adapter's is rounded there.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    adapted = {id(getattr(module, "base_layer", None)) for module in model.modules()}
    layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d) and id(m) not in adapted]
    frozen = [m for m in layers if dtype is not None and not any(p.requires_grad for p in m.parameters())]
    for layer in frozen:
        layer.to(dtype)
    return len(frozen)


def best_device() -> torch.device:
    """The first accelerator that is there, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@cache
def _cpu_gains() -> bool:
    full = _time(torch.float32)
    return full > CLEAR_WIN * _time(torch.bfloat16, _HOPELESS * full)


def _time(dtype: torch.dtype, hopeless: float = float("inf")) -> float:
    """Best of five, in seconds; of fewer where the second takes longer than ``hopeless``."""
    conv = nn.Conv2d(96, 96, 3, padding=1).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(8, 96, 32, 32).to(dtype, memory_format=torch.channels_last).requires_grad_()
    best = float("inf")
    for count in range(6):
        start = time.perf_counter()
        conv(x).sum().backward()
        best = min(best, time.perf_counter() - start)
        if count and best > hopeless:
            break
    return best
