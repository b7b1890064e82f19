"""Batches for Lightning: which samples a step sees is a pure function of (seed, step, rank, world size)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lora_dae.config import ConfigError
from lora_dae.data.cache import EncodeImages, EncodeText, LatentCache, build_cache
from lora_dae.data.pair import PairDataset

Batch = dict[str, Tensor]


class StepBatchSampler(Sampler[list[int]]):
    """An endless stream of batches that can begin at any step.

    The stream is one shuffled pass over the data after the other, each in an order of its own drawn from
    (seed, pass). Step s takes the next ``batch_size * world_size`` of it, rank r its own ``batch_size`` of
    these. So every sample comes once per pass, no batch is short, and resuming at step N continues
    exactly; only the batch in which one pass ends and the next begins may hold a sample twice.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.indices(step)
            step += 1

    def indices(self, step: int) -> list[int]:
        """The samples of this rank at ``step``."""
        first = (step * self.world_size + self.rank) * self.batch_size
        places = (divmod(place, self.dataset_size) for place in range(first, first + self.batch_size))
        return [int(self._order(number)[offset]) for number, offset in places]

    def _shuffled(self, number: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number]).permutation(self.dataset_size)


class PairDataModule(lightning.LightningDataModule):
    """Encodes each split once, when it is first needed, then serves batches of ``data.cache.LatentCache``.

    The Trainer needs ``use_distributed_sampler=False`` (ranks take their shares here), ``max_steps`` (the
    training stream has no end and no epochs) and ``check_val_every_n_epoch=None`` with a whole number as
    ``val_check_interval``. ``batch_size`` is per device. Resuming with another batch size, number of
    devices or seed gives another stream. Batches are read in the main process: from memory maps that
    costs less than handing them over from a worker.
    """

    def __init__(
        self,
        train: PairDataset,
        val: PairDataset,
        test: PairDataset,
        *,
        cache_dir: str | Path,
        encode_images: EncodeImages,
        encode_text: EncodeText,
        backbone_fingerprint: str,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.pairs: dict[str, PairDataset] = {"train": train, "val": val, "test": test}
        self.caches: dict[str, LatentCache] = {}
        self.cache_dir = Path(cache_dir)
        self.encode_images = encode_images
        self.encode_text = encode_text
        self.backbone_fingerprint = backbone_fingerprint
        self.batch_size = batch_size
        self.seed = seed

    def prepare_data(self) -> None:
        """Builds what training reads and is missing. Lightning calls this on one process per machine."""
        for name in ("train", "val"):
            self._cache(name)

    def setup(self, stage: str | None = None) -> None:
        """Opens the caches, on every rank; that of the test split only for ``stage="test"``."""
        names = ("test",) if stage == "test" else ("train", "val")
        self.caches |= {name: self._cache(name) for name in names}

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training stream, from the trainer's present step on."""
        start_step = 0
        if self.trainer is not None:
            if self.trainer.max_steps < 0:
                raise ConfigError("the training stream has no epochs: give trainer.max_steps.")
            start_step = self.trainer.global_step * self.trainer.accumulate_grad_batches
        rank, world_size = self._rank()
        sampler = StepBatchSampler(len(self.caches["train"]), self.batch_size, self.seed, rank, world_size, start_step)
        return DataLoader(self.caches["train"], batch_sampler=sampler, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._in_order("test")

    def _in_order(self, name: str) -> DataLoader[Batch]:
        """Every sample once, in order; rank r takes each world_size-th, so ranks may differ by one."""
        rank, world_size = self._rank()
        share = range(rank, len(self.caches[name]), world_size)
        return DataLoader(self.caches[name], batch_size=self.batch_size, sampler=list(share), collate_fn=_as_is)

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _cache(self, name: str) -> LatentCache:
        return build_cache(
            self.pairs[name],
            self.cache_dir,
            self.encode_images,
            self.encode_text,
            self.backbone_fingerprint,
            description=f"Encoding {name}",
        )


def _as_is(batch: Any) -> Any:
    """LatentCache.__getitems__ has collated already."""
    return batch
