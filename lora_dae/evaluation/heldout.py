"""Held-out pairs, in memory, and whether they really were held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lora_dae.config import ConfigError
from lora_dae.data.pair import Pair, PairDataset, replace_pixels

MOST = 200_000  # training pairs that are looked through one by one


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs, in memory."""

    pairs: list[Pair]

    @classmethod
    def take(cls, dataset: PairDataset, count: int, conditioning: str) -> HeldOut:
        """The first ``count`` pairs of a split, without sources where none steer; fewer than 2 raise ConfigError."""
        if len(dataset) < 2:
            raise ConfigError(f"the split to evaluate on has {len(dataset)} images: give it at least 2.")
        pairs = [dataset[i] for i in range(min(count, len(dataset)))]
        return cls(pairs if conditioning == "source" else [replace_pixels(p, source=None) for p in pairs])

    @property
    def captions(self) -> list[str]:
        return [p.caption for p in self.pairs]

    @property
    def sources(self) -> np.ndarray | None:
        found = [p.source for p in self.pairs if p.source is not None]
        return np.stack(found) if len(found) == len(self.pairs) else None

    @property
    def masks(self) -> torch.Tensor | None:
        found = [p.mask for p in self.pairs if p.mask is not None]
        return torch.from_numpy(np.stack(found)) if len(found) == len(self.pairs) else None

    @property
    def attributes(self) -> list[dict[str, str]] | None:
        found = [p.attributes for p in self.pairs if p.attributes is not None]
        return found if len(found) == len(self.pairs) else None


def training_pairs(train: PairDataset, held_out: HeldOut) -> HeldOut | None:
    """As many training pairs, all different, as were held out and of their size; None where there are fewer."""
    size = held_out.pairs[0].size
    found = {}
    for k in range(len(train)):
        pair = train[k]
        if pair.size == size:
            found[pair.id] = pair
        if len(found) == len(held_out.pairs):
            return HeldOut(list(found.values()))
    return None


def overlap(splits: dict[str, PairDataset], split: str, count: int) -> str | None:
    """A warning when photos of the evaluated split are trained on as well, told by their content; else None."""
    size = len(splits["train"])
    if size > MOST and not isinstance(getattr(splits["train"], "facts", None), list):
        return f"whether {split} photos are among the {size} training photos was not checked: they are too many"
    known = set(_contents(splits["train"], size))
    both = sum(content in known for content in _contents(splits[split], min(count, len(splits[split]))))
    if not both:
        return None
    return (
        f"{both} of the {split} photos are in the training split too, so the numbers are too good: take the copies "
        "out (python -m lora_dae.data inspect names them) and train again"
    )


def _contents(dataset: Any, count: int) -> list[str]:
    """What tells photos apart by content; nothing is decoded."""
    facts = getattr(dataset, "facts", None)  # photos: hashes of their files, the same in buckets and squares
    if callable(facts):  # shards
        return [facts(i)["image"].digest for i in range(count)]
    if facts is not None:
        return [facts[i]["image"].digest for i in range(count)]
    return [dataset[i].key("image") or "" for i in range(count)]
