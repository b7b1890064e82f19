"""``python -m lora_dae.vqa runs=[...] judge=[...]``: see conf/vqa.yaml."""

from __future__ import annotations

import sys
from typing import Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from lora_dae.config import ConfigError, conf_dir
from lora_dae.vqa.run import VqaRequest, ask_judges


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="vqa")
def main(cfg: DictConfig) -> None:
    try:
        ask_judges(request_of(cfg), Console())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def request_of(cfg: DictConfig) -> VqaRequest:
    """The composed config, its types checked; ConfigError for a key that is missing, unknown or of the wrong type."""
    if OmegaConf.is_missing(cfg, "runs") or cfg.runs is None:
        raise ConfigError("runs is missing: give runs=[runs/<run>], or several.")
    if not isinstance(cfg.runs, ListConfig):
        raise ConfigError(f"runs={cfg.runs} is no list: write runs=[{cfg.runs}].")
    try:
        request: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(VqaRequest), {"judges": {}}, cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}; see conf/vqa.yaml.") from error
    return request


if __name__ == "__main__":
    main()
