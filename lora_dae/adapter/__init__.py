"""LoRA on the frozen UNet: which layers, which rank, inject, save, load, merge."""
