"""vqa.md: the answers' table, with everything that a reader needs to doubt it."""

from __future__ import annotations

import math
from typing import Any

from lora_dae.evaluation.report.sheets import ONE_JUDGE, no_controls, sees_texture
from lora_dae.evaluation.report.table import MetricValue, format_value
from lora_dae.evaluation.statistics.preference import SHARES


def write_markdown(result: dict[str, Any]) -> str:
    """Markdown from the dictionary that becomes vqa.json."""
    protocol = result["protocol"]
    lines = [
        "# Visual question answering",
        "",
        f"{protocol['prompts']} prompts ({protocol['split']} split), {protocol['resolution']}, question bank "
        f"{protocol['bank']}, prompt version {protocol['prompt_version']}, temperature 0 where a judge takes it. "
        f"{protocol['intervals']}.",
        "Scores in [0, 1]: share of right answers, a grade g of 5 as (g - 1) / 4; a question whose parent failed is "
        "wrong, a missing answer counts nowhere. vqascore: the probability of Yes as first token (Lin et al. 2024), "
        "in no mean; comparable for one judge, template and resolution only.",
    ]
    if protocol["without_real"]:
        lines += ["", f"**Warning: {no_controls(protocol)}**"]
    for judge, entry in result["judges"].items():
        lines += ["", f"## Judge {judge}", "", _reading(entry["reading"]), ""]
        lines += _scores(result["baseline"], entry)
        if "sees_texture" in entry:
            words = sees_texture(entry["sees_texture"])
            lines += ["", f"**{words}**" if words.startswith("Warning") else words]
        if "pairs" in entry:
            lines += ["", *_pairs(entry["pairs"])]
    if len(result["judges"]) == 1:
        lines += ["", f"**Warning: one judge alone.** {ONE_JUDGE}"]
    if result["agreement"]:
        lines += ["", "## Agreement between judges (Krippendorff's alpha)", "", "| subject | alpha |", "|---|---:|"]
        lines += [f"| {name} | {_number(alpha)} |" for name, alpha in result["agreement"].items()]
    return "\n".join(lines) + "\n"


def _reading(reading: dict[str, Any]) -> str:
    return (
        f"{reading['questions']} questions: {reading['strict']:.1%} read strictly, {reading['tolerant']:.1%} "
        f"tolerantly, missing {reading['parse_failures'] + reading['unanswered']:.1%} (parse failures "
        f"{reading['parse_failures']:.1%}, unanswered {reading['unanswered']:.1%})."
    )


def _scores(baseline: str, entry: dict[str, Any]) -> list[str]:
    subjects = list(dict.fromkeys(s for row in entry["scores"].values() for s in row))
    lines = ["| | " + " | ".join(subjects) + " |", "|---|" + "---:|" * len(subjects)]
    for method, row in entry["scores"].items():
        cells = []
        for subject in subjects:
            if subject not in row:
                cells.append("")
                continue
            value = row[subject]
            number = math.nan if value["value"] is None else value["value"]
            cell = " ".join(format_value(MetricValue(number, value["low"], value["high"], "higher"))).strip()
            compared = entry["against_first"].get(f"{method} | {subject}")
            cells.append(cell + (f", {compared['verdict']}" if compared else ""))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, "", f"better / worse / cannot tell: against '{baseline}', paired, Holm-corrected."]


def _pairs(pairs: dict[str, Any]) -> list[str]:
    lines = [
        f"Pairs, asked in both orders: {pairs['inconsistent']:.1%} contradict themselves (counted as ties), position "
        f"bias {pairs['position_bias']:.1%}, 'first' in {_number(pairs['first_share'])} of the answers that name a "
        f"place, {pairs['missing']} pairs without two readable answers. {SHARES}",
    ]
    for question, entry in pairs["questions"].items():
        lines += ["", f"| {question} | wins | losses | ties | share of wins | |", "|---|---:|---:|---:|---:|---|"]
        for r in entry["win_rates"]:
            share = f"{r['share']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            lines.append(
                f"| {r['a']} over {r['b']} | {r['wins']} | {r['losses']} | {r['ties']} | {share} | {r['verdict']} |"
            )
    return lines


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.3f}"
