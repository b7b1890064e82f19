"""Tables, plots and the report say what was measured on what, and need nothing from outside."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics.extrapolate import SizeCurve
from lora_dae.evaluation.report import plots
from lora_dae.evaluation.report.examples import PictureGrid, PictureRow, extremes
from lora_dae.evaluation.report.page import Page, Sheet, page_html, write_page
from lora_dae.evaluation.report.table import MetricValue, Protocol, ResultsTable, format_value, load_table
from lora_dae.evaluation.report.table_files import csv_text, latex
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
        (MetricValue(2.514, 2.3, 2.7, "higher", std=0.123), ("2.51 ± 0.12", "[2.30, 2.70]")),
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
    assert "method" not in PROTOCOL.rows()["Sampling"]
    assert "guidance 2.5 (source 1.5), method pag" in replace(PROTOCOL, method="pag").line()


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


def _page(table: ResultsTable, **options: Any) -> Page:
    return Page("A <tricky> title", table, "python evaluate.py run=x", **options)


def test_report_is_one_file_with_everything_in_it(table: ResultsTable, tmp_path: Path) -> None:
    plot = plots.plot_band_power({"strength 0": torch.ones(8) * 0.7}, torch.ones(8), tmp_path / "power.svg")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    grid = PictureGrid("Pictures", ["source", "real"], [PictureRow("a 'red' dress & a <hat>", [None, pixels])])
    judged = Sheet("Judge <j>", ["a note"], ["", "color"], [["strength 1", "0.75, cannot tell"]])
    page = _page(
        table, summary={"adapter": "3.1 MB"}, grids=[grid], plots=[plot], sheets=[judged], config_yaml="name: <b>",
        usage="sample()",
    )  # fmt: skip
    html = write_page(tmp_path, page).read_text(encoding="utf-8")
    parsed = _Page()
    parsed.feed(html)
    assert parsed.open == []
    assert len(parsed.addresses) == 2 and all(a.startswith("data:image/") for a in parsed.addresses)
    assert not re.search(r"@import|url\(", html)
    png = next(a for a in parsed.addresses if a.startswith("data:image/png"))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(png.split(",")[1]))))
    assert np.array_equal(shown, pixels)  # every pixel as it is
    for text in (
        "A &lt;tricky&gt; title",
        "a &#39;red&#39; dress &amp; a &lt;hat&gt;",
        "name: &lt;b&gt;",
        "Judge &lt;j&gt;",
        "0.75, cannot tell",
        "41.3",
        "python evaluate.py run=x",
        f"torch {torch.__version__}",
        *(str(escape(row)) for row in PROTOCOL.rows().values()),
    ):
        assert text in html, text
    assert 'class="better" title="better than frozen backbone">20.0' in html
    assert "cannot tell</small>" in html  # attr_color


def test_a_page_without_pictures_and_plots_is_whole(table: ResultsTable) -> None:
    parsed = _Page()
    parsed.feed(page_html(_page(table)))
    assert parsed.open == [] and parsed.addresses == []


def test_without_intervals_no_bootstrap_is_spoken_of(table: ResultsTable) -> None:
    plain = {
        method: {name: replace(value, low=None, high=None, replicates=None) for name, value in row.items()}
        for method, row in table.methods.items()
    }
    bare = ResultsTable(plain, replace(PROTOCOL, bootstrap=0))
    assert bare.protocol.rows()["Intervals"].startswith("no intervals") and bare.legend() == ""
    out = io.StringIO()
    Console(width=100, file=out).print(bare.rich())
    for text in (bare.markdown(), page_html(_page(bare)), out.getvalue()):
        assert "20" in text and not any(word in text for word in ("bootstrap", "cannot tell", "95&nbsp;%", "Marked"))


def test_intervals_of_large_sets_are_called_what_they_are(table: ResultsTable) -> None:
    large = replace(table, protocol=replace(PROTOCOL, num_generated=600, num_reference=600))
    for shown in (large.legend(), page_html(_page(large))):
        assert "by a paired bootstrap (distances between sets: a paired jackknife), p" in shown
    assert "by a paired bootstrap, p" in table.legend()


def test_references_stand_apart_and_are_compared_with_nothing(table: ResultsTable, tmp_path: Path) -> None:
    floor = {"fd_effnet": _metric(1.0, 0.1, "lower", 2), "psnr": _metric(30.0, 1, "higher", 3)}
    whole = replace(table, references={"real, blurred": floor})
    assert whole.corrected() == table.corrected()
    text = whole.markdown()
    above, below = text.split("What real photos get")[:2]
    assert "real, blurred" not in above and "| real, blurred | 1.00 [0.90, 1.10] |" in below
    whole.save(tmp_path / "metrics.json")
    assert load_table(tmp_path / "metrics.json") == whole


def test_csv_and_latex_hold_every_number_and_verdict(table: ResultsTable) -> None:
    whole = replace(table, references={"real_100%": {"fd_effnet": MetricValue(1.5, None, None, "lower")}})
    rows = list(csv.DictReader(io.StringIO(csv_text(whole))))
    assert len(rows) == 7
    by_name = {(row["row"], row["metric"]): row for row in rows}
    assert by_name["strength 1", "fd_effnet"]["verdict"] == "better"
    assert float(by_name["strength 1", "fd_effnet"]["p_holm"]) < 0.05
    assert by_name["strength 1", "attr_color"]["verdict"] == "cannot tell"
    assert by_name["frozen backbone", "fd_effnet"]["verdict"] == ""
    assert float(by_name["real_100%", "fd_effnet"]["value"]) == 1.5
    text = latex(whole)
    assert r"\textbf{20.0} {\scriptsize [18.9, 21.1]}" in text and r"real\_100\%" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 5
    for line in text.splitlines():  # outside comments no character that LaTeX would trip over
        assert line.startswith("%") or not re.search(r"(?<!\\)[_%#]", line), line


def test_metrics_json_says_what_version_and_refuses_later_ones(table: ResultsTable, tmp_path: Path) -> None:
    write_page(tmp_path, _page(table))
    data = json.loads((tmp_path / "metrics.json").read_text())
    assert data["schema"] == 2 and data["command"] == "python evaluate.py run=x" and "torch" in data["environment"]
    verdicts = {(row["method"], row["metric"]): row["verdict"] for row in data["comparisons"]}
    assert verdicts == {("strength 1", "fd_effnet"): "better", ("strength 1", "attr_color"): "cannot tell"}
    (tmp_path / "metrics.json").write_text(json.dumps({**data, "schema": 3}))
    with pytest.raises(ConfigError, match="schema 3"):
        load_table(tmp_path / "metrics.json")
    first = {k: v for k, v in data.items() if k not in ("schema", "references", "curves", "comparisons")}
    (tmp_path / "metrics.json").write_text(json.dumps(first))
    assert load_table(tmp_path / "metrics.json") == table  # tables of before are still read


def test_a_missing_plot_and_a_folder_that_cannot_be_written_are_told(table: ResultsTable, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.png"):
        write_page(tmp_path, _page(table, plots=[tmp_path / "absent.png"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_page(tmp_path / "file", _page(table))


def test_the_best_and_worst_are_those_of_the_metric() -> None:
    pictures = [np.full((4, 4, 3), k, np.uint8) for k in range(9)]
    values = {"color_garment": torch.tensor([5.0, 1, 9, 3, torch.nan, 8, 2, 7, 6]), "psnr": torch.arange(9.0)}
    captions = [f"c{k}" for k in range(9)]
    (grid,) = extremes("m", values, captions, {"m": pictures, "other": pictures}, [None] * 9, list(pictures))
    assert [row.caption for row in grid.rows] == [
        "c1 (best: 1)", "c6 (best: 2)", "c3 (best: 3)", "c2 (worst: 9)", "c5 (worst: 8)", "c7 (worst: 7)",
    ]  # fmt: skip
    assert grid.columns == ["m", "real"] and grid.rows[0].cells[0] is pictures[1]


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


def test_curves_of_a_run_that_was_resumed_are_whole(tmp_path: Path) -> None:
    """Killed at step 5 and gone on with from 4, and once more when there was nothing left to do."""
    for name, steps in (("metrics_before_0", range(6)), ("metrics_before_1", range(4, 8)), ("metrics_before_2", ())):
        lines = [f"{step},{step + 10 * (name == 'metrics_before_1')}" for step in steps]
        (tmp_path / f"{name}.csv").write_text("\n".join(["step,train/loss", *lines]) + "\n")
    steps, values = plots.read_metrics(tmp_path / "metrics.csv")["train/loss"]
    assert steps == list(range(8)) and values == [0, 1, 2, 3, 14, 15, 16, 17]
    (tmp_path / "metrics.csv").write_text("step,val/loss,train/loss\n6,1,26\n")
    assert plots.read_metrics(tmp_path / "metrics.csv")["train/loss"][1] == [0, 1, 2, 3, 14, 15, 26]


def test_more_methods_than_colors_all_have_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "_save", lambda figure, output: figure)
    names = [f"method {k}" for k in range(9)]
    power: Any = plots.plot_band_power({name: torch.full((8,), 0.5) for name in names}, torch.ones(8), tmp_path)
    sizes = {name: SizeCurve([16, 32], [2.0, 1.0], None, "few") for name in names}
    (curves,) = plots.plot_sizes({"fd_effnet": sizes}, tmp_path)
    log = tmp_path / "metrics.csv"
    log.write_text(f"step,{','.join(names)}\n0,{','.join('123456789')}\n")
    losses = plots.plot_curves(log, tmp_path / "loss.svg", {name: name for name in names}, "Loss")
    for figure in (power, curves, losses):
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == names


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
