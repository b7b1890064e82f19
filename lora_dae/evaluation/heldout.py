"""Held-out pairs, in memory, and whether they really were held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lora_dae.config import Config, ConfigError, DataConfig
from lora_dae.data.pair import Pair, PairDataset, replace_pixels

MOST = 200_000  # training pairs that are looked through one by one


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs, in memory: those of a split from number ``first`` on.

    ``wrong_source``: each is drawn with the source photo of the next one.
    """

    pairs: list[Pair]
    first: int = 0
    wrong_source: bool = False

    @classmethod
    def take(cls, dataset: PairDataset, count: int, conditioning: str, first: int = 0, least: int = 2) -> HeldOut:
        """``count`` pairs of a split from ``first`` on, without sources if none steer; ConfigError below ``least``."""
        _enough(len(dataset), first, "the split to evaluate on", least)
        if conditioning == "source" and getattr(dataset, "ignored_sources", False):
            raise ConfigError(
                "the run draws with source photos, and some photos of its data have none: add them, or give "
                "data.missing_source=drop in its config.yaml."
            )
        pairs = [dataset[i] for i in range(first, min(first + count, len(dataset)))]
        return cls(pairs if conditioning == "source" else [replace_pixels(p, source=None) for p in pairs], first)

    @classmethod
    def asked_for(cls, splits: dict[str, PairDataset], cfg: Config) -> HeldOut:
        """What ``cfg.evaluation`` asks for: ``split``, ``first_pair``, ``num_samples``, ``wrong_source``."""
        asked = cfg.evaluation
        found = cls.take(splits[asked.split], asked.num_samples, cfg.conditioning, asked.first_pair)
        return replace(found, wrong_source=asked.wrong_source)

    @staticmethod
    def check(splits: dict[str, PairDataset], cfg: Config) -> None:
        """Raises ConfigError where ``asked_for`` would find fewer than 2 pairs."""
        split = cfg.evaluation.split
        _enough(len(splits[split]), cfg.evaluation.first_pair, f"the {split} split, to evaluate on,")

    @property
    def captions(self) -> list[str]:
        return [p.caption for p in self.pairs]

    @property
    def sources(self) -> np.ndarray | None:
        found = [p.source for p in self.pairs if p.source is not None]
        return np.stack(found) if len(found) == len(self.pairs) else None

    @property
    def numbers(self) -> range:
        """Of the pairs in their split; each picture's noise goes by its number, whichever others are drawn."""
        return range(self.first, self.first + len(self.pairs))

    @property
    def shown(self) -> np.ndarray | None:
        """The source photos that the pictures are drawn with."""
        own = self.sources
        return np.roll(own, -1, axis=0) if self.wrong_source and own is not None else own

    @property
    def masks(self) -> torch.Tensor | None:
        found = [p.mask for p in self.pairs if p.mask is not None]
        return torch.from_numpy(np.stack(found)) if len(found) == len(self.pairs) else None

    @property
    def attributes(self) -> list[dict[str, str]] | None:
        found = [p.attributes for p in self.pairs if p.attributes is not None]
        return found if len(found) == len(self.pairs) else None


def _enough(count: int, first: int, name: str, least: int = 2) -> None:
    left = max(count - first, 0)
    if left < least:
        passed = f" from number {first} on" if first else ""
        raise ConfigError(f"{name} has {left} images{passed}: {least} are needed.")


def enlarged(data: DataConfig, split: str, count: int) -> DataConfig:
    """``data`` with at least ``count`` pairs in a held-out split: the studio renders as many as are asked for."""
    if data.name != "studio":
        return data
    if split == "val":
        return replace(data, val_size=max(data.val_size, count))
    return replace(data, test_size=max(data.test_size, count))


def training_pairs(train: PairDataset, held_out: HeldOut) -> HeldOut | None:
    """As many training pairs from all over the split, all different, as were held out and of their size.

    None where there are fewer.
    """
    size, count = held_out.pairs[0].size, len(held_out.pairs)
    found = {}
    for k in _all_over(len(train), count):
        pair = train[k]
        if pair.size == size:
            found[pair.id] = pair
        if len(found) == count:
            return HeldOut(list(found.values()))
    return None


def _all_over(length: int, count: int) -> Iterator[int]:
    """Every number below ``length`` once: ``count`` evenly spaced ones, then those that follow each, and so on."""
    edges = [k * length // count for k in range(count + 1)]
    for offset in range(-(-length // count)):
        yield from (start + offset for start, end in pairwise(edges) if start + offset < end)


def overlap(splits: dict[str, PairDataset], split: str, count: int, first: int = 0) -> str | None:
    """A warning when photos of the evaluated split are trained on as well, told by their content; else None."""
    size = len(splits["train"])
    if size > MOST and not isinstance(getattr(splits["train"], "facts", None), list):
        return f"whether {split} photos are among the {size} training photos was not checked: they are too many"
    known = set(_contents(splits["train"], range(size)))
    numbers = range(first, min(first + count, len(splits[split])))
    both = sum(content in known for content in _contents(splits[split], numbers))
    if not both:
        return None
    return (
        f"{both} of the {split} photos are in the training split too, so the numbers are too good: take the copies "
        "out (python -m lora_dae.data inspect names them) and train again"
    )


def _contents(dataset: Any, numbers: range) -> list[str]:
    """What tells photos apart by content; nothing is decoded."""
    facts = getattr(dataset, "facts", None)  # photos: hashes of their files, the same in buckets and squares
    if callable(facts):  # shards
        return [facts(i)["image"].digest for i in numbers]
    if facts is not None:
        return [facts[i]["image"].digest for i in numbers]
    return [dataset[i].key("image") or "" for i in numbers]
