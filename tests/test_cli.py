"""The commands as a user types them: one sentence for a mistake, an exit code, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lora_dae.cli import EvaluateRequest, override_evaluation
from lora_dae.config import Config, EvaluationConfig, check, conf_dir, from_dict, to_dict

ROOT = Path(__file__).parent.parent


def command(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.py", "experiment=rank99"), "rank99"),
        (("train.py", "adapter.rnak=3"), "rnak"),
        (("train.py", "adapter.rank=many"), "many"),
        (("train.py", "enhancement.strength=-1"), "enhancement.strength=-1"),
        (("sample.py", "run=nowhere"), "run=nowhere does not exist"),
        (("evaluate.py", "run=nowhere"), "run=nowhere does not exist"),
        (("export.py", "run=nowhere"), "run=nowhere does not exist"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = command(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_every_config_begins_with_the_command_that_runs_it() -> None:
    files = sorted(conf_dir().rglob("*.yaml"))
    assert len(files) >= 20
    for file in files:
        head = file.read_text(encoding="utf-8").splitlines()[:2]
        assert any(line.startswith("# python ") for line in head), file


def test_config_survives_its_yaml() -> None:
    cfg = Config(run_dir="somewhere")
    assert from_dict(to_dict(cfg)) == cfg
    check(cfg)


def test_evaluating_again_overrides_what_is_given_and_keeps_the_rest() -> None:
    options = ["run=x", "lpips=weights.safetensors", "clip=folder", "controls=true", "dists=true", "num_samples=7"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        given, nothing = (
            EvaluateRequest(**OmegaConf.to_container(compose("evaluate", words)))  # type: ignore[arg-type]
            for words in (options, options[:1])
        )
    cfg = Config(run_dir="x", evaluation=EvaluationConfig(bootstrap=33, clip="own"))
    assert override_evaluation(cfg, nothing) == cfg
    changed = override_evaluation(cfg, given).evaluation
    expected = EvaluationConfig(7, bootstrap=33, lpips="weights.safetensors", dists=True, clip="folder", controls=True)
    assert changed == expected
