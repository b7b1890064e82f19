"""Numbers of a page in W&B are named by the split that they are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lora_dae.config import TrackingConfig
from lora_dae.evaluation.report.page import Page, write_page
from lora_dae.evaluation.report.table import MetricValue, Protocol, ResultsTable
from lora_dae.training import page_log

PROTOCOL = Protocol(9, 9, "test", 64, "ddim", 4, 2.0, None, [1], "effnet", 20)


class _Logger:
    """Keeps the names of what it is told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.experiment = self

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.names += metrics

    def log(self, values: dict[str, Any]) -> None:
        self.names += values

    def finalize(self, status: str) -> None:
        self.names.append(status)


@pytest.mark.parametrize(
    ("split", "mode", "name"),
    [
        ("test", "source", "test/ours/x"),
        ("val", "source", "val/ours/x"),
        ("val", "masked", "val_masked/ours/x"),
        ("given", "sets", "test/ours/x"),
    ],
)
def test_numbers_of_validation_pairs_share_no_chart_with_those_of_test_pairs(
    split: str, mode: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = _Logger()
    monkeypatch.setattr(page_log.tracking, "wandb_logger", lambda *_: logger)
    value = MetricValue(1.0, None, None, "lower")
    page = Page("A page", ResultsTable({"ours": {"x": value}}, replace(PROTOCOL, split=split, mode=mode)), "evaluate")
    write_page(tmp_path, page)
    log = page_log.page_logger(TrackingConfig(logger="wandb", wandb="offline"), Console(quiet=True))
    assert log is not None
    log(tmp_path, page)
    assert logger.names == [name, "report", "success"]
