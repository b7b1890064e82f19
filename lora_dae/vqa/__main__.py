"""``python -m lora_dae.vqa runs=[...] judge=[...]``: see conf/vqa.yaml."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lora_dae.config import ConfigError, conf_dir
from lora_dae.vqa.run import VqaRequest, ask_judges


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="vqa")
def main(cfg: DictConfig) -> None:
    try:
        if OmegaConf.is_missing(cfg, "runs"):
            raise ConfigError("runs is missing: give runs=[runs/<run>], or several.")
        ask_judges(VqaRequest(**OmegaConf.to_container(cfg, resolve=True)), Console())  # type: ignore[arg-type]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
