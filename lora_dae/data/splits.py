"""Which photos train, validate and test: by group, so that no garment is on both sides."""

from __future__ import annotations

import hashlib

from lora_dae.data.entry import Entry

SPLITS = ("train", "val", "test")


def split_entries(entries: list[Entry], val_fraction: float, test_fraction: float, seed: int) -> dict[str, list[Entry]]:
    """The publisher's splits where entries name them, otherwise ours.

    Ours go by a hash of (seed, group id), so that a group keeps its split when photos are added. A split that
    the hash would leave empty gets the group next in line, so three groups are enough; with fewer, a split
    stays empty. A published train split without a validation split gives some of its groups to that; a published
    validation split without a test split is tested on. What a published split trains on although another shows the
    same group is left out, so that test photos stay those that were published.
    """
    if any(entry.split in ("val", "test") for entry in entries):
        return _published(entries, val_fraction, seed)
    place, groups = _in_order(entries, seed)
    tests = max(1, sum(place[group] < test_fraction for group in groups))
    tests = min(tests, len(groups) - 2)
    held_out = max(tests + 1, sum(place[group] < test_fraction + val_fraction for group in groups))
    held_out = min(held_out, len(groups) - 1)
    test, val = set(groups[:tests]), set(groups[tests:held_out])
    return {
        "train": [entry for entry in entries if entry.group_id not in test | val],
        "val": [entry for entry in entries if entry.group_id in val],
        "test": [entry for entry in entries if entry.group_id in test],
    }


def _published(entries: list[Entry], val_fraction: float, seed: int) -> dict[str, list[Entry]]:
    parts: dict[str, list[Entry]] = {name: [e for e in entries if (e.split or "train") == name] for name in SPLITS}
    if not parts["test"]:
        parts["val"], parts["test"] = [], parts["val"]
    held_out: set[str] = set()
    for name in reversed(SPLITS):
        parts[name] = [entry for entry in parts[name] if entry.group_id not in held_out]
        held_out.update(entry.group_id for entry in parts[name])
    if parts["val"]:
        return parts
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
