"""What W&B and TensorBoard are given, read back from their own files."""

from __future__ import annotations

import glob
import io
import json
import shlex
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
import yaml
from compose import config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from test_evaluation_folders import _folder
from test_evaluation_measure import TinyFeatures
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.lib.urls import DEFAULT_BASE_URL

from lora_dae.cli import typed
from lora_dae.config import Config, ConfigError, TrackingConfig, conf_dir, register, to_dict
from lora_dae.evaluation import folder_run
from lora_dae.evaluation.command import EvaluateRequest, evaluate
from lora_dae.rules import check
from lora_dae.training import run as training
from lora_dae.training import tracking
from lora_dae.training.page_log import page_logger

ROOT = Path(__file__).parent.parent
BLOCK, HEADER = 32768, 7
Make = Callable[..., Config]


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of an offline run: LevelDB's log format after a header of seven bytes (":W&B" ...)."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def nested(items: Any) -> dict[str, Any]:
    """Keys and JSON values as W&B shows them: media have keys of several parts."""
    row: dict[str, Any] = {}
    for item in items:
        *parents, last = item.nested_key or [item.key]
        place = row
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = json.loads(item.value_json)
    return row


def read_offline(run_dir: Path) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """(run record, rows of history, metric definitions by name) of the one offline run below ``run_dir``."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    deadline, found = time.monotonic() + 60, list(records(path))
    while not any(r.WhichOneof("record_type") == "exit" for r in found):
        assert time.monotonic() < deadline  # W&B's own process writes the last block after finish() has returned
        time.sleep(0.05)
        found = list(records(path))
    run = next(r.run for r in found if r.WhichOneof("record_type") == "run")
    rows = [nested(r.history.item) for r in found if r.WhichOneof("record_type") == "history"]
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in found if r.WhichOneof("record_type") == "metric"}
    return run, rows, metrics


def kept_summary(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Filled with the run's summary as W&B has it when the run ends: what its plots over runs read."""
    found: dict[str, Any] = {}
    finish = wandb.Run.finish

    def look(run: Any, *args: Any, **options: Any) -> None:
        found.update({key: run.summary.get(key) for key in ("test/fd_effnet", "test/table")})
        finish(run, *args, **options)

    monkeypatch.setattr(wandb.Run, "finish", look)
    return found


@pytest.fixture
def make(tiny_backbone: Path, tmp_path: Path) -> Make:
    def build(*overrides: str) -> Config:
        options = ("adapter.rank=2", "evaluation.frozen=false", *overrides)
        return config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options)

    return build


def test_offline_run_holds_everything(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    cfg = make(
        "tracking.wandb=offline", "tracking.group=together", "tracking.tags=[mine]", "tracking.sample_every_n_steps=2",
        "enhancement.strength=0.5", "trainer.log_every_n_steps=1", "tracking.num_grid_prompts=3",
        "tracking.distance_every_n_steps=2",
    )  # fmt: skip
    summary = kept_summary(monkeypatch)
    result = training.run(cfg)
    assert result.table is not None
    assert wandb.run is None  # closed: the next run of this process gets one of its own
    run, rows, metrics = read_offline(result.run_dir)
    assert (run.project, run.run_group, run.job_type) == ("lora-dae", "together", "train")
    assert set(run.tags) == {"mine", "default", "source"}
    told = nested(run.config.update)
    assert {key: value for key, value in told.items() if key != "_wandb"} == to_dict(cfg)
    columns = {name: [row[name] for row in rows if name in row] for name in {key for row in rows for key in row}}
    assert len(columns["train/loss"]) == 4 + 2 + 2 + 1  # every step of every stage
    assert {"val/loss", "val/fd_effnet", "images/s", "enhancement/power_gap", "val/samples"} <= set(columns)
    steps = columns["trainer/global_step"]
    assert steps == sorted(steps) and steps[-1] == 9
    assert columns["_step"] == sorted(set(columns["_step"]))
    for method, row in result.table.methods.items():
        for name, metric in row.items():
            assert columns[f"test/{method}/{name}".replace(" ", "_")] == [metric.value]
    assert columns["test/fd_effnet"] == columns["test/strength_0.5/fd_effnet"]
    for name in ("val/samples", "test/grid"):  # pictures, of which W&B keeps copies
        assert columns[name]
        for path in (path for shown in columns[name] for path in shown["filenames"]):
            (file,) = result.run_dir.glob(f"wandb/offline-run-*/files/{path}")
            with Image.open(file) as picture:
                assert np.asarray(picture).std() > 0
    split, _, metric = wandb_sweep()["metric"]["name"].partition("/")
    assert split == "val" and f"test/{metric}" in columns  # chosen on the one, measured here on the other
    samples = columns["test/samples"][0]
    (table,) = result.run_dir.glob(f"wandb/offline-run-*/files/{samples['path']}")
    content = json.loads(table.read_text())
    assert content["columns"] == ["prompt", "source", "strength 0", "strength 0.5", "real"]
    assert len(content["data"]) == 3
    numbers = columns["test/table"][0]
    (table,) = result.run_dir.glob(f"wandb/offline-run-*/files/{numbers['path']}")
    rows = {(row[0], row[2]): row[3] for row in json.loads(table.read_text())["data"]}
    assert rows["strength 0", "fd_effnet"] == pytest.approx(result.table.methods["strength 0"]["fd_effnet"].value)
    assert metrics["val/loss"].summary.min and metrics["images/s"].summary.max
    assert [summary["test/fd_effnet"]] == columns["test/fd_effnet"]
    assert summary["test/table"]["_type"] == "table-file"


def test_a_page_of_finished_pictures_goes_to_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "made", 0, 4), _folder(tmp_path / "real", 100, 4)
    monkeypatch.setattr(folder_run, "load_features", lambda name: TinyFeatures())
    words = [f"images={tmp_path / 'made'}", f"reference={tmp_path / 'real'}", f"output={tmp_path / 'out'}"]
    words += [f"cache_dir={tmp_path / 'cache'}", "bootstrap=0", "controls=false"]

    def page(*more: str) -> dict[str, Any]:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("evaluate", [*words, *more])
        request = EvaluateRequest(**OmegaConf.to_container(cfg))  # type: ignore[arg-type]
        quiet = Console(quiet=True)
        evaluate(request, quiet, page_logger(TrackingConfig(**request.tracking), quiet))
        return json.loads((tmp_path / "out" / "metrics.json").read_text())

    page()
    assert not (tmp_path / "out" / "wandb").exists()  # nothing is logged unless it is asked for
    with pytest.raises(ConfigError, match="not to csv"):
        page("logger=csv")
    numbers = page("logger=wandb", "tracking.wandb=offline", "tracking.tags=[mine]")
    assert wandb.run is None
    run, rows, _ = read_offline(tmp_path / "out")
    assert (run.project, run.job_type, list(run.tags), run.display_name) == ("lora-dae", "evaluate", ["mine"], "out")
    assert nested(run.config.update)["protocol"]["num_generated"] == 4
    told = {key: value for row in rows for key, value in row.items()}
    for name, metric in numbers["methods"]["made"].items():
        assert told[f"test/made/{name}"] == metric["value"]

    def table(key: str) -> dict[str, Any]:
        (path,) = (tmp_path / "out").glob(f"wandb/offline-run-*/files/{told[key]['path']}")
        return json.loads(path.read_text())

    values = {row[2]: row[3] for row in table("test/table")["data"]}
    assert values["fd_tiny"] == numbers["methods"]["made"]["fd_tiny"]["value"]
    (pictures,) = (key for key in told if key.startswith("pictures/"))
    shown = table(pictures)
    assert shown["columns"] == ["prompt", "made", "real"] and len(shown["data"]) == 4
    (html,) = (tmp_path / "out").glob(f"wandb/offline-run-*/files/{told['report']['path']}")
    assert "data:image/png;base64," in html.read_text()


def test_no_logger_and_tensorboard(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = training.run(make("logger=none", "trainer.max_steps=1", "enhancement=none"))
    assert (result.run_dir / "report.html").is_file()
    assert not (result.run_dir / "csv").exists() and not (result.run_dir / "wandb").exists()
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora-dae\[tensorboard\]"):
        training.run(make("logger=tensorboard"))


def test_tensorboard_gets_curves_of_both_stages(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cfg = Config(run_dir=str(tmp_path), tracking=TrackingConfig(logger="tensorboard"))

    loggers = tracking.build_loggers(cfg, tmp_path, {}, Console(quiet=True))
    tracking.log_metrics(tracking.trackers(loggers), {"train/loss": 2.0}, 3)
    tracking.log_metrics(tracking.stage_loggers(loggers, tmp_path, "enhancement", 4), {"train/loss": 1.0}, 1)
    tracking.finish(loggers)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 2.0), (5, 1.0)]


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "logger").glob("*.yaml")))
def test_every_logger_config_names_its_logger(name: str) -> None:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = typed(compose("train", [f"logger={name}", "run_dir=x"]))
    check(cfg)
    assert cfg.tracking.logger == name


def test_an_unknown_logger_is_named() -> None:
    with pytest.raises(ConfigError, match="tracking.logger=loud"):
        check(Config(run_dir="x", tracking=TrackingConfig(logger="loud")))


def wandb_sweep() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "experiments" / "wandb_sweep.yaml").read_text())


def test_wandb_sweep_is_one_hydra_command_per_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own code turns the file into the agent's command; Hydra and the config's checks take all its corners.

    By its id, which the agent puts into the environment, each trial has a folder of its own.
    """
    sweep = wandb_sweep()
    register()
    assert (ROOT / sweep["program"]).is_file()
    for end in (0, -1):
        values = {
            name: (entry["values"] if "values" in entry else [entry["min"], entry["max"]])[end]
            for name, entry in sweep["parameters"].items()
        }
        arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
        macros = {
            "${env}": ["/usr/bin/env"],
            "${program}": [sweep["program"]],
            "${args_no_hyphens}": arguments["args_no_hyphens"],
        }  # noqa: E501
        command = [word for part in create_sweep_command(list(sweep["command"])) for word in macros.get(part, [part])]
        assert command[:3] == ["/usr/bin/env", "python", "train.py"]
        monkeypatch.setenv("WANDB_RUN_ID", f"trial{end}")
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = typed(compose("train", [*command[3:], "run_dir=x"]))
            whole = compose("train", [*command[3:], "run_dir=x"], return_hydra_config=True)
        check(cfg)
        assert whole.hydra.run.dir == f"runs/wandb_sweep/trial{end}"
        assert cfg.evaluation.split == sweep["metric"]["name"].partition("/")[0]
        assert cfg.store == "multirun/store" and cfg.enhancement.strength == values["enhancement.strength"]
        assert cfg.optimizer.learning_rate == pytest.approx(values["optimizer.learning_rate"])


LOGIN = "machine api.wandb.ai login user password {}\n".format("k" * 40)
OWN_LOGIN = LOGIN.replace("api.wandb.ai", DEFAULT_BASE_URL.removeprefix("https://"))  # what wandb login writes today
OTHER_LOGIN = LOGIN.replace("api.wandb.ai", "own.org")
HOST = {".config/wandb/settings": "[default]\nbase_url = https://own.org\n"}  # as wandb login --host does


@pytest.mark.parametrize(
    ("environment", "files", "mode"),
    [
        ({}, {}, "offline"),
        ({"WANDB_API_KEY": "k"}, {}, "online"),
        ({}, {".netrc": LOGIN}, "online"),
        ({}, {".netrc": OWN_LOGIN}, "online"),
        ({}, {".netrc": OTHER_LOGIN, **HOST}, "online"),
        ({}, {".netrc": OWN_LOGIN, **HOST}, "offline"),
        ({"WANDB_BASE_URL": DEFAULT_BASE_URL}, {".netrc": OTHER_LOGIN, **HOST}, "offline"),
        ({"WANDB_CONFIG_DIR": "elsewhere"}, {".netrc": OTHER_LOGIN, **HOST}, "offline"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, {}, "online"),
        ({}, {".netrc": LOGIN.replace("wandb", "else")}, "offline"),
        ({}, {".netrc": "nonsense"}, "offline"),
        ({"NETRC": "elsewhere"}, {"elsewhere": LOGIN}, "online"),
        ({"NETRC": "elsewhere"}, {".netrc": LOGIN}, "offline"),  # W&B would not look there either
        ({"WANDB_BASE_URL": "https://own.org"}, {".netrc": LOGIN}, "offline"),
        ({"WANDB_BASE_URL": "https://own.org/"}, {".netrc": LOGIN.replace("api.wandb.ai", "own.org")}, "online"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, {}, "offline"),
        ({"WANDB_MODE": "dryrun", "WANDB_API_KEY": "k"}, {}, "offline"),  # W&B's older names
        ({"WANDB_MODE": "run"}, {}, "online"),
        ({"WANDB_MODE": "disabled"}, {}, "disabled"),
    ],
    ids=str,
)  # fmt: skip
def test_wandb_is_online_with_a_login_and_offline_without(
    environment: dict[str, str], files: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MODE", "API_KEY", "BASE_URL", "CONFIG_DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / value) if name in ("NETRC", "WANDB_CONFIG_DIR") else value)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert tracking.wandb_mode("auto") == mode
    assert tracking.wandb_mode("disabled") == "disabled"  # what is asked for counts


def test_a_run_after_an_offline_one_says_how_to_upload_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process, as in a sweep's job that trains and then measures: Lightning's own logger sets WANDB_MODE."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("trains", "measures it"):
        (tmp_path / name).mkdir()
        logger = tracking.wandb_logger(TrackingConfig(), tmp_path / name, {}, Console(soft_wrap=True))
        assert logger is not None and logger.experiment.offline
        tracking.finish([logger])
        command = shlex.split(capsys.readouterr().out.partition("later with: ")[2])
        assert command[:2] == ["wandb", "sync"] and len(glob.glob(command[2])) == 1


def test_tensorboard_gets_a_trainings_curves_and_pictures(make: Make) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = training.run(
        make(
            "logger=tensorboard",
            "tracking.sample_every_n_steps=2",
            "trainer.log_every_n_steps=1",
            "enhancement=gain",
            "trainer.max_steps=3",
        )  # fmt: skip
    )
    assert result.table is not None
    events = reader.EventAccumulator(str(result.run_dir / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [0, 1, 2, 3]  # the adapter's three and the gain's
    assert [e.step for e in events.Scalars("val/loss")] == [2]
    (found,) = events.Scalars("test/strength_0/fd_effnet")
    assert found.value == pytest.approx(result.table.methods["strength 0"]["fd_effnet"].value)
    for name, path in (("val/samples", "samples/step_000002.png"), ("test/grid", "samples/grid.png")):
        (picture,) = events.Images(name)
        with Image.open(io.BytesIO(picture.encoded_image_string)) as shown, Image.open(result.run_dir / path) as own:
            assert np.array_equal(np.asarray(shown), np.asarray(own.convert("RGB")))
