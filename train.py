"""Entry point; the same as the installed command ``lora-dae-train``."""

from lora_dae.cli import train

if __name__ == "__main__":
    train()
