"""``python -m lora_dae.training``: the same as train.py, wherever that lies."""

from lora_dae.cli import train

if __name__ == "__main__":
    train()
