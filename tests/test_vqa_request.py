"""What the command and its judges are asked for: types and values, told in one sentence where they are wrong."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from lora_dae.config import ConfigError, conf_dir
from lora_dae.vqa.__main__ import main, request_of
from lora_dae.vqa.judges import judge_config
from lora_dae.vqa.run import VqaRequest


def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("vqa", list(overrides))


def test_every_judge_of_conf_composes_and_is_checked() -> None:
    names = sorted(path.stem for path in (conf_dir() / "judge").glob("*.yaml"))
    judges = request_of(_composed("runs=[a]", f"judge=[{','.join(names)}]")).judges
    assert sorted(judges) == names
    for name, values in judges.items():
        if "model" in values:
            with pytest.raises(ConfigError, match=f"judges.{name}.model is missing"):
                judge_config(name, values)
            values["model"] = "m"
        assert judge_config(name, values).kind in ("endpoint", "transformers", "classifier")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "oracle"}, "kind=oracle"),
        ({"kind": "endpoint", "model": "m", "api_key": "sk"}, "do not belong into configs"),
        ({"kind": "endpoint", "model": "m", "base_url": "http://me:pw@host/v1"}, "password or a query"),
        ({"kind": "endpoint", "model": "m", "base_url": "http://host/v1?key=pw"}, "password or a query"),
        ({"kind": "endpoint", "model": "m", "modle": 1}, "modle is unknown"),
        ({"kind": "endpoint", "model": "m", "timeout": 0}, "timeout=0"),
        ({"kind": "endpoint", "model": "m", "timeout": "2m"}, "judges.x.timeout is of the wrong type .*2m"),
        ({"kind": "endpoint", "model": "m", "concurrency": None}, "judges.x.concurrency is of the wrong type"),
        ({"kind": "endpoint", "model": "m", "retries": -1}, "retries=-1 must be 0 or more"),
        ({"kind": "endpoint", "model": "m", "max_cost": 1.0}, "needs price_in"),
        ({"kind": "endpoint", "model": "m", "requests_per_minute": -1}, "requests_per_minute=-1"),
        ("classifier", "must be a mapping"),
    ],
)
def test_wrong_judges_are_one_sentence(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        judge_config("x", values)
    assert "sk" not in str(error.value).split() and "pw" not in str(error.value).split()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runs=runs/one", r"runs=runs/one is no list: write runs=\[runs/one\]"),
        ("runs=null", "runs is missing"),
        ("num_samples=many", "num_samples: Value 'many' of type 'str' could not be converted to Integer"),
        ("bootstrap=1.5", "bootstrap: Value '1.5'"),
        ("pairs=perhaps", "pairs: "),
        ("+ratio=1", "ratio"),
    ],
)
def test_values_of_the_wrong_type_are_one_sentence(override: str, message: str) -> None:
    cfg = _composed("runs=[runs/one]", override)
    with pytest.raises(ConfigError, match=message) as error:
        request_of(cfg)
    assert "\n" not in str(error.value)


def test_a_request_is_what_was_composed() -> None:
    cfg = _composed("runs=['one=runs/a@0.5',runs/b]", "judge=[classifier,vllm]", "bank=b.yaml")
    request = request_of(cfg)
    assert request == VqaRequest(**OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    assert request.runs == ["one=runs/a@0.5", "runs/b"] and request.judges["vllm"]["concurrency"] == 16


def test_a_command_without_runs_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vqa"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: runs is missing")
