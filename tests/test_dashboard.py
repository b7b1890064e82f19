"""The W&B workspace, built but not saved: its panels ask for what runs log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_dae import dashboard

ROOT = Path(__file__).parent.parent


def test_workspace_shows_what_runs_log() -> None:
    pytest.importorskip("wandb_workspaces")
    made = dashboard.workspace("somebody", "lora-dae", "LoRA-DAE")
    spec = made._to_model().model_dump_json(by_alias=True)
    for name in (
        "train/loss",
        "val/loss",
        "images/s",
        "enhancement/power_gap",
        "test/grid",
        "val/samples",
        *dashboard.QUALITY,
    ):
        assert name in spec
    assert [section.name for section in made.sections] == ["Samples", "Quality", "Training", "What it depends on"]


def test_without_a_login_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_dae.dashboard", "--entity", "somebody"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: the dashboard lives on the W&B server") and done.stderr.count("\n") == 1


def test_a_saved_workspace_prints_its_address(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a server: what would be sent is kept, and gets the name that the server would give."""
    workspaces = pytest.importorskip("wandb_workspaces.workspaces.interface")
    saved: list[Any] = []

    def save(self: Any) -> Any:
        self._internal_name = "nw-abc-v"  # W&B's form of a view's name, which the address holds without its ends
        saved.append(self)
        return self

    monkeypatch.setattr(workspaces.Workspace, "save", save)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(workspaces, "get_app_url", lambda api: "https://wandb.ai")
    monkeypatch.setattr(workspaces.wandb, "Api", lambda: None)  # it would begin an online session for all later tests
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "somebody", "--project", "clothes", "--name", "Mine"])
    dashboard.main()  # a failure would be a SystemExit
    (one,) = saved
    assert (one.entity, one.project, one.name) == ("somebody", "clothes", "Mine")
    assert capsys.readouterr().out == "https://wandb.ai/somebody/clothes?nw=abc\n"


def test_a_refusal_of_the_server_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspaces = pytest.importorskip("wandb_workspaces.workspaces.interface")

    def refused(_: Any) -> None:
        raise workspaces.wandb.errors.CommError("entity nobody not found\nand more")

    monkeypatch.setattr(workspaces.Workspace, "save", refused)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "nobody"])
    with pytest.raises(SystemExit, match="2"):
        dashboard.main()
    said = "error: W&B does not take a workspace of --entity nobody: entity nobody not found.\n"
    assert capsys.readouterr().err == said
