"""The adaptive enhancement module: bands, gain, source texture, objective, files, and the hook into a sampler."""

from lora_dae.enhancement.files import load_enhancement, save_enhancement
from lora_dae.enhancement.hook import enhance_scheduler
from lora_dae.enhancement.module import EnhancementModule

__all__ = ["EnhancementModule", "enhance_scheduler", "load_enhancement", "save_enhancement"]
