"""Entry point; the same as the installed command ``lora-dae-export``."""

from lora_dae.cli import export

if __name__ == "__main__":
    export()
