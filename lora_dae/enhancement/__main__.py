"""``python -m lora_dae.enhancement diagnose run=<dir>``: see conf/diagnose.yaml."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_dae.backbone.precision import best_device, draws_in_bf16
from lora_dae.config import ConfigError, conf_dir
from lora_dae.evaluation.diagnose import diagnose
from lora_dae.sampling.finished import read_config


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="diagnose")
def main(cfg: DictConfig) -> None:
    try:
        if OmegaConf.is_missing(cfg, "run"):
            raise ConfigError("run is missing: give run=runs/<run>.")
        if cfg.split not in ("test", "val"):
            raise ConfigError(f"split={cfg.split} is unknown: use test or val.")
        if int(cfg.num_samples) < 2:
            raise ConfigError(f"num_samples={cfg.num_samples} is below 2: a wrong source is the next pair's.")
        device = best_device()
        bf16 = draws_in_bf16(read_config(Path(cfg.run)), device)
        diagnose(Path(cfg.run), Console(), cfg.split, int(cfg.num_samples), bf16, device)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    if sys.argv[1:2] != ["diagnose"]:
        print("error: the command is: python -m lora_dae.enhancement diagnose run=runs/<run>", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    main()
