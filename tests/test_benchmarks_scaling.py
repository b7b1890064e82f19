"""benchmarks.scaling: exponents of known powers, and a short run of every curve."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_benchmarks import parts

from benchmarks import scaling


def test_the_exponent_of_a_power_is_its_own_and_a_bend_shows() -> None:
    xs = [1, 2, 4, 8]
    assert scaling.exponent(xs, [3.0 * x**1.5 for x in xs]) == pytest.approx((1.5, 1.5))
    slope, steepest = scaling.exponent(xs, [1.0, 1.0, 1.0, 4.0])
    assert steepest == pytest.approx(2) and slope < 1


def test_every_curve_is_measured_and_drawn(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling, "build", lambda *_: parts(tiny_backbone))
    points = ["--ranks", "1", "2", "64", "--batches", "1", "2", "--sizes", "8", "16", "--bands", "1", "2"]
    words = [
        *points,
        "--batch",
        "2",
        "--size",
        "16",
        "--photos",
        "20",
        "40",
        "--repeats",
        "1",
        "--output",
        str(tmp_path / "scaling.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["scaling", *words])
    scaling.main()
    found = json.loads((tmp_path / "scaling.json").read_text())["curves"]
    assert [curve["points"] for curve in found] == [[1, 2], [1, 2], [64, 256], [1, 2], [1, 2], [20, 40], [20, 40]]
    assert all(seconds > 0 for curve in found for seconds in curve["seconds"])
    assert "[64] are left out" in capsys.readouterr().out  # the tiny network's layers have 16 channels
    assert Image.open(tmp_path / "scaling.png").width > 1000
