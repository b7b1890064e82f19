"""The table over many runs, on made-up run folders: what varies, what is best, what lies on the front."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from scipy import stats
from test_training_tracking import nested, read_offline, records

from lora_dae.config import Config, ConfigError, to_dict
from lora_dae.evaluation.report.table import MetricValue
from lora_dae.evaluation.run import _summary
from lora_dae.sweep.__main__ import main
from lora_dae.sweep.files import write_json
from lora_dae.sweep.plots import leading_metrics
from lora_dae.sweep.report import report_if_any, write_sweep_report
from lora_dae.sweep.table import find_runs, network_calls, over_seeds, read_sweep

PROTOCOL = {
    "num_generated": 8, "num_reference": 8, "split": "test", "resolution": 64, "sampler": "ddim", "steps": 4,
    "guidance_scale": 2.0, "source_guidance_scale": None, "seeds": [0], "features": "effnet", "bootstrap": 10,
}  # fmt: skip


def make_run(folder: Path, rank: int, strength: float, distance: float, lsd: float = 0.1, seed: int = 0) -> None:
    """A run folder with an adapter of 1000 * rank bytes, kohya's copy of it, and the given results at its strength."""
    cfg = Config(run_dir=str(folder), name=f"rank{rank}", seed=seed)
    cfg.adapter.rank = rank
    cfg.enhancement.strength = strength
    (folder / "adapter").mkdir(parents=True)
    for name in ("pytorch_lora_weights.safetensors", "adapter_kohya.safetensors"):
        (folder / "adapter" / name).write_bytes(bytes(1000 * rank))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))))

    def metrics(fd: float) -> dict[str, dict[str, float | str | None]]:
        return {
            "fd_effnet": {"value": fd, "low": fd - 0.5, "high": fd + 0.5, "better": "lower"},
            "ssim_garment": {"value": 1 / fd, "low": None, "high": None, "better": "higher"},
            "lsd": {"value": lsd, "low": lsd, "high": lsd, "better": "lower"},
        }

    methods = {"strength 0": metrics(100.0)}
    methods[f"strength {strength:g}"] = metrics(distance)
    (folder / "metrics.json").write_text(
        json.dumps({"protocol": PROTOCOL, "baseline": "strength 0", "methods": methods})
    )


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    distances = {(4, 0.0): 9.0, (4, 1.0): 8.0, (16, 0.0): 5.0, (16, 1.0): 3.0, (64, 0.0): 3.2, (64, 1.0): 6.0}
    for number, ((rank, strength), distance) in enumerate(distances.items()):
        make_run(tmp_path / f"{number}_rank{rank}", rank, strength, distance)
    return tmp_path


def test_the_varied_keys_are_found_and_the_runs_own_strength_is_shown(sweep: Path) -> None:
    table = read_sweep(sweep)
    assert table.varied == ["adapter.rank", "enhancement.strength"]
    assert {row.label: row.metrics["fd_effnet"].value for row in table.rows}["rank 16, strength 1"] == 3.0
    assert table.headline() == "fd_effnet"
    assert table.best("fd_effnet").label == "rank 16, strength 1"
    assert table.best("ssim_garment").label == "rank 16, strength 1"
    assert [row.label for row in table.tied("fd_effnet")] == ["rank 64, strength 0"]  # [2.7, 3.7] and [2.5, 3.5]


@pytest.mark.parametrize(
    ("kept", "without", "said"),
    [
        ([2, 3], (), "No other configuration's interval overlaps its own."),
        ([3, 4], (), "Its interval overlaps that of 1 other: rank 64, strength 0."),
        ([2, 3], (2, 3), "Not every configuration has an interval: nothing says whether the others are worse."),
        ([2, 3], (2,), "Not every configuration has an interval: nothing says whether the others are worse."),
        ([3], (), None),
    ],
    ids=["apart", "overlaps", "no intervals", "one interval", "one row"],
)
def test_the_best_is_ahead_only_where_intervals_say_so(
    kept: list[int], without: tuple[int, ...], said: str | None, sweep: Path
) -> None:
    """Of rank 16 without and with the module, 5 and 3, and of rank 64 without, 3.2; each give or take a half."""
    for number, run in enumerate(find_runs(sweep)):
        if number not in kept:
            (run / "metrics.json").unlink()
        if number in without:
            change(run, lambda told: [row["fd_effnet"].update(low=None, high=None) for row in told["methods"].values()])
    html = write_sweep_report(sweep).read_text()
    for words in ("Its interval overlaps", "No other configuration", "Not every configuration"):
        assert html.count(words) == (said is not None and said.startswith(words))
    assert said is None or said in html


def change(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Of what a run's metrics.json says."""
    told = json.loads((run / "metrics.json").read_text())
    edit(told)
    write_json(run / "metrics.json", told)


def test_what_the_rows_do_not_share_is_told_of_none(sweep: Path) -> None:
    """The page's protocol and warnings are those of all runs."""
    runs = find_runs(sweep)
    change(runs[0], lambda told: told["protocol"].update(steps=8, warnings=["few images", "of one kind"]))
    change(runs[1], lambda told: told["protocol"].update(warnings=["few images", "the validation split"]))
    table = read_sweep(sweep)
    assert "Sampling: differs by row" in table.protocol and "ddim" not in table.protocol
    assert "8 generated, 8 real images (test split)" in table.protocol
    html = write_sweep_report(sweep).read_text()
    for words in ("few images", "of one kind", "the validation split"):
        assert html.count(f"Warning: {words}.") == 1


def test_a_report_of_the_folder_one_is_in(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs with a number and without in front; its title is the folder's name, which "." does not say."""
    make_run(sweep / "mine", 8, 1.0, 4.0)
    monkeypatch.chdir(sweep)
    monkeypatch.setattr(sys, "argv", ["sweep", "."])
    main()
    assert capsys.readouterr().out == "report.html\n"
    assert f"<h1>{sweep.name}</h1>" in (sweep / "report.html").read_text()
    (sweep / "empty").mkdir()
    monkeypatch.chdir(sweep / "empty")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_the_front_is_what_nothing_smaller_beats(sweep: Path) -> None:
    table = read_sweep(sweep)
    assert [row.label for row in table.pareto("fd_effnet", "adapter_mb")] == [
        "rank 4, strength 1", "rank 16, strength 1",
    ]  # fmt: skip
    assert [row.costs["adapter_mb"] for row in table.pareto("fd_effnet", "adapter_mb")] == [0.004, 0.016]


def test_an_adapters_size_is_that_of_what_was_trained_each_once(tmp_path: Path) -> None:
    """Table and page alike; the copy for other programs is no weight more, a module and a whole UNet are."""
    make_run(tmp_path / "run", 500, 1.0, 3.0)
    (tmp_path / "run" / "adapter" / "unet").mkdir()
    for name in ("enhancement.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        (tmp_path / "run" / "adapter" / name).write_bytes(bytes(10**6))
    assert read_sweep(tmp_path).rows[0].costs["adapter_mb"] == 2.5
    assert _summary(tmp_path / "run", Config(run_dir="x"))["Adapter"] == "rank 16, 2.5 MB"


def test_pictures_show_texture_inside_the_garment_where_photos_have_masks(sweep: Path) -> None:
    table = read_sweep(sweep)
    assert leading_metrics(table) == ["fd_effnet", "lsd", "ssim_garment"]
    for row in table.rows:
        row.metrics["lsd_garment"] = row.metrics.pop("lsd")
    assert leading_metrics(table) == ["fd_effnet", "lsd_garment", "ssim_garment"]


def test_csv_and_latex_hold_the_numbers(sweep: Path) -> None:
    write_sweep_report(sweep)
    with (sweep / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    row = next(r for r in rows if r["configuration"] == "rank 16, strength 1")
    assert (float(row["adapter.rank"]), float(row["fd_effnet"]), float(row["fd_effnet_low"])) == (16, 3.0, 2.5)
    latex = (sweep / "table.tex").read_text()
    assert latex.count(r" \\") == 7 and latex.count("&") == 7 * latex.splitlines()[2].count("&")
    assert r"\textbf{" in next(line for line in latex.splitlines() if line.startswith("rank 16, strength 1"))
    assert r"fd\_effnet $\downarrow$" in latex


def test_report_is_one_file_with_all_pictures(sweep: Path) -> None:
    write_json(sweep / "9_x" / "job.json", {"state": "failed", "label": "adapter.rank=<b>", "error": "boom"})
    html = write_sweep_report(sweep).read_text()
    for name in ("heat_fd_effnet", "heat_ssim_garment", "curves", "pareto"):
        with Image.open(sweep / "plots" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 0
    assert html.count("data:image/png;base64,") == 5
    assert "http" not in html and "<strong>rank 16, strength 1</strong>" in html
    assert "adapter.rank=&lt;b&gt;: failed, boom" in html


def test_the_report_is_a_run_in_the_sweeps_group_of_wandb(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read back from the offline run's file: the table, the heat maps as charts of W&B's own kind, the pictures."""
    report_if_any(sweep)
    assert f"report   {sweep / 'report.html'}" in capsys.readouterr().out
    run, rows, _ = read_offline(sweep)
    assert (run.project, run.run_group, run.job_type) == ("lora-dae", sweep.name, "sweep")
    logged = {key: value for row in rows for key, value in row.items()}
    (files,) = sweep.glob("wandb/offline-run-*/files")

    def table(key: str) -> list[dict[str, Any]]:
        content = json.loads((files / logged[key]["path"]).read_text())
        return [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]

    with (sweep / "table.csv").open() as file:
        expected = {row["configuration"]: row for row in csv.DictReader(file)}
    shown = {row["configuration"]: row for row in table("sweep/table")}
    assert shown.keys() == expected.keys() and len(shown) == 6
    for name, row in shown.items():
        for column in ("adapter.rank", "enhancement.strength", "adapter_mb", "fd_effnet", "ssim_garment", "lsd"):
            assert row[column] == pytest.approx(float(expected[name][column]))
    heat = table("sweep/heat_fd_effnet_table")
    cells = {(row["adapter.rank"], row["enhancement.strength"]): row["fd_effnet"] for row in heat}
    assert cells[("16", "1.0")] == 3.0 and len(cells) == 6
    (path,) = sweep.glob("wandb/offline-run-*/*.wandb")
    told = [nested(r.config.update).get("_wandb", {}) for r in records(path) if r.WhichOneof("record_type") == "config"]
    charts = {key: chart for update in told for key, chart in update.get("visualize", {}).items()}
    assert charts.keys() == {"sweep/heat_fd_effnet", "sweep/heat_lsd", "sweep/heat_ssim_garment"}
    panel = charts["sweep/heat_fd_effnet"]["panel_config"]
    assert panel["panelDefId"] == "wandb/confusion_matrix/v1" and set(panel["fieldSettings"].values()) == set(heat[0])
    for path in sorted((sweep / "plots").glob("*.png")):
        with Image.open(files / logged[f"sweep/plots/{path.stem}"]["path"]) as logged_picture, Image.open(path) as own:
            assert np.array_equal(np.asarray(logged_picture), np.asarray(own))


def test_seeds_become_a_mean_with_students_interval(tmp_path: Path) -> None:
    values = [3.0, 4.0, 8.0]
    for seed, value in enumerate(values):
        make_run(tmp_path / str(seed), 4, 1.0, value, seed=seed)
    make_run(tmp_path / "other", 8, 1.0, 1.0)
    table = read_sweep(tmp_path)
    assert table.varied == ["adapter.rank"]
    merged = table.rows[0].metrics["fd_effnet"]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert low < 0 and (merged.value, merged.low, merged.high) == pytest.approx((5.0, 0.0, high))  # it is a distance
    kernel = over_seeds([{"kd_effnet": MetricValue(value, None, None, "lower")} for value in values])["kd_effnet"]
    assert (kernel.low, kernel.high) == pytest.approx((low, high))  # may be negative: its estimate has no bias
    assert len(table.rows[0].runs) == 3
    assert over_seeds([table.rows[1].metrics]) is table.rows[1].metrics


def test_a_run_that_was_repeated_is_no_second_seed(tmp_path: Path) -> None:
    for sweep, distance in (("first", 9.0), ("second", 8.0)):
        make_run(tmp_path / sweep / "0", 4, 0.5, distance)
    make_run(tmp_path / "second" / "1", 8, 0.5, 7.0)
    once, other = read_sweep(tmp_path).rows
    assert once.runs == (tmp_path / "second" / "0",) and other.metrics["fd_effnet"].value == 7.0
    assert (once.metrics["fd_effnet"].low, once.metrics["fd_effnet"].high) == (7.5, 8.5)  # its own, over images


def test_network_calls_of_a_picture() -> None:
    cfg = Config(run_dir="x")
    assert network_calls(cfg) == 24  # 12 steps, both guidance scales equal: two calls
    assert network_calls(replace(cfg, sampling=replace(cfg.sampling, source_guidance_scale=1.5))) == 36
    plain = replace(cfg.sampling, guidance_scale=1.0, source_guidance_scale=1.0)
    assert network_calls(replace(cfg, conditioning="none", sampling=plain)) == 12
    assert network_calls(replace(cfg, conditioning="none", sampling=replace(plain, scheduler="heun"))) == 23


@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc", "pndm", "euler", "heun", "lms"])
def test_network_calls_are_the_schedulers_timesteps(name: str) -> None:
    from diffusers import DDIMScheduler

    from lora_dae.sampling.schedulers import build_scheduler

    scheduler = build_scheduler(name, DDIMScheduler())
    scheduler.set_timesteps(8)
    cfg = Config(run_dir="x", conditioning="none")
    cfg.sampling.scheduler, cfg.sampling.num_inference_steps, cfg.sampling.guidance_scale = name, 8, 1.0
    assert network_calls(cfg) == len(scheduler.timesteps)


def test_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        make_run(tmp_path / f"{number}_x", 4, 1.0, 1.0, seed=number)
    assert [run.name for run in find_runs(tmp_path)] == ["1_x", "9_x", "10_x"]


def test_nothing_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no measured run"):
        read_sweep(tmp_path)
    report_if_any(tmp_path)
    assert capsys.readouterr().out == ""
