"""Which photos train, validate and test: by group, so that no garment is on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from lora_dae.config import ConfigError
from lora_dae.data.catalog import Facts
from lora_dae.data.entry import Entry
from lora_dae.data.formats.files import SPLIT_NAMES

SPLITS = ("train", "val", "test")
SHOWN = ("image", "source")  # files that show the garment: the same one twice is one garment
FactsById = Mapping[str, Mapping[str, Facts]]  # entry id -> part -> what is known of that file


def check_splits(entries: list[Entry]) -> None:
    """Raises ConfigError where some entries name a published split and others none: these would be trained on."""
    named = next((entry for entry in entries if entry.split is not None), None)
    bare = next((entry for entry in entries if entry.split is None), None)
    if named is not None and bare is not None:
        raise ConfigError(
            f"{bare.where} belongs to no split, but {named.where} to {named.split}: say for all of them where they "
            f"belong ({', '.join(SPLIT_NAMES)}), or for none."
        )


def split_entries(
    entries: list[Entry], val_fraction: float, test_fraction: float, seed: int, facts: FactsById | None = None
) -> dict[str, list[Entry]]:
    """The publisher's splits where entries name them (all do, or none), otherwise ours.

    Ours go by a hash of (seed, group id), so that a group keeps its split when photos are added. A split that
    the hash would leave empty gets the group next in line, so three groups are enough; with fewer, a split
    stays empty. Groups with a file in common are one (``unite``), where ``facts`` tell the files' digests.
    A published train split without a validation split gives some of its groups to that; a published
    validation split without a test split is tested on. What a published split trains on although another shows the
    same group is left out, so that test photos stay those that were published.
    """
    if any(entry.split in ("val", "test") for entry in entries):
        return _published(entries, val_fraction, seed, facts or {})
    entries = unite(entries, facts or {})
    place, groups = _in_order(entries, seed)
    tests = max(1, sum(place[group] < test_fraction for group in groups))
    tests = min(tests, len(groups) - 2)
    held_out = max(tests + 1, sum(place[group] < test_fraction + val_fraction for group in groups))
    held_out = min(held_out, len(groups) - 1)
    train, val, test = set(groups[held_out:]), set(groups[tests:held_out]), set(groups[:tests])
    return {
        "train": [entry for entry in entries if entry.group_id in train],
        "val": [entry for entry in entries if entry.group_id in val],
        "test": [entry for entry in entries if entry.group_id in test],
    }


def unite(entries: list[Entry], facts: FactsById) -> list[Entry]:
    """The entries, with one group id for groups in which the same target file or the same source file occurs.

    Many layouts store a garment's photo anew for each photo of a model: only the bytes tell that it is one garment.
    The least of the ids stands for all, so the order of the entries does not matter.
    """
    into: dict[str, str] = {}  # group -> another one of the same garment, whose id is less

    def least(group: str) -> str:
        while group in into:
            into[group] = into.get(into[group], into[group])  # halves the way: a million photos of one source are cheap
            group = into[group]
        return group

    for part in SHOWN:
        seen: dict[str, str] = {}  # digest -> the first group that has it
        for entry in entries:
            digest = _digest(entry, part, facts)
            if digest:
                one, other = sorted((least(entry.group_id), least(seen.setdefault(digest, entry.group_id))))
                if one != other:
                    into[other] = one
    return [replace(e, group_id=least(e.group_id)) if e.group_id in into else e for e in entries]


def count_shared(splits: dict[str, list[Entry]], facts: FactsById) -> int:
    """How many training entries have a target or source file in common with a held-out one: as a publisher split."""
    shared: set[str] = set()
    for part in SHOWN:
        held_out = {_digest(entry, part, facts) for name in ("val", "test") for entry in splits[name]} - {""}
        shared |= {entry.id for entry in splits["train"] if _digest(entry, part, facts) in held_out}
    return len(shared)


def _digest(entry: Entry, part: str, facts: FactsById) -> str:
    known = facts.get(entry.id, {}).get(part)
    return "" if known is None else known.digest


def spread(entries: list[Entry]) -> list[Entry]:
    """A held-out split in the order of a hash of its ids, so that its first N are a sample of all of it.

    Sources list one category or one folder after the other, and the first pairs are those that are drawn and measured.
    """
    return sorted(entries, key=lambda entry: _unit_hash(entry.id))


def _published(entries: list[Entry], val_fraction: float, seed: int, facts: FactsById) -> dict[str, list[Entry]]:
    parts: dict[str, list[Entry]] = {name: [e for e in entries if e.split == name] for name in SPLITS}
    if not parts["test"]:
        parts["val"], parts["test"] = [], parts["val"]
    held_out: set[str] = set()
    for name in reversed(SPLITS):
        parts[name] = [entry for entry in parts[name] if entry.group_id not in held_out]
        held_out.update(entry.group_id for entry in parts[name])
    if parts["val"]:
        return parts
    parts["train"] = unite(parts["train"], facts)
    place, groups = _in_order(parts["train"], seed)
    count = max(1, sum(place[group] < val_fraction for group in groups))
    val = set(groups[: min(count, len(groups) - 1)])
    parts["val"] = [entry for entry in parts["train"] if entry.group_id in val]
    parts["train"] = [entry for entry in parts["train"] if entry.group_id not in val]
    return parts


def _in_order(entries: list[Entry], seed: int) -> tuple[dict[str, float], list[str]]:
    place = {entry.group_id: _unit_hash(f"{seed}:{entry.group_id}") for entry in entries}
    return place, sorted(place, key=lambda group: place[group])


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on nothing but ``text``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
