"""Tables, plots and the report say what was measured on what, and need nothing from outside."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.evaluation import plots
from lora_dae.evaluation.report import write_report
from lora_dae.evaluation.table import MetricValue, Protocol, ResultsTable, format_value, load_table
from lora_dae.sampling.sheet import image_grid

PROTOCOL = Protocol(
    num_generated=256, num_reference=200, split="test", resolution=128, sampler="ddim", steps=20,
    guidance_scale=2.5, source_guidance_scale=1.5, seeds=[1234], features="effnet", bootstrap=1000,
)  # fmt: skip


def _metric(value: float, half: float, better: str, seed: int = 0) -> MetricValue:
    spread = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * half / 1.96
    return MetricValue(value, value - half, value + half, better, value + spread)  # type: ignore[arg-type]


@pytest.fixture
def table() -> ResultsTable:
    return ResultsTable(
        {
            "frozen backbone": {
                "fd_effnet": _metric(41.26, 1.2, "lower"),
                "attr_color": _metric(0.61, 0.05, "higher"),
            },
            "strength 1": {
                "fd_effnet": _metric(20.04, 1.1, "lower", 1),
                "attr_color": _metric(0.62, 0.05, "higher", 1),
                "power_high_garment": MetricValue(0.93, 0.9, 0.96, None),
                "psnr_garment": MetricValue(23.0, None, None, "higher"),
            },
        },
        PROTOCOL,
    )


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (MetricValue(41.2649, 39.8, 42.8, "lower"), ("41.3", "[39.8, 42.8]")),
        (MetricValue(0.0312345, 0.0308, 0.0317, "lower"), ("0.0312", "[0.0308, 0.0317]")),
        (MetricValue(1234.5, 1100.0, 1400.0, "lower"), ("1234", "[1100, 1400]")),
        (MetricValue(0.98765, None, None, "higher"), ("0.988", "")),
        (MetricValue(float("nan"), None, None, "higher"), ("n/a", "")),
    ],
)
def test_values_show_the_digits_that_their_interval_supports(metric: MetricValue, text: tuple[str, str]) -> None:
    assert format_value(metric) == text


def test_markdown_marks_only_what_is_told_apart(table: ResultsTable) -> None:
    text = table.markdown()
    assert "**20.0** [18.9, 21.1]" in text
    assert "0.620 [0.570, 0.670]" in text and "**0.620**" not in text
    assert "fd_effnet ↓" in text and "high garment → 1" in text
    assert PROTOCOL.line() in text


def test_protocol_names_all_that_a_number_depends_on() -> None:
    line = PROTOCOL.line()
    what = ("256 generated", "200 real", "test split", "128 x 128", "1000 bootstrap", "10 splits")
    how = ("ddim, 20 steps", "guidance 2.5 (source 1.5)", "seed 1234", "effnet features")
    for part in what + how:
        assert part in line


def test_console_table_fits_100_columns(table: ResultsTable) -> None:
    wide = {f"attr_{name}": _metric(0.9, 0.02, "higher") for name in "garment color pattern sleeve length".split()}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ResultsTable({"frozen backbone": wide, "strength 1": wide}, PROTOCOL).rich())
    text = console.export_text()
    assert "…" not in text and text.count("[0.880, 0.920]") == 10


def test_json_round_trip_keeps_values_and_protocol(table: ResultsTable, tmp_path: Path) -> None:
    table.save(tmp_path / "metrics.json")
    loaded = load_table(tmp_path / "metrics.json")
    assert loaded == table  # replicates do not count
    assert json.loads((tmp_path / "metrics.json").read_text())["baseline"] == "frozen backbone"


def test_a_table_without_methods_is_told() -> None:
    with pytest.raises(ConfigError, match="no method"):
        ResultsTable({}, PROTOCOL)


class _Page(HTMLParser):
    """Collects every address that the page refers to, and checks that its tags close."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_is_one_file_with_everything_in_it(table: ResultsTable, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    plot = plots.plot_band_power({"strength 0": torch.ones(8) * 0.7}, torch.ones(8), tmp_path / "power.svg")
    pictures = [("a 'red' dress & a <hat>", picture)]
    path = write_report(
        tmp_path, "A <tricky> title", {"adapter": "3.1 MB"}, table, pictures, [plot], "name: <b>", "sample()"
    )
    html = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert len(page.addresses) == 2 and all(a.startswith("data:image/") for a in page.addresses)
    assert not re.search(r"@import|url\(", html)
    for text in (
        "A &lt;tricky&gt; title",
        "a &#39;red&#39; dress &amp; a &lt;hat&gt;",
        "name: &lt;b&gt;",
        "41.3",
    ):
        assert text in html
    assert 'class="better" title="better than frozen backbone">20.0' in html
    assert PROTOCOL.line() in html


def test_report_names_a_missing_picture(table: ResultsTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.png"):
        write_report(tmp_path, "t", {}, table, [("c", tmp_path / "absent.png")], [], "", "")


def test_curves_are_read_from_a_log_with_gaps(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    rows = [f"{step},0,{1 / (step + 1)},{'' if step % 10 else 0.5}" for step in range(100)]
    log.write_text("step,epoch,train/loss,val/loss\n" + "\n".join(rows) + "\n100,0,nan,\n")
    columns = plots.read_metrics(log)
    assert columns["val/loss"] == ([float(s) for s in range(0, 100, 10)], [0.5] * 10)
    assert len(columns["train/loss"][0]) == 100  # the NaN is left out
    out = plots.plot_curves(log, tmp_path / "loss.png", {"training": "train/loss", "validation": "val/loss"}, "Loss")
    assert Image.open(out).mode == "RGBA"
    with pytest.raises(ConfigError, match="train/loss"):
        plots.plot_curves(log, out, {"x": "nothing"}, "Loss")
    with pytest.raises(ConfigError, match="no training log"):
        plots.read_metrics(tmp_path / "absent.csv")


def test_running_mean_keeps_length_and_constants() -> None:
    assert plots.running_mean([2.0] * 7, 5).tolist() == [2.0] * 7
    assert plots.running_mean([0.0, 3.0, 6.0, 0.0], 3).tolist() == [1.5, 3.0, 3.0, 3.0]


def test_grid_keeps_every_pixel_in_its_place() -> None:
    images = [np.full((16, 16, 3), 20 * i, np.uint8) for i in range(6)]
    grid = image_grid(images, 2, 3, ["a", "b", "c"], ["first", "second " * 30], zoom=4)
    pixels = np.asarray(grid)
    for value in range(0, 120, 20):
        assert ((pixels == value).all(axis=2)).sum() >= 64 * 64
    with pytest.raises(ConfigError, match="2 x 3 grid"):
        image_grid(images[:5], 2, 3)
