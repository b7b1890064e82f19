"""The commands as a user types them: one sentence for a mistake, an exit code, no traceback."""

from __future__ import annotations

import errno
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from lora_dae.cli import JobError, _one_sentence, train
from lora_dae.config import Config, ConfigError, DataConfig, EvaluationConfig, conf_dir, from_dict, to_dict
from lora_dae.evaluation.command import EvaluateRequest, command_of, evaluate, folder_of, requested
from lora_dae.rules import check
from lora_dae.sweep.jobs import INPUT_ERROR
from lora_dae.sweep.report import SweepReport
from lora_dae.training.ended import NonFiniteLossError

ROOT = Path(__file__).parent.parent


def command(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.py", "experiment=rank99"), "rank99"),
        (("train.py", "adapter.rnak=3"), "rnak"),
        (("train.py", "adapter.rank=many"), "many"),
        (("train.py", "enhancement.strength=-1"), "enhancement.strength=-1"),
        (("sample.py", "run=nowhere"), "run=nowhere does not exist"),
        (("evaluate.py", "run=nowhere"), "run=nowhere does not exist"),
        (("export.py", "run=nowhere"), "run=nowhere does not exist"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = command(tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("train", "enhancement.strength=-1"),
        ("sample", "run=nowhere"),
        ("evaluate", "run=nowhere"),
        ("export", "run=nowhere"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported_and_leaves_no_folder(
    name: str, mistake: str, tmp_path: Path
) -> None:
    """Which takes several times as long as all else."""
    code = f"import sys; from lora_dae.cli import {name}\ntry: {name}()\nfinally: print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    given = [sys.executable, "-c", code, mistake]
    done = subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert mistake in done.stderr and done.stdout.split() == ["False"]
    assert not [path for path in tmp_path.rglob("*") if path.name != "runs"]


def test_data_that_cannot_be_read_leave_no_folder(tmp_path: Path) -> None:
    done = command(tmp_path, "train.py", "data=folder", "data.root=nowhere")
    assert done.returncode == INPUT_ERROR and not [path for path in tmp_path.rglob("*") if path.name != "runs"]


def test_a_refused_run_leaves_a_folder_with_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    done = command(tmp_path, "train.py", "enhancement.strength=-1", "hydra.run.dir=mine")
    assert done.returncode == INPUT_ERROR and (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_every_config_begins_with_the_command_that_runs_it() -> None:
    files = sorted(conf_dir().rglob("*.yaml"))
    assert len(files) >= 20
    for file in files:
        head = file.read_text(encoding="utf-8").splitlines()[:2]
        assert any(line.startswith("# python ") for line in head), file


def test_config_survives_its_yaml() -> None:
    cfg = Config(run_dir="somewhere")
    assert from_dict(to_dict(cfg)) == cfg
    check(cfg)


def test_a_full_disk_is_one_sentence_and_other_errors_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(number: int) -> None:
        raise OSError(number, os.strerror(number), "runs/a/report.html")

    with pytest.raises(SystemExit):
        _one_sentence(lambda cfg: fails(errno.ENOSPC))(OmegaConf.create())
    assert capsys.readouterr().err == (
        "error: no room left to write runs/a/report.html: make some; earlier files stay.\n"
    )
    with pytest.raises(PermissionError):
        _one_sentence(lambda cfg: fails(errno.EACCES))(OmegaConf.create())


def test_a_loss_that_is_not_finite_is_no_mistake_in_the_input(capsys: pytest.CaptureFixture[str]) -> None:
    """A search stops at a mistake: at a learning rate that diverges it goes on with others."""

    def fails(error: Exception) -> None:
        raise error

    for error, code in ((NonFiniteLossError("the loss became nan"), 1), (ConfigError("a mistake"), INPUT_ERROR)):
        with pytest.raises(SystemExit) as ended:
            _one_sentence(lambda cfg, error=error: fails(error))(OmegaConf.create())  # type: ignore[misc]
        assert ended.value.code == code
        assert capsys.readouterr().err == f"error: {error}\n"


def test_a_job_that_hydra_runs_itself_never_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray and submitit run it in their own processes, where Hydra takes up an Exception and no SystemExit."""
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN}}))

    def fails(cfg: object) -> None:
        raise ConfigError("adapter.rank=0 is below 1.")

    with pytest.raises(JobError, match="^adapter.rank=0 is below 1.$") as caught:
        _one_sentence(fails)(OmegaConf.create())
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it comes from another process


@pytest.mark.parametrize(("code", "reports"), [(1, 1), (130, 0)], ids=["failed", "stopped"])
def test_a_sweep_with_failures_ends_with_its_report(
    code: int, reports: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[Path] = []

    def ends() -> None:
        SweepReport().on_multirun_start(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
        raise SystemExit(code)

    monkeypatch.setattr(SweepReport, "due", None)
    monkeypatch.setattr("lora_dae.sweep.report.report_if_any", told.append)
    monkeypatch.setattr("lora_dae.cli._train", ends)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == code and told == [tmp_path] * reports


def _request(*words: str) -> EvaluateRequest:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return EvaluateRequest(**OmegaConf.to_container(compose("evaluate", list(words))))  # type: ignore[arg-type]


def test_evaluating_again_overrides_what_is_given_and_keeps_the_rest() -> None:
    options = ["run=x", "lpips=weights.safetensors", "clip=folder", "controls=false", "dists=true", "num_samples=7"]
    options += ["clean_fid=true", "dinov2=dino", "cmmd=clip", "frozen=false", "bootstrap=9", "features=inception"]
    cfg = Config(run_dir="x", evaluation=EvaluationConfig(bootstrap=33, clip="own"))
    assert requested(cfg, _request("run=x")) == cfg
    changed = requested(cfg, _request(*options, "guidance_scale=1.4", "seed=5", "strength=0.5"))
    assert changed.evaluation == EvaluationConfig(
        7, "inception", False, 9, "weights.safetensors", True, "folder", True, "dino", "clip", False
    )
    assert (changed.sampling.guidance_scale, changed.sampling.seed, changed.enhancement.strength) == (1.4, 5, 0.5)
    assert changed.sampling.scheduler == cfg.sampling.scheduler


def test_the_studio_has_as_many_test_pairs_as_are_asked_for() -> None:
    studio = Config(run_dir="x", data=DataConfig(test_size=8, val_size=4))
    assert requested(studio, _request("run=x", "num_samples=6")).data == studio.data
    assert requested(studio, _request("run=x", "num_samples=20")).data.test_size == 20
    assert requested(studio, _request("run=x", "num_samples=20", "split=val")).data.val_size == 20
    assert requested(studio, _request("run=x", "num_samples=20", "first_pair=5")).data.test_size == 25
    photos = Config(run_dir="x", data=DataConfig(name="folder", root="photos", test_size=8))
    assert requested(photos, _request("run=x", "num_samples=20")).data == photos.data


def test_other_settings_than_the_runs_own_get_a_folder_of_their_own(tmp_path: Path) -> None:
    cfg = Config(run_dir="x")

    def folder(*words: str) -> Path:
        request = _request("run=x", *words)
        return folder_of(tmp_path, cfg, requested(cfg, request))

    assert folder() == folder(f"guidance_scale={cfg.sampling.guidance_scale}") == tmp_path
    assert folder("guidance_scale=1.4") == tmp_path / "evaluations" / "guidance_scale=1.4"
    assert folder("split=val", "seed=3").name == "seed=3,split=val"
    assert folder("controls=false").name == "controls=false"  # as it is typed
    assert folder("lpips=some/where/alex.safetensors").name == "lpips=alex"  # no path becomes folders
    long = [f"{key}={'x' * 60}" for key in ("dinov2", "cmmd")]
    assert folder(*long) != folder(*long[:1], "cmmd=other") and len(folder(*long).name) < 120


def test_drawing_in_less_memory_leaves_the_report_where_it_is(tmp_path: Path) -> None:
    """Batches change no picture; tiles change a few pixels at their seams."""
    cfg = Config(run_dir="x")
    sampling = requested(cfg, _request("run=x", "batch_size=4", "tiled_decode=true")).sampling
    assert (sampling.batch_size, sampling.tiled_decode) == (4, True)
    assert folder_of(tmp_path, cfg, requested(cfg, _request("run=x", "batch_size=4"))) == tmp_path
    tiled = folder_of(tmp_path, cfg, requested(cfg, _request("run=x", "batch_size=4", "tiled_decode=true")))
    assert tiled == tmp_path / "evaluations" / "tiled_decode=true"


def test_models_that_a_run_asks_for_can_be_left_out(tmp_path: Path) -> None:
    """null means the run's own."""
    cfg = Config(run_dir="x", evaluation=EvaluationConfig(clip="gone", lpips="gone", dinov2="dino", cmmd="clip"))
    assert requested(cfg, _request("run=x", "clip=null")).evaluation.clip == "gone"
    without = requested(cfg, _request("run=x", "clip=none", "lpips=none"))
    assert without.evaluation == EvaluationConfig(dinov2="dino", cmmd="clip")
    assert folder_of(tmp_path, cfg, without).name == "lpips=none,clip=none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of run="),
        (("run=a", "images=b"), "not run and images together"),
        (("images=a",), "images= needs reference="),
        (("run=a", "reference=b"), "reference belongs to images=, not to run="),
        (("images=a", "reference=b", "strength=1"), "strength belongs to run=, not to images="),
        (("images=a", "reference=b", "sampling_method=pag"), "sampling_method belongs to run="),
        (("runs=[a,b]", "sampling_method=pag"), "sampling_method belongs to run=, not to runs="),
        (("runs=[a,b]", "batch_size=4"), "batch_size belongs to run=, not to runs="),
        (("images=a", "reference=b", "tiled_decode=true"), "tiled_decode belongs to run=, not to images="),
        (("images=a", "reference=b", "clip=c"), "clip needs prompts"),
        (("runs=[a,b]", "paired=true"), "paired belongs to images="),
        (("run=a", "split=train"), "split=train is unknown"),
        (("images=a", "reference=b", "bootstrap=1"), "bootstrap=1"),
        (("runs=[a,b]", "baseline=c"), "baseline=c is none of the methods"),
        (("runs=[a,b]", "features=inception", "clean_fid=true"), "both give a metric called fid"),
        (("runs=[a,b]", "features=vgg"), "evaluation.features=vgg is unknown"),
    ],
)
def test_requests_that_do_not_fit_are_one_sentence(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(_request(*words), Console(quiet=True))
    assert "\n" not in str(caught.value)


def test_the_printed_command_makes_the_same_request() -> None:
    request = _request("runs=[runs/a,'b=runs/c@0']", "baseline=b", "controls=false", "bootstrap=50")
    program, file, *printed = shlex.split(command_of(request))
    assert (program, file) == ("python", "evaluate.py") and sorted(printed)[1:] == [
        "bootstrap=50", "controls=false", "runs=[runs/a,'b=runs/c@0']",
    ]  # fmt: skip
    assert _request(*printed) == request
    for words in (
        ("run='runs/rank=4,seed=0 (größer)'", "strength=0.5", 'output="it\'s"'),
        ("runs=['x,y','a b=runs/é','[c]',d]", "vqa='{e: f}'"),
    ):
        request = _request(*words)
        assert _request(*shlex.split(command_of(request))[2:]) == request


def test_the_door_opens_quickly() -> None:
    """The command itself loads neither torch nor diffusers: a sweep's parent process needs them never."""
    code = "import sys, lora_dae.cli; sys.exit(len({'torch', 'diffusers', 'lightning'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
