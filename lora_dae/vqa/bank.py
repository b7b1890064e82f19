"""The question bank: a versioned YAML file that users edit, and the questions that it gives for one prompt.

Yes/no, multiple-choice and graded questions with parents, after TIFA (Hu et al. 2023), DSG (Cho et al. 2024: a child of
a failed parent counts zero) and VQAScore (Lin et al. 2024: how probable "yes" is as the answer to one question about
the whole caption; for judges that tell probabilities).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_dae.config import ConfigError

SHIPPED = Path(__file__).parent / "bank.yaml"
KINDS = ("yes_no", "choice", "graded", "score")
GRADES = ("1", "2", "3", "4", "5")
PAIR_OPTIONS = ("first", "second", "tie")
KEYS = {"id", "about", "kind", "text", "answer", "attribute", "unless", "words", "parents"}


@dataclass(frozen=True)
class Template:
    """A question before it meets a prompt; the fields are those of the file."""

    id: str
    about: str
    kind: str
    text: str
    answer: str | None = None
    attribute: str | None = None
    unless: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One question about one picture (or a pair): its text, the answers that exist, and which is right (or None)."""

    id: str
    about: str
    kind: str  # yes_no | choice | graded | score (the probability of yes) | pair
    text: str
    options: tuple[str, ...]
    right: str | None = None
    attribute: str | None = None
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bank:
    version: str
    templates: tuple[Template, ...]
    pairs: tuple[tuple[str, str], ...]  # (id, text)
    attributes: dict[str, tuple[str, ...]]
    synonyms: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    phrases_only: tuple[str, ...] = ()

    def read_caption(self, caption: str) -> dict[str, str]:
        """Attributes that a caption names: those of which exactly one option (or a synonym) stands in it."""
        text = caption.lower()
        for phrase in self.ignore:
            text = re.sub(phrase, " ", text)
        found = {}
        for name, options in self.attributes.items():
            named = []
            for option in options:
                words = list(self.synonyms.get(name, {}).get(option, []))
                words += [] if name in self.phrases_only else [option]
                if any(re.search(rf"(?<![\w-]){re.escape(w)}(?![\w-])", text) for w in words):
                    named.append(option)
            if len(named) == 1:
                found[name] = named[0]
        return found

    def questions(self, caption: str, attributes: Mapping[str, str] | None) -> list[Question]:
        """The questions for one prompt; without ``attributes`` they are read off the caption.

        A question whose parent is not asked keeps its other parents.
        """
        known = dict(attributes) if attributes is not None else self.read_caption(caption)
        asked: list[Question] = []
        for t in self.templates:
            value = None if t.attribute is None else known.get(t.attribute)
            if t.attribute is not None and (value is None or value in t.unless):
                continue
            if t.words and not any(re.search(rf"\b{re.escape(w)}\b", caption.lower()) for w in t.words):
                continue
            options: tuple[str, ...]
            right: str | None
            if t.kind == "choice":
                options = self.attributes[t.attribute or ""]
                if value not in options:
                    continue  # a value that the bank has no option for cannot be asked about
                right = value
            else:
                options = GRADES if t.kind == "graded" else ("yes", "no")
                right = t.answer if t.kind == "yes_no" else None
            there = {q.id for q in asked}
            parents = tuple(p for p in t.parents if p in there)
            text = _fill(t.text, {**known, "caption": caption})
            asked.append(Question(t.id, t.about, t.kind, text, options, right, t.attribute, parents))
        return asked

    def pair_questions(self, caption: str) -> list[Question]:
        """The questions that compare two pictures of one prompt."""
        return [Question(i, i, "pair", _fill(text, {"caption": caption}), PAIR_OPTIONS) for i, text in self.pairs]


def load_bank(path: Path | None = None) -> Bank:
    """Read a bank (None: the shipped one); ConfigError says which question is wrong and how."""
    path = path or SHIPPED
    if not path.is_file():
        raise ConfigError(f"bank={path} does not exist: copy {SHIPPED.name} of the package and edit it.")
    text = path.read_text(encoding="utf-8")
    try:
        data: Any = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(data, dict) or "version" not in data or not data.get("questions"):
        raise ConfigError(f"{path} needs `version` and `questions`: see {SHIPPED.name} of the package.")
    attributes = {name: tuple(str(o) for o in options) for name, options in (data.get("attributes") or {}).items()}
    templates: list[Template] = []
    for number, row in enumerate(data["questions"], start=1):
        templates.append(_template(row, f"{path}, question {number}", attributes, templates))
    pairs = _pairs(data.get("pairs") or [], path)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return Bank(
        # The digest beside the number: an edited file with a forgotten version is another bank all the same.
        version=f"{data['version']}-{digest}",
        templates=tuple(templates),
        pairs=pairs,
        attributes=attributes,
        synonyms=data.get("synonyms") or {},
        ignore=tuple(data.get("ignore") or ()),
        phrases_only=tuple(data.get("phrases_only") or ()),
    )


def _pairs(rows: Any, path: Path) -> tuple[tuple[str, str], ...]:
    """(id, text) of the questions that compare two pictures."""
    found: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, pair {number}"
        if not isinstance(row, dict) or set(row) != {"id", "text"}:
            raise ConfigError(f"{where} needs id and text, and nothing else.")
        name, text = str(row["id"]), str(row["text"])
        if name in found:
            raise ConfigError(f"{where} ({name}) has the id of an earlier pair: ids must differ.")
        if unknown := set(re.findall(r"{(\w+)}", text)) - {"caption"}:
            raise ConfigError(f"{where} ({name}) fills in {{{min(unknown)}}}: only {{caption}} can be filled in.")
        found[name] = text
    return tuple(found.items())


def _template(row: Any, where: str, attributes: Mapping[str, object], before: list[Template]) -> Template:
    if not isinstance(row, dict) or not {"id", "about", "kind", "text"} <= set(row):
        raise ConfigError(f"{where} needs id, about, kind and text.")
    where = f"{where} ({row['id']})"
    if unknown := set(row) - KEYS:
        raise ConfigError(f"{where} has an unknown key {sorted(unknown)[0]}: use {', '.join(sorted(KEYS))}.")
    lists = {key: tuple(str(v) for v in row.get(key) or ()) for key in ("unless", "words", "parents")}
    words = {k: str(v) for k, v in row.items() if k not in lists}
    t = Template(**words, **lists)  # type: ignore[arg-type]
    if t.kind not in KINDS:
        raise ConfigError(f"{where} has kind {t.kind}: use one of {', '.join(KINDS)}.")
    if t.kind == "choice" and t.attribute is None:
        raise ConfigError(f"{where} is a choice without attribute: name one, its values are the options.")
    if t.attribute is not None and t.attribute not in attributes:
        raise ConfigError(f"{where} asks about {t.attribute}, which `attributes` does not list: add its options.")
    if t.kind == "score" and t.parents:
        raise ConfigError(
            f"{where} is a score with parents: a probability is no answer that could fail, leave them out."
        )
    if t.kind == "yes_no" and t.answer not in ("yes", "no"):
        raise ConfigError(f"{where} needs answer: 'yes' or 'no' (in quotes), the one that is right.")
    ids = [b.id for b in before]
    if t.id in ids:
        raise ConfigError(f"{where} has the id of an earlier question: ids must differ.")
    for parent in t.parents:
        if parent not in ids:
            raise ConfigError(f"{where} has the parent {parent}, which is no earlier question: put it before.")
    for name in re.findall(r"{(\w+)}", t.text):
        if name not in (t.attribute, "caption"):
            raise ConfigError(f"{where} fills in {{{name}}}: only its own attribute and {{caption}} can be filled in.")
    return t


def _fill(text: str, known: Mapping[str, str]) -> str:
    return re.sub(r"{(\w+)}", lambda m: known[m.group(1)], text)
