"""What people said: win rates, strengths, opinion scores, agreement, who was excluded and why, raw votes."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lora_dae.adapter.atomic import atomic
from lora_dae.config import ConfigError
from lora_dae.evaluation.report.table import without_nan
from lora_dae.evaluation.statistics.agreement import Level, krippendorff_alpha
from lora_dae.evaluation.statistics.preference import SHARES, Vote, judged_win_rates, strengths
from lora_dae.study.exclude import Rules, excluded, passed
from lora_dae.study.plan import QUESTIONS
from lora_dae.study.store import StudyStore, VoteRow

SCHEMA = 3  # 1 had no verdicts beside win rates, 2 intervals in which every vote stood for itself
WORDS = {"realism": "which is more realistic", "truth": "which shows the garment more truly"}


@dataclass
class ReportRequest:
    """The keys of ``python -m lora_dae.study report``."""

    study: str = "study"
    bootstrap: int = 1000


def report_study(request: ReportRequest, console: Console) -> dict[str, Any]:
    """Write votes.json, votes.csv, report.json and report.md into the study's folder; returns the report.

    Raises ConfigError without a study or a vote, and where a file cannot be written: the earlier one stays then.
    """
    if request.bootstrap < 2:
        raise ConfigError(f"bootstrap={request.bootstrap} is below 2: give e.g. 1000.")
    folder = Path(request.study)
    store = StudyStore(folder)
    try:
        votes, methods = store.votes(), list(store.meta["methods"])
        progress, rules = store.progress(), Rules(**store.meta["rules"])
        title = str(store.meta["title"])
    finally:
        store.close()
    if not votes:
        raise ConfigError(f"study={folder} has no vote yet: send the links of links.txt, and serve it.")
    result: dict[str, Any] = {"schema": SCHEMA, "title": title, "methods": methods}
    result |= summarize(votes, methods, rules, request.bootstrap)
    result["raters"]["invited"] = len(progress)
    result["raters"]["finished"] = sum(done == total for _, done, total in progress)
    _write(folder, result, votes, excluded(votes, rules))
    console.print(markdown(result), markup=False, highlight=False, soft_wrap=True)
    return result


def summarize(votes: Sequence[VoteRow], methods: Sequence[str], rules: Rules, bootstrap: int) -> dict[str, Any]:
    """Every number of the report from the votes that count; checks and repeats are no votes."""
    out = excluded(votes, rules)
    kept = [v for v in votes if v.rater not in out]
    questions = {}
    of_question = {q: [_vote(v) for v in kept if v.kind == "pair" and v.question == q] for q in QUESTIONS}
    rates = judged_win_rates(of_question, methods)
    for question, pairs in of_question.items():
        if pairs:
            seen = [m for m in methods if any(m in (p.a, p.b) for p in pairs)]
            fitted = strengths(pairs, seen, bootstrap)
            questions[question] = {
                "votes": len(pairs),
                "win_rates": rates[question],
                "strengths": {
                    m: [float(value), float(low), float(high)]
                    for m, value, low, high in zip(seen, fitted.value, fitted.low, fitted.high, strict=True)
                },
                "alpha": _pair_alpha(pairs),
            }
    opinions = [v for v in kept if v.kind == "opinion"]
    checks = [v for v in votes if v.kind == "check"]
    first: dict[tuple[int, int | None], VoteRow] = {(v.rater, v.number): v for v in kept}
    repeats = [(first.get((v.rater, v.repeat_of)), v) for v in kept if v.kind == "repeat"]
    same = [_vote(a).winner == _vote(b).winner for a, b in repeats if a is not None]
    seconds = np.array([v.seconds for v in kept]) if kept else np.array([math.nan])
    return {
        "raters": {
            "voted": len({v.rater for v in votes}),
            "excluded": [{"rater": r + 1, "why": why} for r, why in sorted(out.items())],
            "rules": asdict(rules),
        },
        "questions": questions,
        "opinion": {m: _mean_opinion([v for v in opinions if v.left == m], bootstrap) for m in methods if opinions},
        "opinion_alpha": _alpha([(v.rater, (v.item, v.left), float(v.answer)) for v in opinions], "ordinal"),
        "checks_passed": sum(passed(v) for v in checks) / len(checks) if checks else math.nan,
        "repeats_consistent": sum(same) / len(same) if same else math.nan,
        "seconds_per_vote": dict(
            zip(("p10", "median", "p90"), np.percentile(seconds, [10, 50, 90]).tolist(), strict=True)
        ),
    }


def _vote(v: VoteRow) -> Vote:
    winner = {"left": v.left, "right": v.right}.get(v.answer)
    return Vote(v.rater, v.item, v.left, v.right or "", winner)


def _pair_alpha(votes: Sequence[Vote]) -> float:
    """A unit is a pair of pictures; its values are the winner, or a tie."""
    rows = []
    for v in votes:
        a, b = sorted((v.a, v.b))
        rows.append((v.rater, (v.prompt, a, b), 2.0 if v.winner is None else float(v.winner == b)))
    return _alpha(rows, "nominal")


def _alpha(rows: Sequence[tuple[Any, Any, float]], level: Level) -> float:
    """Rows of (rater, unit, value)."""
    raters = {r: k for k, r in enumerate(dict.fromkeys(row[0] for row in rows))}
    units = {u: k for k, u in enumerate(dict.fromkeys(row[1] for row in rows))}
    table = np.full((len(raters), len(units)), math.nan)
    for rater, unit, value in rows:
        table[raters[rater], units[unit]] = value
    return krippendorff_alpha(table, level)


def _mean_opinion(votes: Sequence[VoteRow], bootstrap: int) -> dict[str, float | int]:
    """Mean of 1 to 5; the interval resamples raters and prompts together."""
    if not votes:
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "votes": 0}
    grades = np.array([float(v.answer) for v in votes])
    rng = np.random.default_rng(0)
    weights = np.ones((bootstrap, len(votes)))
    for keys in ([v.rater for v in votes], [v.item for v in votes]):
        distinct, index = np.unique(keys, return_inverse=True)
        if len(distinct) > 1:
            weights *= rng.multinomial(len(distinct), np.full(len(distinct), 1 / len(distinct)), bootstrap)[:, index]
    weights = weights[weights.sum(axis=1) > 0]
    low, high = np.percentile(weights @ grades / weights.sum(axis=1), [2.5, 97.5])
    return {"mean": float(grades.mean()), "low": float(low), "high": float(high), "votes": len(votes)}


def markdown(result: dict[str, Any]) -> str:
    raters = result["raters"]
    seconds = result["seconds_per_vote"]
    lines = [
        f"# {result['title']}",
        "",
        f"{raters['invited']} raters invited, {raters['voted']} voted, {raters['finished']} finished, "
        f"{len(raters['excluded'])} excluded. Attention checks passed: {_share(result['checks_passed'])}; repeated "
        f"pairs answered alike: {_share(result['repeats_consistent'])}. Time of a vote: median "
        f"{_number(seconds['median'])} s ({_number(seconds['p10'])} to {_number(seconds['p90'])} s hold 80 %).",
    ]
    for question, entry in result["questions"].items():
        lines += [
            "",
            f"## {question}: {WORDS[question]}",
            "",
            f"{entry['votes']} votes, alpha {_number(entry['alpha'])}.",
        ]
        lines += ["", "| | wins | losses | ties | share of wins (tie = half) | |", "|---|---:|---:|---:|---:|---|"]
        for r in entry["win_rates"]:
            said = {"better": "preferred", "worse": "not preferred"}.get(r["verdict"], r["verdict"])
            share = f"{r['share']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            lines.append(f"| {r['a']} over {r['b']} | {r['wins']} | {r['losses']} | {r['ties']} | {share} | {said} |")
        lines += ["", "| method | strength (Davidson, nats) |", "|---|---:|"]
        ranked = sorted(entry["strengths"].items(), key=lambda pair: -pair[1][0])
        lines += [f"| {m} | {v:+.2f} [{low:+.2f}, {high:+.2f}] |" for m, (v, low, high) in ranked]
    if result["opinion"]:
        lines += ["", f"## Mean opinion (1 to 5), alpha {_number(result['opinion_alpha'])}", ""]
        lines += ["| method | mean | votes |", "|---|---:|---:|"]
        for m, o in result["opinion"].items():
            lines.append(f"| {m} | {_number(o['mean'])} [{_number(o['low'])}, {_number(o['high'])}] | {o['votes']} |")
    if raters["excluded"]:
        lines += ["", "## Excluded", "", *[f"* rater {e['rater']}: {e['why']}" for e in raters["excluded"]]]
    lines += [
        "",
        SHARES + " Preferred or not: sign-flip tests over prompts and over raters, and the test of that interval; the "
        "largest p counts, Holm-corrected. Strengths and means: 95 % bootstrap over raters and prompts. "
        "Rules of exclusion were fixed when the study was made: " + json.dumps(raters["rules"]) + ".",
    ]
    return "\n".join(lines) + "\n"


def _write(folder: Path, result: dict[str, Any], votes: Sequence[VoteRow], out: dict[int, str]) -> None:
    """Each file whole or not at all."""
    rows = [{**asdict(v), "rater": v.rater + 1, "excluded": v.rater in out} for v in votes]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, [f.name for f in fields(VoteRow)] + ["excluded"])
    writer.writeheader()
    writer.writerows(rows)
    texts = {
        "votes.json": json.dumps(rows, ensure_ascii=False, indent=1) + "\n",
        "votes.csv": table.getvalue(),
        "report.json": json.dumps(without_nan(result), indent=2, ensure_ascii=False) + "\n",
        "report.md": markdown(result),
    }
    for name, text in texts.items():
        with atomic(folder / name) as partial:
            partial.write_text(text, encoding="utf-8", newline="")  # the table has its own line ends


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.2f}"


def _share(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.0%}"
