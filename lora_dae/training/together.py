"""What the processes of one run tell each other beside gradients: batches, pictures, and that one of them failed."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from torch import Tensor

KEY = "lora_dae/failed"
POLL = 0.5  # seconds between looks at the store
GRACE = 5.0  # seconds that a rank has to notice by itself, before it is ended


def world_size() -> int:
    """Processes that train together; 1 before and after that."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_batch(own: Tensor) -> Tensor:
    """``own`` (B, ...) of every rank as (world * B, ...), in the order of ranks; the gradient flows into the own part.

    For losses over statistics of a batch: each rank computes that of the whole batch, and returns it times
    ``world_size()``, for DDP takes the mean over ranks of what are parts of one sum.
    """
    if world_size() == 1:
        return own
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def leave() -> None:
    """End the process group, once every rank is here: what follows a training is rank 0's alone.

    Left to the interpreter's end, ranks that have nothing more to do might wait for all that rank 0 still measures.
    """
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def share(count: int) -> range:
    """Which of ``count`` things this rank does: every world_size-th."""
    return range(dist.get_rank() if world_size() > 1 else 0, count, world_size())


def collect(own: Tensor, count: int) -> Tensor:
    """The ``count`` rows of which each rank did its ``share``, in order, on every rank; ``own`` is (n, ...)."""
    if world_size() == 1:
        return own
    padded = own.new_zeros(-(-count // world_size()), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


def who(concerned: bool, what: Sequence[int]) -> str:
    """``what`` of all ranks that are ``concerned``, in words; every rank has to ask."""
    told: list[Any] = [(concerned, list(what))]
    if world_size() > 1:
        told = [None] * world_size()
        dist.all_gather_object(told, (concerned, list(what)))
    found = [(rank, numbers) for rank, (yes, numbers) in enumerate(told) if yes]
    words = ", ".join(str(number) for _, numbers in found for number in numbers)
    ranks = ", ".join(str(rank) for rank, _ in found)
    return words if len(told) == 1 else f"{words} (rank {ranks})"


class StopTogether(Callback):
    """An exception on one rank ends all ranks within seconds; otherwise they would wait for it in a collective.

    The word goes through the store by which torch.distributed was set up. Gloo's connections break when a process
    ends, and the others fail by themselves; NCCL waits, so a thread of each rank looks at the store and ends its
    process. There the rank that failed is ended as well if it does not end by itself, for NCCL's own end may wait for
    the others. As a context manager it goes around ``trainer.fit``, which it also has to be a callback of.
    """

    def __init__(self) -> None:
        self.first = ""  # the failure of another rank that came first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-together", daemon=True)

    def __enter__(self) -> StopTogether:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._ended.set()
        if world_size() == 1:
            return
        words = str(exception).strip().splitlines() or [""]
        own = f"rank {dist.get_rank()} failed: {type(exception).__name__}: {words[0]}"
        if dist.get_backend() == "nccl":
            last = threading.Timer(2 * GRACE, _end, [own])
            last.daemon = True
            last.start()
        try:
            told = _store().compare_set(KEY, "", own).decode()
        except RuntimeError:  # the store ended with rank 0
            told = "rank 0 ended"
        self.first = "" if told == own else told

    def _watch(self) -> None:
        told = ""
        while not told:
            if self._ended.wait(POLL):
                return
            if world_size() > 1:
                told = _told()
        if not self._ended.wait(GRACE):
            _end(told)


def _end(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _told() -> str:
    """The first failure, "" while there is none."""
    try:
        store = _store()
        return store.get(KEY).decode() if store.check([KEY]) else ""
    except (RuntimeError, ValueError):
        return "rank 0 ended" if world_size() > 1 else ""
