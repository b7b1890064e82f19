"""Entry point; the same as the installed command ``lora-dae-evaluate``."""

from lora_dae.cli import evaluate

if __name__ == "__main__":
    evaluate()
