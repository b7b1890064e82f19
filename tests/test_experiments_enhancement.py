"""The enhancement's evidence: one command, every row, and nothing drawn or trained twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from compose import config

from experiments.enhancement import evidence
from lora_dae.sampling.draw import Drawer


def test_one_command_makes_every_row_and_a_second_call_draws_nothing(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tiny(work: Path, name: str, overrides: list[str]):
        short = [o for o in overrides if not o.startswith(("experiment=", "data.test_size"))]
        return config(tiny_backbone, work / name, tmp_path / "cache", "trainer.max_steps=1", *short)

    monkeypatch.setattr(evidence, "config", tiny)
    monkeypatch.setattr(evidence, "GUIDANCE", (1.0, 2.0))
    for name in ("UNSHARP", "FIXED_GAIN", "FREEU"):
        monkeypatch.setattr(evidence, name, getattr(evidence, name)[:1])
    options = ["--modes", "aligned", "--seeds", "0", "--schedulers", "ddim", "--samples", "4", "--tuning-samples", "4"]
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", ["evidence", *options, *folders])
    evidence.main()
    cell = json.loads((tmp_path / "results.json").read_text())["aligned-ddim-0"]
    assert cell["chosen"]["guidance"] in (1.0, 2.0) and cell["samples"] == 4
    rows = cell["rows"]
    assert {"strength 0", "frozen backbone", "LoRA, attention only", "unsharp mask", "fixed gain", "FreeU"} < set(rows)
    assert {"LoRA-DAE: gain", "LoRA-DAE: source texture", "LoRA-DAE: decoder stage", "LoRA-DAE: all"} < set(rows)
    assert {"wrong source, strength 0", "wrong source, all", "more source guidance"} < set(rows)
    assert "psnr_garment" in rows["strength 0"] and "psnr_garment" not in rows["frozen backbone"]
    assert rows["LoRA-DAE: all"]["psnr_garment"]["verdict"] in ("better", "worse", "cannot tell")
    assert rows["unsharp mask"]["power_high_garment"]["value"] > rows["strength 0"]["power_high_garment"]["value"]

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("drawn or trained a second time")

    monkeypatch.setattr(Drawer, "images", refuse)
    monkeypatch.setattr(evidence, "train", refuse)
    evidence.main()


def test_unsharp_masking_keeps_flat_places_and_adds_contrast_at_edges() -> None:
    step = np.full((1, 16, 16, 3), 100, np.uint8)
    step[:, :, 8:] = 140
    sharp = evidence.unsharp(step, 1.0)
    assert (sharp[:, :, :3] == 100).all() and sharp[0, 8, 8, 0] > 140 and sharp[0, 8, 7, 0] < 100
