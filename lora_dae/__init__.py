"""LoRA-DAE: LoRA fine-tuning of Stable Diffusion for fashion photos, enhanced in every reverse step."""

from __future__ import annotations

from typing import Any

__all__ = ["attach", "detach"]


def __getattr__(name: str) -> Any:
    """attach() and detach(), imported when asked for: the commands start without diffusers' pipelines."""
    if name in __all__:
        from lora_dae.sampling import attach as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
