"""From ``data.*`` to the three splits, whatever the source."""

from __future__ import annotations

from lora_dae.config import Config, ConfigError, DataConfig
from lora_dae.data.folder import load_folder
from lora_dae.data.pair import PairDataset
from lora_dae.data.studio.dataset import StudioDataset


def load_splits(cfg: DataConfig) -> dict[str, PairDataset]:
    """train, val and test. The studio is rendered if its cache is empty; a folder is checked, not decoded."""
    if cfg.name == "folder":
        return dict(load_folder(cfg))
    sizes = {"train": cfg.train_size, "val": cfg.val_size, "test": cfg.test_size}
    return {
        split: StudioDataset(cfg.cache_dir, "target", split, size, cfg.seed, cfg.resolution, cfg.difficulty)
        for split, size in sizes.items()
    }


def check_source(cfg: Config, train: PairDataset) -> None:
    """conditioning=source needs pairs."""
    if cfg.conditioning == "source" and not train.has_source:
        raise ConfigError(
            f"conditioning=source needs a source photo per image, which {cfg.data.root} does not have: add a source "
            "column or folder, or use conditioning=none."
        )
