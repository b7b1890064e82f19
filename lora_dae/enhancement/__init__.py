"""The adaptive enhancement module: bands, gates, objective, files, and the hook into a sampler."""

from lora_dae.enhancement.files import load_enhancement, save_enhancement
from lora_dae.enhancement.gates import EnhancementModule
from lora_dae.enhancement.hook import enhance, enhance_scheduler, unenhance

__all__ = [
    "EnhancementModule",
    "enhance",
    "enhance_scheduler",
    "load_enhancement",
    "save_enhancement",
    "unenhance",
]
