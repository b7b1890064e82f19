"""Networks of the evaluation that cannot be had: told before a training, or left out with their reason."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from compose import config
from safetensors.torch import save_file

from lora_dae.config import ConfigError, EvaluationConfig
from lora_dae.evaluation.metrics.extras import load_extras
from lora_dae.sweep import store
from lora_dae.training import run as training


@pytest.mark.parametrize("road", ["run", "store"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("evaluation.features=inception", "needs torch-fidelity: pip install"),
        ("evaluation.lpips={}", "does not hold torchvision's AlexNet features"),
    ],
)
def test_what_would_end_the_measuring_is_not_trained(
    road: str, option: str, message: str, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: object) -> None:
        raise AssertionError("a training has begun")

    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(training, "train", begun)
    monkeypatch.setattr(store, "train_once", begun)
    file = tmp_path / "other.safetensors"
    save_file({"features.0.weight": torch.zeros(1)}, file)
    options = (option.format(file), f"store={tmp_path / 'store'}")
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options)
    with pytest.raises(ConfigError, match=message):
        training.run(cfg) if road == "run" else store.run_in_store(cfg)
    assert not (tmp_path / "run").exists() and not (tmp_path / "store").exists()


def test_a_clip_that_cannot_be_had_costs_its_own_score_alone(tmp_path: Path) -> None:
    extras = load_extras(EvaluationConfig(clip=str(tmp_path)), 256, ["a red dress"])
    assert extras.clip is None and extras.definitions == []
    assert f"evaluation.clip={tmp_path} cannot be loaded" in extras.not_available["clip_score"]
