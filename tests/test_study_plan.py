"""Who sees what is balanced, blinded and random; creating a study refuses what cannot be."""

from __future__ import annotations

import io
import re
import resource
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from compose import config
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from studies import METHODS, ROOT, links, make_study, photo

from lora_dae.config import ConfigError, to_dict
from lora_dae.study import __main__ as study_command
from lora_dae.study.__main__ import main, read_request
from lora_dae.study.create import CreateRequest, create_study, degraded
from lora_dae.study.limit import RateLimit
from lora_dae.study.plan import CLEAR, DEGRADED, MIN_CHECKS, plan
from lora_dae.study.store import StudyStore, connect


def test_everything_is_shown_equally_often_and_sides_are_random() -> None:
    trials = plan(10, ["a", "b", "c"], raters=30, pairs=40, opinions=10, with_reference=True, seed=0)
    pairs = [t for own in trials for t in own if t.kind == "pair"]
    shown = Counter((t.item, frozenset((t.left, t.right)), t.question) for t in pairs)
    assert len(shown) == 10 * 3 * 2 and set(shown.values()) == {20}
    singles = Counter((t.item, t.left) for own in trials for t in own if t.kind == "opinion")
    assert len(singles) == 30 and set(singles.values()) == {10}
    share = np.mean([t.left < (t.right or "") for t in pairs])
    assert abs(share - 0.5) < 3 * 0.5 / len(pairs) ** 0.5
    orders = [[(t.item, t.left, t.right, t.question) for t in own] for own in trials]
    assert len({tuple(o) for o in orders}) == 30


def test_checks_are_among_the_trials_and_repeats_come_later_swapped() -> None:
    for own in plan(40, ["a", "b"], raters=20, pairs=40, opinions=0, with_reference=False, seed=1):
        assert [t.number for t in own] == list(range(len(own)))
        checks = [t for t in own if t.kind == "check"]
        assert len(checks) == MIN_CHECKS and all({t.left, t.right} == {CLEAR, DEGRADED} for t in checks)
        repeats = [t for t in own if t.kind == "repeat"]
        assert len(repeats) == 2
        for t in repeats:
            first = own[t.repeat_of or 0]
            assert first.kind == "pair" and t.number - first.number >= 5
            assert (t.left, t.right, t.item, t.question) == (first.right, first.left, first.item, first.question)
        assert {t.question for t in own} == {"realism"}  # without a reference nobody is asked about it
    positions = [t.number for own in plan(20, ["a", "b"], 200, 20, 0, False, 2) for t in own if t.kind == "check"]
    assert min(positions) == 0 and max(positions) > 18  # anywhere, so that nobody learns where


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, ["a"], 2, 5, 0), "two methods"),
        ((1, ["a", "b"], 0, 5, 0), "at least one rater"),
        ((1, ["a"], 1, 0, 0), "trial"),
        ((3, ["a", "b"], 1, 4, 0), "there are 3 comparisons"),
        ((3, ["a", "b"], 1, 3, 7), "and 6 pictures"),
    ],
)
def test_impossible_plans_are_told(numbers: tuple[int, list[str], int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*numbers, with_reference=False, seed=0)


def test_a_study_on_disk_names_no_method_where_a_rater_can_see_it(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    files = list((study / "pictures").iterdir())
    assert len(files) == 4 * (2 + 2 + 1)  # methods, clear and degraded, reference
    for file in files:
        assert not any(m in file.name for m in METHODS)
        raw = file.read_bytes()
        assert not any(m.encode() in raw for m in METHODS)
        with Image.open(file) as image:
            assert image.format == "PNG" and not image.info
    tokens = links(study)
    assert len(set(tokens)) == 4 and all(len(t) == 32 for t in tokens)
    assert (study / "links.txt").stat().st_mode & 0o077 == 0
    raw = b"".join(p.read_bytes() for p in study.glob("study.db*"))
    assert not any(t.encode() in raw for t in tokens)  # the database knows hashes only


def test_links_have_one_slash_behind_an_address_that_ends_in_one(tmp_path: Path) -> None:
    text = (make_study(tmp_path, url="https://example.org/rate/") / "links.txt").read_text()
    assert text.count("https://example.org/rate/r/") == 3 and "https://example.org/rate/admin/" in text


def test_the_degraded_picture_keeps_little_of_the_photo() -> None:
    image = photo(1, 64)
    bad = degraded(image)
    assert bad.shape == image.shape and bad.std() < 0.6 * image.std()


def test_bad_requests_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make_study(tmp_path)
    methods = [str(tmp_path / m) for m in METHODS]
    other = tmp_path / "other"
    for arguments, message in (
        (["create", f"runs=[{methods[0]},{methods[1]}]", f"output={study}"], "is never overwritten"),
        (["create", f"runs=[{methods[0]}]", f"output={other}"], "needs two methods"),
        (["create", f"runs=[{methods[0]},{methods[1]}]", f"output={other}", "raters=0"], "at least one rater"),
        (["create", f"runs=[{tmp_path}/absent,{methods[0]}]", f"output={other}"], "does not exist"),
        (["create", "ratters=3"], "ratters"),
        (["create", "raters=many"], "many"),
        (["create", "oops"], "no key=value"),
        (["create", "title=[x"], "'title=[x' cannot be read"),
        (["create", "runs=runs/one", f"output={other}"], "the keys are runs"),
        (["create", f"runs=[{methods[0]},{methods[1]}]", f"output={other}", "url=study.example"], "is no address"),
        (["serve", f"study={other}"], "does not exist"),
        (["serve", f"study={study}", "port=99999"], "port=99999"),
        (["report", f"study={other}"], "does not exist"),
        (["report", f"study={study}"], "no vote yet"),
        (["report", f"study={study}", "bootstrap=1"], "bootstrap=1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.startswith("error: "), arguments
        assert error.count("\n") == 1
    assert not other.exists()
    with pytest.raises(SystemExit):
        main(["paint"])
    assert "create runs=" in capsys.readouterr().err


def test_the_documented_command_fits_runs_with_and_without_garment_photos() -> None:
    """Runs that draw from captions alone are not asked about the garment: half as many comparisons."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (readme, str(study_command.__doc__)):
        found = re.search(r"^(?:python -m lora_dae.study )?create (.+)$", text, re.MULTILINE)
        assert found is not None
        request = read_request(CreateRequest, found[1].split())
        for with_reference in (True, False):
            trials = plan(
                request.num_samples, request.runs, request.raters, request.pairs, request.opinions, with_reference, 0
            )
            assert len(trials) == request.raters


@pytest.mark.parametrize(
    ("conditioning", "told"), [("none", "there are 32 comparisons and 64 pictures"), ("source", "begins to draw")]
)
def test_more_comparisons_than_runs_allow_are_told_before_anything_is_drawn(
    conditioning: str, told: str, tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 prompts of two runs are 32 comparisons, and 64 where the garment's photo is shown as well."""
    for name in ("a", "b"):
        options = (f"conditioning={conditioning}", "enhancement=none")
        cfg = config(tiny_backbone, tmp_path / name, tmp_path / "cache", *options)
        (tmp_path / name / "adapter").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(to_dict(cfg)), tmp_path / name / "config.yaml")

    def draws(*_: object) -> None:
        raise ConfigError("begins to draw")

    monkeypatch.setattr("lora_dae.study.create.gather", draws)
    request = CreateRequest([f"{tmp_path}/a", f"{tmp_path}/b"], str(tmp_path / "study"), num_samples=32, pairs=40)
    with pytest.raises(ConfigError, match=told):
        create_study(request, Console(quiet=True))


def test_too_few_votes_on_each_comparison_are_warned_about(tmp_path: Path) -> None:
    """Four prompts, one pair of methods, two questions: eight comparisons."""
    make_study(tmp_path, raters=1, pairs=1)
    methods = ",".join(str(tmp_path / m) for m in METHODS)
    for raters, pairs, warned in ((3, 6, "2.2 votes"), (4, 6, None)):
        out = io.StringIO()
        request = CreateRequest(
            methods.split(","), str(tmp_path / f"study{raters}"), raters=raters, pairs=pairs, opinions=0
        )
        create_study(request, Console(file=out, width=200))
        assert ("warning" in out.getvalue()) == (warned is not None) and (warned or "") in out.getvalue()


def test_opinions_of_one_method_need_no_second(tmp_path: Path) -> None:
    study = make_study(tmp_path, methods=("alpha-method",), pairs=0, opinions=4)
    store = StudyStore(study)
    trial = store.next_trial(0)
    store.close()
    assert trial is not None and trial["kind"] == "opinion" and trial["right"] is None and trial["total"] == 4


@pytest.mark.parametrize("room", [600, 10_000])
def test_a_full_disk_leaves_no_half_study(room: int, tmp_path: Path) -> None:
    """No file may grow beyond so many bytes, as on a full disk: too few for a picture, or for the database."""
    make_study(tmp_path)
    request = CreateRequest(
        [str(tmp_path / m) for m in METHODS], str(tmp_path / "other"), raters=3, pairs=6, opinions=2
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(ConfigError, match=r"other cannot be written \(.+\): make room"):
            create_study(request, Console(quiet=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*METHODS, "study"]
    assert create_study(request, Console(quiet=True)).is_dir()


def test_databases_of_another_kind_or_version_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    db = sqlite3.connect(study / "study.db")
    db.execute("PRAGMA user_version=7")
    db.close()
    with pytest.raises(ConfigError, match="study of version 7"):
        connect(study / "study.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE a (b)").connection.close()
    with pytest.raises(ConfigError, match="is no study"):
        connect(tmp_path / "other.db")
    (tmp_path / "note.db").write_text("text, longer than a header of a database file " * 10)
    with pytest.raises(ConfigError, match="no study database"):
        connect(tmp_path / "note.db")


def test_rate_limit_allows_a_burst_and_then_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("lora_dae.study.limit.time.monotonic", lambda: now[0])
    limit = RateLimit(per_second=2, burst=5)
    assert [limit.allow("a") for _ in range(7)] == [True] * 5 + [False] * 2
    assert limit.allow("b")
    now[0] += 1.0
    assert [limit.allow("a") for _ in range(3)] == [True, True, False]
