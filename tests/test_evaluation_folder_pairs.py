"""Anybody's folders: partners that lie on each other, what only pairs have, and a cache that cannot be written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from test_evaluation_folders import _folder
from test_evaluation_measure import TinyFeatures

from lora_dae.config import ConfigError, conf_dir
from lora_dae.evaluation import folder_run
from lora_dae.evaluation.command import EvaluateRequest, evaluate
from lora_dae.evaluation.report.protocol import KERNEL_OF_PAIRS


@pytest.fixture(autouse=True)
def tiny_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_run, "load_features", lambda name: TinyFeatures())


def _evaluate(images: Path, reference: Path, *words: str) -> tuple[Any, str]:
    """metrics.json, and what was printed."""
    output, out = images.parent / "out", io.StringIO()
    options = [f"images={images}", f"reference={reference}", f"output={output}", "bootstrap=0", *words]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("evaluate", [f"cache_dir={images.parent / 'cache'}", *options])
    evaluate(EvaluateRequest(**OmegaConf.to_container(cfg)), Console(file=out, width=200))  # type: ignore[arg-type]
    return json.loads((output / "metrics.json").read_text()), out.getvalue()


def test_partners_of_another_shape_are_refused_and_sets_of_another_one_warned_about(tmp_path: Path) -> None:
    tall, square = _folder(tmp_path / "tall", 300, size=(30, 40)), _folder(tmp_path / "square", 100)
    with pytest.raises(ConfigError, match=r"tall/00.png is 30 x 40, its partner .*square/00.png 40 x 40: padded to"):
        _evaluate(tall, square, "resolution=32", "paired=true")
    unpaired, _ = _evaluate(tall, square, "resolution=32", "controls=false")
    said = [text for text in unpaired["protocol"]["warnings"] if "aspect ratio" in text]
    assert len(said) == 1 and "aspect ratio 0.75 (median)" in said[0] and "of 1.00" in said[0]


def test_partners_of_two_sizes_and_one_shape_are_compared(tmp_path: Path) -> None:
    """A photo scaled to whole pixels has its shape up to rounding."""
    small, large = _folder(tmp_path / "small", 0, size=(30, 41)), _folder(tmp_path / "large", 100, size=(90, 122))
    result, _ = _evaluate(small, large, "resolution=32", "paired=true", "controls=false")
    assert "psnr" in result["methods"]["small"]
    assert not any("aspect" in text for text in result["protocol"]["warnings"])


def test_what_only_pairs_have_is_missed_of_pairs_alone(tmp_path: Path) -> None:
    images, reference = _folder(tmp_path / "made", 0), _folder(tmp_path / "real", 100)
    sets, pairs = (
        _evaluate(images, reference, "controls=false", f"paired={paired}")[0]["protocol"]
        for paired in ("false", "true")
    )
    assert not {"lpips_alex", "ms_ssim"} & sets["not_available"].keys()
    assert pairs["not_available"]["lpips_alex"] == "evaluation.lpips names no weights"
    assert KERNEL_OF_PAIRS in pairs["definitions"] and KERNEL_OF_PAIRS not in sets["definitions"]


def test_pictures_too_narrow_for_ms_ssim_are_told_so(tmp_path: Path) -> None:
    images, reference = (_folder(tmp_path / name, k, 3, (60, 200)) for k, name in ((0, "made"), (100, "real")))
    result, _ = _evaluate(images, reference, "paired=true", "controls=false")
    assert result["protocol"]["not_available"]["ms_ssim"] == "needs 176 pixels"
    assert "ms_ssim" not in result["methods"]["made"] and "ssim" in result["methods"]["made"]


def test_a_cache_that_cannot_be_written_is_said_once_and_costs_nothing_else(tmp_path: Path) -> None:
    images, reference = _folder(tmp_path / "made", 0), _folder(tmp_path / "real", 100)
    train, file = _folder(tmp_path / "train", 200, 8), tmp_path / "file"
    kept, printed = _evaluate(images, reference, f"train={train}")
    assert "not kept" not in printed
    file.write_text("")
    lost, printed = _evaluate(images, reference, f"train={train}", f"cache_dir={file / 'cache'}")
    assert printed.count("features of real pictures are not kept for the next time: cannot write") == 1
    assert lost["methods"] == kept["methods"] and lost["references"] == kept["references"]
