"""Entry point; the same as the installed command ``lora-dae-search``."""

from lora_dae.cli import search

if __name__ == "__main__":
    search()
