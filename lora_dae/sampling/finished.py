"""The config of a finished run's folder, and whether it is one: loads neither torch nor weights."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from lora_dae.config import Config, ConfigError, from_dict

ENHANCEMENT_FILE = "enhancement.safetensors"


def read_config(run_dir: Path) -> Config:
    """The resolved config of a run; ConfigError if the folder is no finished run."""
    if not run_dir.is_dir():
        raise ConfigError(f"run={run_dir} does not exist: give the folder that train.py printed at its end.")
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "adapter").is_dir():
        raise ConfigError(
            f"run={run_dir} is not a finished run (no config.yaml or no adapter/ in it): give a folder that "
            "train.py has finished, or finish it with ckpt_path=last."
        )
    return from_dict(OmegaConf.to_container(OmegaConf.load(run_dir / "config.yaml")))  # type: ignore[arg-type]


def finished_config(run_dir: Path) -> Config:
    """read_config; ConfigError also where an enhancement was trained and not written."""
    cfg = read_config(run_dir)
    adapter = run_dir / "adapter"
    expected = cfg.enhancement.enabled and cfg.enhancement.placement != "none"
    if expected and not (adapter / ENHANCEMENT_FILE).is_file():
        raise ConfigError(
            f"run={run_dir} is not finished: it stopped while its enhancement was judged, and {adapter} has no "
            f"{ENHANCEMENT_FILE}. Finish it with ckpt_path=last; its LoRA alone loads in diffusers."
        )
    return cfg
