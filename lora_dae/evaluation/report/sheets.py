"""What judges and people said, for a page: read from vqa.json and from a study's report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError
from lora_dae.evaluation.report.page import Sheet
from lora_dae.evaluation.report.table import MetricValue, format_value
from lora_dae.evaluation.statistics.preference import SHARES

KNOWN = {"vqa.json": 3, "report.json": 3}  # schemas that are understood
WINS = ["", "wins", "losses", "ties", "share of wins", ""]
ONE_JUDGE = "Judges favor their own kind: ask a second one of another family."


def judges_sheets(folder: Path, methods: Sequence[str]) -> list[Sheet]:
    """Tables of ``python -m lora_dae.vqa``'s output: scores and pairs of each judge, and how far judges agree.

    Raises ConfigError without its vqa.json, or when that is about other methods than ``methods``.
    """
    result = _read(folder, "vqa.json", "vqa", methods)
    protocol = result["protocol"]
    sheets = []
    shared = []
    if protocol["without_real"]:
        shared.append(f"Warning: {no_controls(protocol)}")
    if len(result["judges"]) == 1:
        shared.append(f"Warning: one judge alone. {ONE_JUDGE}")
    for judge, entry in result["judges"].items():
        subjects = list(dict.fromkeys(s for row in entry["scores"].values() for s in row))
        rows = []
        for method, row in entry["scores"].items():
            cells = []
            for subject in subjects:
                said = entry["against_first"].get(f"{method} | {subject}")
                cells.append(_value(row.get(subject)) + (f", {said['verdict']}" if said else ""))
            rows.append([method, *cells])
        reading = entry["reading"]
        notes = [
            f"Bank {protocol['bank']}, prompt version {protocol['prompt_version']}, {protocol['prompts']} prompts, "
            f"{protocol['resolution']}; parse failures {reading['parse_failures']:.1%}, unanswered "
            f"{reading['unanswered']:.1%}. Verdicts against “{result['baseline']}”, paired, Holm-corrected.",
        ]
        if "sees_texture" in entry:
            notes.append(sees_texture(entry["sees_texture"]))
        sheets.append(Sheet(f"Judge {judge}", [*notes, *shared], ["", *subjects], rows))
        if "pairs" in entry:
            sheets.append(_pairs(judge, entry["pairs"]))
    if result["agreement"]:
        rows = [[subject, _number(alpha)] for subject, alpha in result["agreement"].items()]
        title = "Agreement between judges (Krippendorff's alpha)"
        sheets.append(Sheet(title, ["On the methods' pictures alone."], ["", "alpha"], rows))
    return sheets


def sees_texture(seen: dict[str, Any]) -> str:
    """What a judge's texture answers about sharp and about blurred real photos tell of it, in a sentence."""
    pairs, difference = seen["pairs"], seen["difference"]
    how = f"{pairs} prompts" + (f", difference {difference:+.3f}, p {seen['p']:.2g}" if pairs else "")
    if seen["verdict"] == "better":
        return f"It tells sharp real photos from blurred ones by its texture answers ({how})."
    if pairs and difference <= 0:
        return f"Warning: it does not see texture: blurred real photos are no worse ({how})."
    return f"Whether it sees texture could not be shown ({how})."


def no_controls(protocol: dict[str, Any]) -> str:
    return (
        f"no controls, as {protocol['without_real']} of {protocol['prompts']} prompts have no real photo: nothing "
        "tells whether a judge sees texture."
    )


def _pairs(judge: str, pairs: dict[str, Any]) -> Sheet:
    rows = [row for question, entry in pairs["questions"].items() for row in _wins(entry["win_rates"], f"{question}: ")]
    notes = [
        f"Asked in both orders: {pairs['inconsistent']:.1%} contradict themselves (counted as ties), position bias "
        f"{pairs['position_bias']:.1%}, “first” in {_number(pairs['first_share'])} of the answers that name a place, "
        f"{pairs['missing']} pairs without two readable answers.",
        SHARES,
    ]
    return Sheet(f"Judge {judge}: pairs", notes, WINS, rows)


def _wins(rates: Sequence[dict[str, Any]], before: str = "") -> list[list[str]]:
    rows = []
    for r in rates:
        share = f"{r['share']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        counts = [str(r[key]) for key in ("wins", "losses", "ties")]
        rows.append([f"{before}{r['a']} over {r['b']}", *counts, share, r["verdict"]])
    return rows


def people_sheets(folder: Path, methods: Sequence[str]) -> list[Sheet]:
    """Tables of a study's report.

    Raises ConfigError without its report.json, or when that is about other methods than ``methods``.
    """
    result = _read(folder, "report.json", "study", methods)
    raters = result["raters"]
    notes = [f"{raters['voted']} raters voted, {len(raters['excluded'])} excluded by rules fixed beforehand."]
    sheets = []
    for question, entry in result["questions"].items():
        about = [*notes, f"Krippendorff's alpha {_number(entry['alpha'])}.", SHARES]
        sheets.append(Sheet(f"People: {question}", about, WINS, _wins(entry["win_rates"])))
    if result["opinion"]:
        rows = [
            [method, f"{o['mean']:.2f} [{o['low']:.2f}, {o['high']:.2f}]", str(o["votes"])]
            for method, o in result["opinion"].items()
            if o["mean"] is not None
        ]
        sheets.append(Sheet("People: mean opinion (1 to 5)", notes, ["", "mean", "votes"], rows))
    return sheets


def _read(folder: Path, name: str, option: str, methods: Sequence[str]) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{option}={folder} holds no {name}: give the folder that the command wrote.")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON ({error.msg}): write it anew.") from error
    if not isinstance(result, dict) or result.get("schema") != KNOWN[name]:
        raise ConfigError(f"{path} is of another version of this program: write it anew.")
    if other := [method for method in result["methods"] if method not in methods]:
        raise ConfigError(
            f"{path} is about {', '.join(other)}, and the page about {', '.join(methods)}: give runs= under the names "
            f"that {option}= has, or the folder of a command over these."
        )
    return result


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _value(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    number = math.nan if entry["value"] is None else entry["value"]
    return " ".join(format_value(MetricValue(number, entry["low"], entry["high"], "higher"))).strip()
