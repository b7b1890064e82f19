"""Answers out of text: strict JSON, then tolerant reading, then missing. Never a guess, never a zero."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_dae.vqa.bank import GRADES, PAIR_OPTIONS

# Their options are words of any text: "I have no idea", "at first glance", "I see 1 garment".
EVERYDAY = (("yes", "no"), GRADES, PAIR_OPTIONS)


@dataclass(frozen=True)
class Parsed:
    """``answer`` is one of the options, or None when the text says none (or several) of them."""

    answer: str | None
    how: Literal["strict", "tolerant", "missing"]


def answer_schema(options: Sequence[str]) -> dict[str, object]:
    """JSON schema of the only answer that is asked for: {"answer": <one of the options>}."""
    return {
        "type": "object",
        "properties": {"answer": {"type": "string", "enum": list(options)}},
        "required": ["answer"],
        "additionalProperties": False,
    }


def parse_answer(text: str, options: Sequence[str]) -> Parsed:
    """Read one of ``options`` out of a judge's text.

    Strict: the text is exactly {"answer": option}. Tolerant: an object with such an answer inside other text; else the
    words "answer: option"; else the one option that the text names, of EVERYDAY options only where the text begins with
    it ("4/5" and "4 out of 5" are the grade 4). A text that names two different options, or none, is missing.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        data = None
    if isinstance(data, dict) and set(data) == {"answer"} and data["answer"] in options:
        return Parsed(data["answer"], "strict")
    text = without_thoughts(text)
    for reader in (_from_json, _after_label, _only_option):
        found = reader(text, options)
        if len(found) == 1:
            return Parsed(found.pop(), "tolerant")
        if found:
            break  # it contradicts itself: a looser reading would only pick one
    return Parsed(None, "missing")


def without_thoughts(text: str) -> str:
    """A reasoning model's text without what it thought, to its end where that was cut."""
    return re.sub(r"<think>.*?(</think>|$)", " ", text, flags=re.DOTALL)


def parse_score(text: str) -> Parsed:
    """The probability of yes out of ``judges.score_reply``, as text.

    Told no but not yes: yes is less probable than every token told, 0 to their precision. Told neither: missing.
    """
    try:
        told = json.loads(text)
        yes, no = told["yes"], told["no"]
        values = [float(p) for p in (yes, no) if p is not None]
    except (ValueError, TypeError, KeyError, RecursionError):
        return Parsed(None, "missing")
    if not values or not all(0 <= p <= 1 + 1e-6 for p in values):
        return Parsed(None, "missing")
    return Parsed(f"{0.0 if yes is None else min(float(yes), 1.0):.6g}", "strict")


def _from_json(text: str, options: Sequence[str]) -> set[str]:
    found = set()
    for match in re.finditer(r"\{[^{}]*\}", text):
        try:
            data = json.loads(match.group())
        except (json.JSONDecodeError, RecursionError):
            continue
        values = [v for k, v in data.items() if str(k).lower() == "answer"]
        found |= {o for v in values for o in options if _normal(str(v)) == _normal(o)}
    return found


def _after_label(text: str, options: Sequence[str]) -> set[str]:
    found = set()
    for match in re.finditer(
        r"(?:answer|score|rating|grade)\W{0,8}(?:is\b)?\W{0,4}([^\n]*)", text, flags=re.IGNORECASE
    ):
        rest = match.group(1)
        starting = [o for o in options if re.match(rf"{_pattern(o)}", rest, flags=re.IGNORECASE)]
        found |= {max(starting, key=len)} if starting else set()
    return found


def _only_option(text: str, options: Sequence[str]) -> set[str]:
    # "4/5" and "4 out of 5" hold two grades, one of which is the scale.
    if graded := set(re.findall(r"(?<![\w.])(\d)\s*(?:/|out of)\s*5\b", text)) & set(options):
        return graded
    text = rest = re.sub(r"\b\d+\.\d+", " ", text)  # 4.5 is none of the grades
    found = set()
    for option in sorted(options, key=len, reverse=True):  # "t-shirt" is not a "shirt" as well
        rest, count = re.subn(_pattern(option), " ", rest, flags=re.IGNORECASE)
        if count:
            found.add(option)
    if len(found) == 1 and tuple(options) in EVERYDAY:
        return {o for o in found if re.match(rf"\W*{_pattern(o)}[ \t]*(?:$|\n|[^\w\s/%])", text, flags=re.IGNORECASE)}
    return found


def _pattern(option: str) -> str:
    return rf"(?<![\w-]){re.escape(option)}(?![\w-])"


def _normal(text: str) -> str:
    return text.strip().strip(".!\"'").lower()
