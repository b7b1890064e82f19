"""``python -m lora_dae.data export``: any data set, the studio included, written in any of the layouts."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from lora_dae.config import SOURCES, ConfigError, DataConfig
from lora_dae.data.sources import load_splits

LAYOUTS = tuple(name for name in SOURCES if name != "studio")


def export(cfg: DataConfig, layout: str, to: Path) -> dict[str, int]:
    """Writes the pairs of ``cfg`` into the folder ``to``; returns how many each split has.

    Raises ConfigError for an unknown layout, a folder that holds something, and data that the layout cannot hold.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout} is unknown: use one of {', '.join(LAYOUTS)}.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to {to} is not an empty folder: give a new one, nothing is overwritten.")
    splits = load_splits(cfg)
    import_module(f"lora_dae.data.formats.{layout}").write(splits, to)
    return {name: len(pairs) for name, pairs in splits.items()}
