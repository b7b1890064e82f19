"""What judges and people said, for a page: read from vqa.json and from a study's report.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError
from lora_dae.evaluation.report.page import Sheet
from lora_dae.evaluation.report.table import MetricValue, format_value

KNOWN = {"vqa.json": 2, "report.json": 2}  # schemas that are understood


def judges_sheets(folder: Path) -> list[Sheet]:
    """A table for each judge of ``python -m lora_dae.vqa``'s output. Raises ConfigError without its vqa.json."""
    result = _read(folder, "vqa.json", "vqa")
    protocol = result["protocol"]
    sheets = []
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
        seen = entry.get("sees_texture")
        if seen and seen["verdict"] != "better":
            notes.append("Warning: this judge does not tell sharp real photos from blurred ones.")
        sheets.append(Sheet(f"Judge {judge}", notes, ["", *subjects], rows))
    return sheets


def people_sheets(folder: Path) -> list[Sheet]:
    """Tables of a study's report. Raises ConfigError without its report.json."""
    result = _read(folder, "report.json", "study")
    raters = result["raters"]
    notes = [f"{raters['voted']} raters voted, {len(raters['excluded'])} excluded by rules fixed beforehand."]
    sheets = []
    for question, entry in result["questions"].items():
        rows = []
        for r in entry["win_rates"]:
            share = f"{r['share']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            rows.append(
                [f"{r['a']} over {r['b']}", str(r["wins"]), str(r["losses"]), str(r["ties"]), share, r["verdict"]]
            )
        head = ["", "wins", "losses", "ties", "share of wins", ""]
        alpha = "n/a" if entry["alpha"] is None else f"{entry['alpha']:.3f}"
        sheets.append(Sheet(f"People: {question}", [*notes, f"Krippendorff's alpha {alpha}."], head, rows))
    if result["opinion"]:
        rows = [
            [method, f"{o['mean']:.2f} [{o['low']:.2f}, {o['high']:.2f}]", str(o["votes"])]
            for method, o in result["opinion"].items()
            if o["mean"] is not None
        ]
        sheets.append(Sheet("People: mean opinion (1 to 5)", notes, ["", "mean", "votes"], rows))
    return sheets


def _read(folder: Path, name: str, option: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{option}={folder} holds no {name}: give the folder that the command wrote.")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is no JSON ({error.msg}): write it anew.") from error
    if not isinstance(result, dict) or result.get("schema") != KNOWN[name]:
        raise ConfigError(f"{path} is of another version of this program: write it anew.")
    return result


def _value(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    number = math.nan if entry["value"] is None else entry["value"]
    return " ".join(format_value(MetricValue(number, entry["low"], entry["high"], "higher"))).strip()
