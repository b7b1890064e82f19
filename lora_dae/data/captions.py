"""What becomes of a photo's words before the text encoder sees them: templates, tags, trigger word."""

from __future__ import annotations

import hashlib
import re
import string
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data.catalog import digests_of, say_once
from lora_dae.data.entry import Entry
from lora_dae.data.formats.files import read_jsonl

ENDINGS = "(?:s|es|ing)?"  # of data.no_flip_words: logos, lettering


def prepare_captions(entries: list[Entry], cfg: DataConfig) -> list[Entry]:
    """The entries with their final captions, all that an epoch may choose from; ConfigError where one is missing.

    A ``captions.template`` takes the place of all captions. Otherwise ``captions.file`` fills gaps, and
    ``captions.missing`` says what to do with those that remain. The trigger word goes first; last come the shuffled
    copies. What the publisher says of a photo decides whether it may be mirrored, also where a template leaves it out.
    """
    options = cfg.captions
    filled = _from_file(options.file, entries, cfg.cache_dir) if options.file else {}
    fields = _fields(options.template) if options.template else []
    prepared = []
    for entry in entries:
        if options.template:
            captions: tuple[str, ...] = (_from_template(options.template, fields, entry),)
        else:
            captions = entry.captions or filled.get(entry.id) or _fallback(entry, options)
        if not captions:
            continue
        if options.trigger:
            captions = tuple(c if _has_word(c, options.trigger) else f"{options.trigger}, {c}" for c in captions)
        captions = (*captions, *_shuffled(entry.id, captions[0], options))
        said = (*captions, *entry.captions, *entry.attributes.values(), entry.category or "")
        mirror = entry.mirror and not any(_has_word(s, word, ENDINGS) for s in said for word in cfg.no_flip_words)
        prepared.append(replace(entry, captions=tuple(dict.fromkeys(captions)), mirror=mirror))
    return prepared


def _from_file(name: str, entries: list[Entry], cache_dir: str) -> dict[str, tuple[str, ...]]:
    """id -> captions of the file, for entries without any; not those that were written for another photo.

    An id may be the number of a row, which is another photo's once a row is inserted before it.
    """
    lines = _read_file(name)
    told = [e for e in entries if not e.captions and any(digest for _, digest in lines.get(e.id, ()))]
    now = digests_of(told, cache_dir)
    fitting = {
        id: tuple(text for text, digest in found if digest in (None, now.get(id, digest)))
        for id, found in lines.items()
    }
    others = [id for id in now if not fitting[id]]
    if others:
        say_once(
            f"{len(others)} of {len(now)} captions in {name} were written for other photos than those that have their "
            f"ids now ({others[0]} is the first), and are not used: python -m lora_dae.data caption --to {name} writes "
            "new ones"
        )
    return fitting


def _read_file(name: str) -> dict[str, list[tuple[str, str | None]]]:
    """id -> captions of a captioner's jsonl, each with the digest of its photo or None where the line does not tell.

    Lines marked ``"reject": true`` are not used.
    """
    found: dict[str, list[tuple[str, str | None]]] = {}
    for number, row in read_jsonl(Path(name).expanduser()):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("text"), str):
            raise ConfigError(f'{name} line {number} must be an object like {{"id": ..., "text": ...}}.')
        if row["text"].strip() and not row.get("reject"):
            found.setdefault(row["id"], []).append((row["text"].strip(), row.get("digest")))
    return found


def _fields(template: str) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ConfigError(f"data.captions.template={template!r} is no template ({error}): use {{name}}.") from error


def _from_template(template: str, fields: list[str], entry: Entry) -> str:
    """The template with the entry's attributes; a field that it lacks vanishes, and "a" becomes "an" where due."""
    known = {"category": entry.category or "", **entry.attributes}
    unknown = [name for name in fields if name not in known]
    if len(unknown) == len(fields) and fields:
        have = ", ".join(sorted(known)) or "none"
        raise ConfigError(
            f"data.captions.template needs {', '.join(unknown)}, but {entry.where} has none of these (it has {have})."
        )
    words = template.format_map({name: known.get(name, "") for name in fields})
    words = re.sub(r"\s+([,.])", r"\1", " ".join(words.split()))
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", words)


def _fallback(entry: Entry, options: CaptionConfig) -> tuple[str, ...]:
    if options.missing == "file_name":
        stem = PurePosixPath(entry.id.partition("#")[0]).stem
        words = " ".join(re.sub(r"[_\-.]+", " ", stem).split())
        return (re.sub(r"( \d+)+$", "", words) or words,)
    if options.missing == "category" and entry.category:
        return (entry.category,)
    if options.missing == "drop":
        return ()
    raise ConfigError(
        f"{entry.where} has no caption: write one, fill the gaps with data.captions.template, data.captions.file or "
        "data.captions.missing=file_name, or leave such photos out with data.captions.missing=drop."
    )


def _shuffled(name: str, caption: str, options: CaptionConfig) -> list[str]:
    """``shuffles`` copies with the tags after the kept ones in another order: the same ones in every run."""
    tags = [tag.strip() for tag in caption.split(",")]
    kept = options.keep_tags + bool(options.trigger)
    if len(tags) - kept < 2:
        return []
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    return [
        ", ".join([*tags[:kept], *(tags[kept:][i] for i in rng.permutation(len(tags) - kept))])
        for _ in range(options.shuffles)
    ]


def _has_word(caption: str, word: str, endings: str = "") -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}{endings}(?!\w)", caption, re.IGNORECASE) is not None


def token_counts(captions: list[str], tokenizer: Any) -> list[int]:
    """Tokens of each caption, with the two that mark beginning and end."""
    return [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False).input_ids]


def long_captions(captions: list[str], tokenizer: Any, chunks: int = 1, encoders: int = 1) -> str | None:
    """One sentence on captions that the text encoder will not see to their end in ``chunks`` windows, or None.

    Further windows are advised to a model with one of the ``encoders`` alone: SDXL's two take none.
    """
    unique = list(dict.fromkeys(captions))
    limit = chunks * (tokenizer.model_max_length - 2) + 2
    long = [(n, c) for n, c in zip(token_counts(unique, tokenizer), unique, strict=True) if n > limit]
    if not long:
        return None
    most, worst = max(long)
    return (
        f"{len(long)} of {len(unique)} different captions have more than the {limit} tokens that the text encoder "
        f'takes and are cut there (the longest has {most}: "{worst[:60]}...")'
        + (f": backbone.text_chunks={chunks + 1} takes more" if encoders == 1 else ": shorten them")
    )
