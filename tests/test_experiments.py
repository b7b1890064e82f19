"""Files of experiments/ that other programs read: their commands are ones that train.py takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lora_dae.cli import expand_jobs, typed
from lora_dae.config import conf_dir, register
from lora_dae.rules import check

ROOT = Path(__file__).parent.parent
BATCH_FILES = sorted((ROOT / "experiments").glob("*.sbatch"))


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_batch_files_call_train_with_overrides_that_compose(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ")
    assert text.startswith("#!/usr/bin/env bash\n# sbatch ")
    (line,) = [line for line in text.splitlines() if "train.py" in line and not line.startswith("#")]
    words = shlex.split(re.sub(r"\$\w+", "1", line))
    overrides = expand_jobs(words[words.index("train.py") + 1 :])
    sweep = "-m" in overrides
    grid = [word.split(",")[0] if sweep else word for word in overrides if not word.startswith(("-", "hydra."))]
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = typed(compose("train", [*grid, "run_dir=x"]))
    check(cfg)
    nodes = re.search(r"--nodes=(\d+)", text)
    assert nodes is not None and int(nodes[1]) == cfg.trainer["num_nodes"]
