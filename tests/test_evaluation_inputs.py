"""What folders of pictures may hold, and what the keys of evaluate.py may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from lora_dae.config import ConfigError, conf_dir
from lora_dae.evaluation.command import EvaluateRequest, evaluate
from lora_dae.evaluation.pictures import Item, read_pictures, write_pictures


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_captions_may_hold_any_line_separator_but_the_newline(separator: str, tmp_path: Path) -> None:
    """JSON writes these as they are, and str.splitlines() parts lines at them."""
    captions = [f"a red shirt{separator}with buttons", "a skirt"]
    items = [Item(f"{k:04d}", caption) for k, caption in enumerate(captions)]
    write_pictures(tmp_path, items, [np.zeros((8, 8, 3), np.uint8)] * 2)
    assert [item.prompt for item in read_pictures(tmp_path)[0]] == captions


def test_runs_that_are_no_list_are_not_read_letter_by_letter() -> None:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("evaluate", ["runs=runs/one"])
    request = EvaluateRequest(**OmegaConf.to_container(cfg))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"runs=runs/one is no list: write runs=\[runs/one\]"):
        evaluate(request, Console(quiet=True))
