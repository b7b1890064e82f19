"""Which samples a step sees: a pure function of (seed, step, rank, world size)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from torch.utils.data import Sampler

WINDOW = 8  # blocks that are shuffled together


class StepBatchSampler(Sampler[list[int]]):
    """An endless stream of batches that can begin at any step.

    The stream is one shuffled pass over the data after the other, each in an order of its own drawn from
    (seed, pass). Step s takes the next ``batch_size * world_size`` of it, rank r its own ``batch_size`` of
    these. So every sample comes once per pass, no batch is short, and resuming at step N continues
    exactly; only the batch in which one pass ends and the next begins may hold a sample twice.

    With ``groups`` (a label for each sample: its size) every group is such a stream of its own, and a step takes
    from one of them, the same on all ranks: each as often as its share of the data, in an order drawn anew for
    each pass. With ``blocks`` (consecutive samples that lie in one file) an order keeps ``WINDOW`` blocks together,
    the same ones in all groups, so that few files are read at a time.

    Sample i in pass k is given as the number i + k * dataset_size.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        groups: Sequence[Hashable] | np.ndarray | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.blocks = None if blocks is None else np.asarray(blocks, np.int64)
        self.members = _members(groups)
        if self.blocks is not None:  # of each group, how many samples each block has
            edges = np.concatenate([[0], np.cumsum(self.blocks)])
            self._in_block = [np.diff(np.searchsorted(m, edges)) for m in self.members if m is not None]
        self._windows = lru_cache(maxsize=2)(self._draw_windows)
        self._order = lru_cache(maxsize=2 * len(self.members))(self._shuffled)
        self._turns = lru_cache(maxsize=2)(self._schedule)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.numbers(step)
            step += 1

    def numbers(self, step: int) -> list[int]:
        """The samples of this rank at ``step``, each with its pass."""
        group, turn = (0, step) if self.members == [None] else self._turn(step)
        size = self._size(group)
        first = (turn * self.world_size + self.rank) * self.batch_size
        places = (divmod(place, size) for place in range(first, first + self.batch_size))
        return [int(self._order(group, number)[offset]) + number * self.dataset_size for number, offset in places]

    def _size(self, group: int) -> int:
        members = self.members[group]
        return self.dataset_size if members is None else len(members)

    def _shuffled(self, group: int, number: int) -> np.ndarray:
        members = self.members[group]
        if members is not None:
            rng = np.random.default_rng([self.seed, number, group])
            if self.blocks is None:
                return rng.permutation(members)
            drawn = rng.permutation(len(members))
            window = np.repeat(self._windows(number), self._in_block[group])[drawn]
            return members[drawn[np.argsort(window, kind="stable")]]
        rng = np.random.default_rng([self.seed, number])
        if self.blocks is None:
            return rng.permutation(self.dataset_size)
        ends = np.cumsum(self.blocks)
        order = rng.permutation(len(ends))
        windows = (order[k : k + WINDOW] for k in range(0, len(order), WINDOW))
        ranges = ([np.arange(ends[b] - self.blocks[b], ends[b]) for b in window] for window in windows)
        return np.concatenate([rng.permutation(np.concatenate(window)) for window in ranges])

    def _draw_windows(self, number: int) -> np.ndarray:
        """The window in which each block is read in pass ``number``."""
        assert self.blocks is not None
        windows = np.empty(len(self.blocks), np.int32)
        order = np.random.default_rng([self.seed, number]).permutation(len(windows))
        windows[order] = np.arange(len(windows)) // WINDOW
        return windows

    # A group of n samples has floor(c * n / G) whole batches of G = batch_size * world_size before cycle c. Cycle c
    # therefore holds, of each group, the difference to cycle c + 1: over time every group in its share, no sample lost.

    def _before(self, cycle: int) -> int:
        """Steps before ``cycle``."""
        return sum(cycle * self._size(g) // self._global for g in range(len(self.members)))

    @property
    def _global(self) -> int:
        return self.batch_size * self.world_size

    def _schedule(self, cycle: int) -> np.ndarray:
        """The groups of the cycle's steps, in order."""
        counts = [
            (cycle + 1) * self._size(g) // self._global - cycle * self._size(g) // self._global
            for g in range(len(self.members))
        ]
        turns = np.repeat(np.arange(len(counts)), counts)
        rng = np.random.default_rng([self.seed, cycle])
        if self.blocks is None:
            return rng.permutation(turns)
        # Groups go through the windows side by side: a batch has its turn where its last sample lies.
        drawn = rng.permutation(len(turns))
        windows = np.concatenate([self._last_windows(group, cycle, count) for group, count in enumerate(counts)])
        return turns[drawn[np.argsort(windows[drawn], kind="stable")]]

    def _last_windows(self, group: int, cycle: int, count: int) -> np.ndarray:
        """In which window of the cycle's pass the last sample lies of each of the group's ``count`` batches there."""
        windows = self._windows(cycle)
        seen = np.cumsum(np.bincount(windows, weights=self._in_block[group]).astype(np.int64))
        size = self._size(group)
        first = cycle * size // self._global
        last = (first + 1 + np.arange(count)) * self._global - 1 - cycle * size
        return np.searchsorted(seen, last, side="right")

    def _turn(self, step: int) -> tuple[int, int]:
        """(group, how many batches of this group came before) of ``step``."""
        low, high = 0, 1
        while self._before(high) <= step:
            high *= 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._before(middle) <= step else (low, middle)
        turns = self._turns(low)
        at = step - self._before(low)
        group = int(turns[at])
        earlier = low * self._size(group) // self._global
        return group, earlier + int((turns[:at] == group).sum())


def _members(groups: Sequence[Hashable] | np.ndarray | None) -> list[np.ndarray] | list[None]:
    """The samples of each group, in order; [None] stands for one group of all."""
    if groups is None:
        return [None]
    if isinstance(groups, np.ndarray):
        labels, member = list(np.unique(groups)), groups
    else:
        number = {label: k for k, label in enumerate(dict.fromkeys(groups))}
        labels, member = list(number.values()), np.array([number[label] for label in groups])
    return [None] if len(labels) < 2 else [np.flatnonzero(member == label) for label in labels]


class Announced(Sampler[list[int]]):
    """The batches of ``sampler``; ``expect`` is told each of them before the one that comes first is given out."""

    def __init__(self, sampler: Sampler[list[int]], expect: Callable[[list[int]], None]) -> None:
        self.sampler, self.expect = sampler, expect

    def __iter__(self) -> Iterator[list[int]]:
        for batch, following in pairwise(self.sampler):
            self.expect(following)
            yield batch
