"""The search on a script without torch: it prunes, goes on after a kill, and says mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from compose import SHORT
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.sweep.search import (
    SearchRequest,
    _failures_in_a_row,
    _take_up,
    check_request,
    distribution,
    overrides_of,
    read_objectives,
    search,
    train_command,
)

optuna = pytest.importorskip("optuna")
ROOT = Path(__file__).parent.parent
JOB = """
import json, sys, time
from pathlib import Path
run, overrides = Path(sys.argv[1]), dict(o.split("=") for o in sys.argv[2:])
x = float(overrides["x"])
with open("ran.txt", "a") as file:
    file.write(f"{x}\\n")
if "broken" in overrides:
    print("error: x is broken")
    sys.exit(2)
if "diverges" in overrides and len(open("ran.txt").read().split()) == 2:
    print("error: the loss became nan")
    sys.exit(1)
if "stop_at" in overrides and len(open("ran.txt").read().split()) == int(overrides["stop_at"]):
    Path("here").touch()
    time.sleep(60)
loss = float("nan") if "nan" in overrides else abs(x)
(run / "status.json").write_text(json.dumps({"validated": {"1": loss}}))
if "forgets" in overrides:  # as the later stages of a run do
    time.sleep(1)
    (run / "status.json").write_text(json.dumps({"phase": "measuring"}))
if "slow" in overrides and abs(x) > 4:
    time.sleep(60)
own = {"fd": {"value": (x - 2) ** 2}, "lsd": {"value": (x + 2) ** 2}}
methods = {"strength 0": {"fd": {"value": -1}}, "strength 1": own}
(run / "metrics.json").write_text(json.dumps({"methods": methods}))
(run / "config.yaml").write_text("enhancement: {strength: 1.0}")
"""
REQUEST = SearchRequest("s", 6, "search", {"fd": "minimize"}, {"x": {"low": -5.0, "high": 5.0}}, [], True, 0)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)


def job(overrides: list[str], run_dir: Path) -> list[str]:
    return [sys.executable, "job.py", str(run_dir), *overrides]


def run(request: SearchRequest) -> optuna.Study:
    return search(request, Console(quiet=True), job)


def test_search_goes_on_without_asking_twice() -> None:
    first = [(t.params["x"], t.value) for t in run(replace(REQUEST, trials=3)).trials]
    assert len(first) == 3 and all((x - 2) ** 2 == pytest.approx(value) for x, value in first)
    more = [(t.params["x"], t.value) for t in run(replace(REQUEST, trials=6)).trials]
    assert more[:3] == first
    assert len(set(more)) == 6  # a sampler that began anew would ask for the first three again


@pytest.mark.parametrize(
    "other",
    [
        {"x": {"choice": [1.0, 3.0]}},
        {"x": {"low": 1.0, "high": 2.0}},
    ],
    ids=["choices", "kind"],
)
def test_another_space_under_the_same_name_is_one_sentence(other: dict[str, dict[str, object]]) -> None:
    """And costs no trial: the search itself goes on where it was."""
    first = replace(REQUEST, trials=1, space={"x": {"choice": [1.0, 2.0]}})
    run(first)
    with pytest.raises(ConfigError, match=r"in another space \(x differs\): give another name"):
        run(replace(first, trials=2, space=other))
    assert [t.state.name for t in run(replace(first, trials=2)).trials] == ["COMPLETE", "COMPLETE"]


def test_two_objectives_have_a_front_between_them() -> None:
    study = run(replace(REQUEST, objectives={"fd": "minimize", "lsd": "minimize"}, trials=5, pruning=False))
    front = [t.params["x"] for t in study.best_trials]
    inside = [t.params["x"] for t in study.trials if -2 <= t.params["x"] <= 2]
    assert set(inside) <= set(front)  # between the two minima no point beats another


@pytest.mark.parametrize("overrides", [["slow=1"], ["slow=1", "forgets=1"]], ids=["to the end", "for a while"])
def test_bad_validation_is_pruned(overrides: list[str]) -> None:
    """Trials with a large validation loss would sleep for a minute: they end as soon as they have told it."""
    study = run(replace(REQUEST, objectives={"fd": "minimize", "lsd": "minimize"}, trials=3,
                        space={"x": {"low": -1.0, "high": 1.0}}, overrides=overrides))  # fmt: skip
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials)
    study.enqueue_trial({"x": 5.0})
    more = run(replace(REQUEST, objectives={"fd": "minimize", "lsd": "minimize"}, trials=4, overrides=overrides))
    assert more.trials[-1].params == {"x": 5.0}
    assert more.trials[-1].state == optuna.trial.TrialState.PRUNED


def test_killed_search_asks_again_for_what_was_cut_off(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_sweep_search import REQUEST, job, replace, search, Console
search(replace(REQUEST, trials=3, overrides=["stop_at=2"]), Console(quiet=True), job)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    try:
        while not (tmp_path / "here").exists():
            assert process.poll() is None
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    study = run(replace(REQUEST, trials=3, overrides=["stop_at=2"]))
    ran = [float(x) for x in (tmp_path / "ran.txt").read_text().split()]
    assert len(ran) == 4 and ran[1] == ran[2]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_what_was_cut_off_is_no_failure() -> None:
    """Two stops and one failure are not three failures in a row, which would end the search."""
    states = optuna.trial.TrialState
    study = optuna.create_study()
    for _ in range(2):
        study.enqueue_trial({"x": 1.0})
        study.ask()
        _take_up(study, optuna.create_study(), states)
    study.tell(study.ask(), state=states.FAIL)
    assert [t.state.name for t in study.trials].count("FAIL") == 3 and _failures_in_a_row(study, states) == 1


def test_a_mistake_stops_the_search_with_its_sentence() -> None:
    with pytest.raises(ConfigError, match="x is broken"):
        run(replace(REQUEST, overrides=["broken=1"]))


def test_a_trial_that_diverges_fails_alone() -> None:
    study = run(replace(REQUEST, trials=2, overrides=["diverges=1"]))
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_validation_loss_that_is_not_finite_stops_no_search() -> None:
    """Optuna takes no NaN for the value of a finished trial: the same values would be asked for at every start."""
    study = run(replace(REQUEST, trials=2, overrides=["nan=1"]))
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objectives": {"fd": "smaller"}}, "objectives.fd=smaller"),
        ({"space": {"x": {"low": 1}}}, "space.x"),
        ({"space": {"x": {"low": 32, "high": 4}}}, "space.x=.* is no space: .*low"),
        ({"space": {"x": {"low": 0, "high": 1, "log": True}}}, "space.x=.* is no space"),
        ({"space": {"x": {"choice": []}}}, "space.x=.* is no space"),
        ({"space": {}}, "space"),
        ({"trials": 0}, "trials"),
    ],
    ids=["direction", "half a range", "turned round", "log of 0", "no choices", "no space", "no trials"],
)
def test_bad_requests_are_one_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_request(replace(REQUEST, **change))  # type: ignore[arg-type]


def test_objectives_of_another_search_are_refused() -> None:
    run(replace(REQUEST, trials=1))
    with pytest.raises(ConfigError, match="other objectives"):
        run(replace(REQUEST, objectives={"fd": "maximize"}))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"objectives": {"lsd": "minimize"}}, "objectives"),
        ({"overrides": ["y=1"]}, "overrides"),
    ],
)
def test_a_search_goes_on_with_what_it_was_begun_with(change: dict[str, object], what: str) -> None:
    """Numbers of another metric, or of other trainings, are not compared with its own; nor do they cost a trial."""
    run(replace(REQUEST, trials=1))
    with pytest.raises(ConfigError, match=f"holds a search with other {what}: give another name"):
        run(replace(REQUEST, trials=2, **change))  # type: ignore[arg-type]
    assert [t.state.name for t in run(replace(REQUEST, trials=2)).trials] == ["COMPLETE", "COMPLETE"]


def test_a_search_that_does_not_say_what_it_was_begun_with_goes_on(tmp_path: Path) -> None:
    """Those of earlier versions."""
    (tmp_path / "search").mkdir()
    study = optuna.create_study(storage="sqlite:///search/study.db", study_name="s", direction="minimize")
    study.tell(study.ask({"x": distribution({"low": -5.0, "high": 5.0})}), 1.0)
    assert len(run(replace(REQUEST, trials=2, overrides=["y=1"])).trials) == 2


def test_an_objective_that_was_not_measured_is_named(tmp_path: Path) -> None:
    run(replace(REQUEST, trials=1))
    x = float((tmp_path / "ran.txt").read_text())
    assert read_objectives(tmp_path / "search" / "0", ["lsd"]) == [pytest.approx((x + 2) ** 2)]
    with pytest.raises(ConfigError, match="attr_color"):
        read_objectives(tmp_path / "search" / "0", ["attr_color"])


def test_texture_inside_the_garment_is_found_by_its_short_name(tmp_path: Path) -> None:
    """Pairs with masks, as the studio's, have no ``lsd`` of the whole picture, which conf/search.yaml asks for."""
    (tmp_path / "config.yaml").write_text("enhancement: {strength: 0.0}")
    (tmp_path / "metrics.json").write_text('{"methods": {"strength 0": {"lsd_garment": {"value": 0.5}}}}')
    assert read_objectives(tmp_path, ["lsd"]) == [0.5]


def test_whole_numbers_stay_whole() -> None:
    values = {"adapter.rank": 8, "a": 0.5, "b": "x"}
    space = {
        "adapter.rank": {"low": 4, "high": 64, "log": True},
        "a": {"low": 0.1, "high": 1.0},
        "b": {"choice": ["x"]},
    }
    study = optuna.create_study()
    study.enqueue_trial(values)
    asked = {key: distribution(entry) for key, entry in space.items()}
    assert overrides_of(study.ask(asked).params) == ["adapter.rank=8", "a=0.5", "b=x"]
    assert isinstance(study.ask(asked).params["adapter.rank"], int)


def test_choices_reach_the_config_as_what_they_are() -> None:
    """Written as overrides and read by Hydra: nothing is no text, and a comma makes no sweep."""
    read = OverridesParser.create().parse_override
    for choice in (None, True, 32, 1e-5, "rank8", "a,b", "null", "a=b", "choice(1,2)"):
        written = overrides_of({"k": choice})[0]
        assert not read(written).is_sweep_override() and read(written).value() == choice, written
    assert overrides_of({"k": "[a,b]"}) == ["k=[a,b]"]


def test_shipped_search_composes_and_every_trial_is_a_config_that_trains() -> None:
    """conf/search.yaml: both ends of every space pass the config's own checks."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from lora_dae.cli import typed
    from lora_dae.config import conf_dir, register
    from lora_dae.rules import check

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        request = SearchRequest(**OmegaConf.to_container(compose("search", ["name=x"]), resolve=True))  # type: ignore[arg-type]
        check_request(request)
        assert request.folder == "multirun/search_x"
        for end in (0, -1):
            values = {
                k: e["choice"][end] if "choice" in e else [e["low"], e["high"]][end] for k, e in request.space.items()
            }
            overrides = overrides_of(values)
            command = train_command(overrides, Path("search_x/0"))
            own_words = {"store=multirun/store", 'tracking.group="search_x"', "evaluation.split=val"}
            assert own_words < set(command)
            assert command[-1] == 'hydra.run.dir="search_x/0"'
            own = ["tracking.group=mine", "store=there", "evaluation.split=test"]
            assert train_command(own, Path("search_x/0"))[3:] == [*own, 'hydra.run.dir="search_x/0"']
            check(typed(compose("train", [*overrides, "run_dir=here"])))


def test_search_trains_trials_of_two_processes(tmp_path: Path, tiny_backbone: Path) -> None:
    """As a user types it, objectives as shipped, on the tiny backbone: Lightning starts each trial's second process.

    Its trials find configs of one's own, too.
    """
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nseed: 5\n")
    short = [o for o in SHORT if not o.startswith("trainer.max_steps")]
    trial = [
        "experiment=own", *short, "trainer=ddp", "trainer.devices=2", "trainer.max_steps=2",
        "trainer.val_check_interval=1", "enhancement=none", "evaluation.frozen=false", "evaluation.controls=false",
        f"backbone.path={tiny_backbone}", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    quoted = ",".join(f"'{override}'" for override in trial)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "search.py"), "--config-dir", "mine", "name=tiny", "trials=1",
            f"overrides=[{quoted}]", "~space", "+space={adapter.rank: {choice: [2]}}",
        ],
        cwd=tmp_path, env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=900,
    )  # fmt: skip
    run_dir = tmp_path / "multirun" / "search_tiny" / "0"
    assert done.returncode == 0, done.stderr[-3000:] + (run_dir / "job.log").read_text()[-3000:]
    assert "best     trial 0: adapter.rank=2" in done.stdout
    assert "2 processes, " in (run_dir / "job.log").read_text()
    assert "\nseed: 5\n" in (run_dir / "config.yaml").read_text()
    assert "\n  group: search_tiny\n" in (run_dir / "config.yaml").read_text()
    trained = list((tmp_path / "multirun" / "store").glob("*/trained.json"))
    assert len(trained) == 1 and len(list(trained[0].parent.glob("csv/metrics*.csv"))) == 1
    assert list((tmp_path / "multirun" / "search_tiny").glob("report.html"))
