"""Files of experiments/ that other programs read: their commands are ones that train.py takes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lora_dae.cli import expand_jobs, typed
from lora_dae.config import conf_dir, register
from lora_dae.rules import check

ROOT = Path(__file__).parent.parent
README_ROWS = {
    "frozen backbone": "frozen backbone",
    "LoRA on cross-attention alone": "LoRA attention",
    "LoRA on cross-attention and convolutions": "LoRA attention + conv",
    "the same, rsLoRA": "rsLoRA",
    "the same, DreamBooth's prior preservation": "DreamBooth LoRA",
    "the same, with FreeU": "LoRA + FreeU",
    "the same, with an unsharp mask": "LoRA + unsharp mask",
    "**LoRA-DAE**": "LoRA-DAE",
}
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


def test_the_readmes_numbers_are_those_of_the_study() -> None:
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"<!-- numbers of experiments/(\w+) -->\n(.*?)<!-- end of numbers -->", text, re.DOTALL)
    assert found
    for study, table in found:
        cells = json.loads((ROOT / "experiments" / study / "results.json").read_text())["cells"]
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        metrics = [name.split()[0] for name in head[1:]]
        for label, *shown in rows:
            metrics_of_row = cells[README_ROWS[label]]["metrics"]
            for name, told in zip(metrics, shown, strict=True):
                measured = metrics_of_row.get(name)
                assert (measured is None) == (not told)
                if measured is not None:
                    digits = len(told.split()[0].partition(".")[2])
                    value, low, high = (f"{measured[key]:.{digits}f}" for key in ("value", "low", "high"))
                    assert told == f"{value} [{low}, {high}]", (label, name)


def test_the_readme_says_how_many_seeds_the_study_has() -> None:
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "experiments/mainstream/results.json").read_text())
    seeds = {len(results["cells"][name]["training_seeds"]) for name in README_ROWS.values()}
    words = {1: "the first of three\ntraining seeds", 3: "three\ntraining seeds"}
    assert words[min(seeds)] in text
