"""The whole story: pictures, questions, judges, table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dae.adapter.atomic import atomic
from lora_dae.config import ConfigError
from lora_dae.evaluation.controls import blurred
from lora_dae.evaluation.pictures import Item, find_methods, gather
from lora_dae.evaluation.report.table import without_nan
from lora_dae.evaluation.statistics.compare import compare_paired
from lora_dae.evaluation.statistics.preference import judged_win_rates, strengths
from lora_dae.vqa.ask import Answer, Task, ask_all
from lora_dae.vqa.bank import Bank, load_bank
from lora_dae.vqa.cache import AnswerCache
from lora_dae.vqa.judges import PROMPT_VERSION, Judge, build_judge, judge_config
from lora_dae.vqa.pairwise import outcome, pair_tasks
from lora_dae.vqa.report import write_markdown
from lora_dae.vqa.score import compare_methods, interval, judges_agree, per_item, reading

SCHEMA = 3  # 1 had no verdicts beside win rates, 2 agreement on the controls as well
REAL, BLURRED = "real photos", "real photos, blurred"


@dataclass
class VqaRequest:
    """The keys of conf/vqa.yaml."""

    runs: list[str]
    judges: dict[str, Any]
    bank: str | None
    split: str
    num_samples: int
    pairs: bool
    controls: bool
    bootstrap: int
    output: str


def ask_judges(request: VqaRequest, console: Console) -> dict[str, Any]:
    """Ask every judge about every method; writes vqa.json, vqa.md and answers.jsonl into ``output``.

    Raises ConfigError for bad input before anything is drawn or asked (a model in this process is loaded once the
    pictures are there), and when a judge stops; its answers until then stay in ``output/answers.sqlite`` and are not
    asked again.
    """
    if not request.judges:
        raise ConfigError("no judge: give judge=[classifier], or others of conf/judge/.")
    if request.bootstrap < 2:
        raise ConfigError(f"bootstrap={request.bootstrap} is below 2: give e.g. 1000.")
    bank = load_bank(Path(request.bank) if request.bank else None)
    configs = {name: judge_config(name, values) for name, values in request.judges.items()}
    find_methods(request.runs, request.split)  # before a judge is loaded
    output = Path(request.output)
    cache = AnswerCache(output / "answers.sqlite")
    # First: a missing key or package costs no drawing. But a model in this process would lie beside the run on the GPU.
    built = {name: build_judge(name, cfg) for name, cfg in configs.items() if cfg.kind != "transformers"}
    sets = gather(request.runs, request.split, request.num_samples, console)
    judges = [built.get(name) or build_judge(name, cfg) for name, cfg in configs.items()]
    pictures = dict(sets.methods)
    if request.controls:
        pictures |= controls(sets.items)
    tasks = single_tasks(bank, sets.items, pictures)
    pairs = []
    if request.pairs:
        pairs = pair_tasks([bank.pair_questions(i.prompt) for i in sets.items], sets.methods, list(sets.methods))
    answers: dict[str, list[Answer]] = {}
    compared: dict[str, list[Answer]] = {}
    with Progress(
        TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as progress:
        for judge in judges:
            answers[judge.name] = _ask(tasks, judge, cache, progress, judge.name)
            compared[judge.name] = _ask(pairs, judge, cache, progress, f"{judge.name}, pairs")
    cache.close()
    result = summarize(answers, compared, list(pictures), list(sets.methods), len(sets.items), request.bootstrap)
    result["protocol"] = {
        "prompts": len(sets.items),
        "split": request.split,
        "resolution": f"{next(iter(pictures.values()))[0].shape[1]} pixels wide",
        "bank": bank.version,
        "prompt_version": PROMPT_VERSION,
        "without_real": sum(item.real is None for item in sets.items) if request.controls else 0,
        "judges": {name: {k: v for k, v in asdict(cfg).items() if v is not None} for name, cfg in configs.items()},
        "temperature": "0 where a judge takes it",
        "intervals": f"95 %, {request.bootstrap} bootstrap samples of the prompts; comparisons Holm-corrected",
    }
    _write(output, result, answers, compared)
    console.print((output / "vqa.md").read_text(encoding="utf-8"), markup=False, highlight=False, soft_wrap=True)
    return result


def controls(items: Sequence[Item]) -> dict[str, list[np.ndarray]]:
    """The real photos and blurred copies, where every prompt has its photo."""
    real = [item.real for item in items if item.real is not None]
    return {REAL: real, BLURRED: [blurred(r) for r in real]} if len(real) == len(items) else {}


def single_tasks(bank: Bank, items: Sequence[Item], pictures: Mapping[str, list[np.ndarray]]) -> list[Task]:
    """Every question of every prompt about every method's picture."""
    tasks = []
    for number, item in enumerate(items):
        for question in bank.questions(item.prompt, item.attributes):
            tasks += [Task(number, (method,), (images[number],), question) for method, images in pictures.items()]
    return tasks


def summarize(
    answers: Mapping[str, Sequence[Answer]],
    compared: Mapping[str, Sequence[Answer]],
    rows: Sequence[str],
    methods: Sequence[str],
    num_items: int,
    bootstrap: int,
) -> dict[str, Any]:
    """Every number, ready for JSON; ``rows`` are the methods and the controls, of which agreement knows nothing.

    Judges agree on sharp and blurred photos more easily than on what is compared.
    """
    judges: dict[str, Any] = {}
    for judge, given in answers.items():
        scores = {row: per_item(given, row, num_items) for row in rows}
        entry: dict[str, Any] = {"reading": asdict(reading(given))}
        entry["scores"] = {
            row: {subject: interval(v, bootstrap, 0).as_dict() for subject, v in scores[row].items()} for row in rows
        }
        comparisons = compare_methods(scores, methods)
        entry["against_first"] = {f"{m} | {s}": asdict(c) for (m, s), c in comparisons.items()}
        if BLURRED in scores and "texture" in scores[REAL]:
            # A judge that cannot tell a sharp photo from a blurred one says nothing about anybody's texture.
            seen = compare_paired([scores[REAL]["texture"]], [scores[BLURRED]["texture"]])[0]
            entry["sees_texture"] = asdict(seen)
        if compared.get(judge):
            entry["pairs"] = _pairs(compared[judge], judge, methods, bootstrap)
        judges[judge] = entry
    own = {judge: [a for a in given if set(a.task.methods) <= set(methods)] for judge, given in answers.items()}
    agreement = judges_agree(own) if len(own) > 1 else {}
    about = {"schema": SCHEMA, "methods": list(methods), "baseline": methods[0]}
    return {**about, "judges": judges, "agreement": agreement}


def _pairs(given: Sequence[Answer], judge: str, methods: Sequence[str], bootstrap: int) -> dict[str, Any]:
    found = outcome(given, judge)
    questions = {}
    rates = judged_win_rates(found.votes, methods)
    for question, votes in found.votes.items():
        fitted = strengths(votes, list(dict.fromkeys(m for v in votes for m in (v.a, v.b))), bootstrap)
        questions[question] = {
            "win_rates": rates[question],
            "strengths": {
                m: [float(v), float(low), float(high)]
                for m, v, low, high in zip(fitted.methods, fitted.value, fitted.low, fitted.high, strict=True)
            },
        }
    shares = {k: getattr(found, k) for k in ("position_bias", "first_share", "inconsistent", "missing")}
    return {**shares, "reading": asdict(reading(given)), "questions": questions}


def _ask(tasks: Sequence[Task], judge: Judge, cache: AnswerCache, progress: Progress, label: str) -> list[Answer]:
    taken = [t for t in tasks if judge.takes(t.question)]
    if not taken:
        return []
    bar = progress.add_task(label, total=len(taken))
    return ask_all(taken, judge, cache, lambda: progress.advance(bar))


def _write(
    output: Path,
    result: dict[str, Any],
    answers: Mapping[str, Sequence[Answer]],
    compared: Mapping[str, Sequence[Answer]],
) -> None:
    """Each file whole or not at all; ConfigError where there is no room."""
    rows = []
    for judge in answers:
        for a in [*answers[judge], *compared[judge]]:
            row = {
                "judge": judge, "prompt": a.task.item, "methods": a.task.methods, "question": a.task.question.id,
                "text": a.task.question.text, "right": a.task.question.right, "answer": a.parsed.answer,
                "read": a.parsed.how if a.raw is not None else "unanswered", "raw": a.raw,
                "why": a.why,
            }  # fmt: skip
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    texts = {
        "vqa.json": json.dumps(without_nan(result), indent=2, ensure_ascii=False) + "\n",
        "vqa.md": write_markdown(result),
        "answers.jsonl": "".join(rows),
    }
    for name, text in texts.items():
        try:
            with atomic(output / name) as partial:
                partial.write_text(text, encoding="utf-8")
        except ConfigError as error:
            raise ConfigError(
                f"{str(error).rstrip('.')}; all answers stay in {output / 'answers.sqlite'}, and the same command asks "
                "none of them again."
            ) from error
