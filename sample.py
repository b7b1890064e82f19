"""Entry point; the same as the installed command ``lora-dae-sample``."""

from lora_dae.cli import sample

if __name__ == "__main__":
    sample()
