"""The report recovers what simulated raters prefer, and leaves out who clicked at random."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from studies import make_study
from test_adapter_atomic import full_disk

from lora_dae.config import ConfigError
from lora_dae.study import report as study_report
from lora_dae.study.exclude import Rules, excluded
from lora_dae.study.plan import CLEAR, DEGRADED
from lora_dae.study.report import ReportRequest, markdown, report_study, summarize
from lora_dae.study.store import StudyStore, VoteRow

STRENGTH = {"good": 0.9, "middle": 0.0, "bad": -0.9}
OPINION = {"good": 4, "middle": 3, "bad": 2}
CLICKERS = {20, 21}  # at random, and in no hurry
HASTY = 22
ABSENT = 23


def _answer(row: Any, rater: int, rng: np.random.Generator) -> str:
    """What a simulated rater says to (kind, left method, right method)."""
    kind, left, right = row
    if rater in CLICKERS:
        return str(rng.integers(1, 6)) if kind == "opinion" else str(rng.choice(["left", "tie", "right"]))
    if kind == "opinion":
        return str(int(np.clip(OPINION[left] + rng.integers(-1, 2), 1, 5)))
    if kind == "check":
        return "left" if left == CLEAR else "right"
    p = np.exp([STRENGTH[left], STRENGTH[right]])
    p = np.array([p[0], 0.4 * math.sqrt(p[0] * p[1]), p[1]])
    return str(rng.choice(["left", "tie", "right"], p=p / p.sum()))


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 raters: 60 with known preferences, two random clickers, a hasty one, one who never came."""
    root = tmp_path_factory.mktemp("voted")
    study = make_study(root, prompts=8, methods=tuple(STRENGTH), raters=64, pairs=40, opinions=9)
    store = StudyStore(study)
    rng = np.random.default_rng(0)
    rows = store.rows(
        "SELECT t.trial, t.rater, t.kind, l.method, r.method FROM trials t JOIN pictures l ON l.name=t.left "
        "LEFT JOIN pictures r ON r.name=t.right"
    )
    for trial, rater, *row in rows:
        if rater != ABSENT:
            ms = 150 if rater == HASTY else int(rng.integers(2000, 6000))
            last = store.vote(trial, _answer(row, rater, rng), ms)
    last.result(timeout=60)
    store.close()
    return study


@pytest.fixture(scope="module")
def report(voted: Path) -> dict[str, Any]:
    return report_study(ReportRequest(str(voted), bootstrap=60), Console(quiet=True))


def test_known_preferences_are_recovered(report: dict[str, Any]) -> None:
    for question in ("realism", "truth"):
        for method, (value, low, high) in report["questions"][question]["strengths"].items():
            assert value == pytest.approx(STRENGTH[method], abs=0.35), (question, method)
            assert low < value < high
        assert [row["low"] > 0.5 for row in report["questions"][question]["win_rates"]] == [True] * 3
    for method, grade in OPINION.items():
        assert report["opinion"][method]["mean"] == pytest.approx(grade, abs=0.25)
        assert report["opinion"][method]["low"] < report["opinion"][method]["mean"] < report["opinion"][method]["high"]
    assert 0.1 < report["questions"]["realism"]["alpha"] < 0.9 and 0.3 < report["opinion_alpha"] < 0.9


def test_who_clicked_at_random_or_in_haste_is_left_out_and_told_why(report: dict[str, Any]) -> None:
    out = {row["rater"]: row["why"] for row in report["raters"]["excluded"]}
    assert set(out) == {r + 1 for r in (*CLICKERS, HASTY)}
    assert "attention checks" in out[21] and "0.15 s" in out[HASTY + 1]
    assert (report["raters"]["invited"], report["raters"]["voted"], report["raters"]["finished"]) == (64, 63, 63)
    assert 2 < report["seconds_per_vote"]["median"] < 6


def test_files_hold_the_raw_votes_and_the_numbers(voted: Path, report: dict[str, Any]) -> None:
    with (voted / "votes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    store = StudyStore(voted)
    assert len(rows) == len(store.votes()) == store.rows("SELECT count(*) FROM votes")[0][0]
    store.close()
    assert len(json.loads((voted / "votes.json").read_text())) == len(rows)
    assert sum(row["excluded"] == "True" for row in rows) == len(rows) * 3 // 63
    saved = json.loads((voted / "report.json").read_text())
    assert saved["schema"] == 3 and saved["methods"] == list(STRENGTH) and saved["opinion"].keys() == OPINION.keys()
    text = (voted / "report.md").read_text()
    for part in (
        "good over middle",
        "preferred",
        "Davidson",
        "rater 21: passed",
        "63 voted",
        "Wilson",
        "independent votes",
    ):
        assert part in text


def test_a_full_disk_leaves_the_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, raters=1)
    store = StudyStore(study)
    rows = store.rows("SELECT t.trial, t.kind, l.method FROM trials t JOIN pictures l ON l.name=t.left")
    for trial, kind, left in rows:
        answer = "3" if kind == "opinion" else "right" if left == DEGRADED else "left"
        store.vote(trial, answer, 3000).result(timeout=60)
    store.close()
    request = ReportRequest(str(study), bootstrap=20)
    report_study(request, Console(quiet=True))
    files = ("report.json", "report.md", "votes.csv", "votes.json")
    before = {name: (study / name).read_bytes() for name in files}
    assert min(len(data) for data in before.values()) > 600  # more than the disk then has room for
    write = study_report._write

    def on_full_disk(*given: Any) -> None:
        with full_disk():
            write(*given)

    monkeypatch.setattr(study_report, "_write", on_full_disk)
    with pytest.raises(ConfigError, match="cannot write .*votes.json"):
        report_study(request, Console(quiet=True))
    assert {name: (study / name).read_bytes() for name in files} == before
    assert not list(study.glob(".*partial*"))


def _votes(
    rater: int, kind: str, answers: list[str], left: str = "a", right: str = "b", seconds: float = 3
) -> list[VoteRow]:
    return [
        VoteRow(rater, k, kind, "realism", k, "p", left, right, None, a, seconds, 0.0) for k, a in enumerate(answers)
    ]


def test_each_rule_of_exclusion_has_its_bound() -> None:
    rules = Rules()

    def out(votes: list[VoteRow]) -> bool:
        return bool(excluded(votes, rules))

    assert not out(_votes(0, "check", ["left"] * 3 + ["tie"], CLEAR, DEGRADED))  # 75 %
    assert out(_votes(0, "check", ["left"] * 2 + ["right"] * 2, CLEAR, DEGRADED))
    assert not out(_votes(0, "check", ["right"], CLEAR, DEGRADED))  # one slip is no evidence
    assert out(_votes(0, "pair", ["left"] * 20)) and not out(_votes(0, "pair", ["left"] * 19))
    assert not out(_votes(0, "pair", ["left"] * 38 + ["right"] * 2))
    assert not out(_votes(0, "pair", ["tie"] * 40))  # who sees no difference may say so
    assert out(_votes(0, "pair", ["left", "right"], seconds=0.6)) and not out(_votes(0, "pair", ["left"], seconds=0.8))


def test_repeats_tell_consistency_and_are_no_votes() -> None:
    pairs = _votes(0, "pair", ["left", "right", "tie"])
    again = [
        VoteRow(0, 10 + k, "repeat", "realism", k, "p", "b", "a", k, a, 3, 0.0)
        for k, a in enumerate(["right", "right", "tie"])
    ]
    result = summarize([*pairs, *again], ["a", "b"], Rules(), 20)
    assert result["repeats_consistent"] == pytest.approx(2 / 3)
    assert result["questions"]["realism"]["votes"] == 3


def test_a_report_of_excluded_raters_alone_has_no_numbers_and_no_crash() -> None:
    result = summarize(_votes(0, "pair", ["left"] * 30), ["a", "b"], Rules(), 20)
    assert result["questions"] == {} and len(result["raters"]["excluded"]) == 1
    result["raters"] |= {"invited": 1, "finished": 0}
    assert "median n/a s" in markdown({"title": "t", **result})
