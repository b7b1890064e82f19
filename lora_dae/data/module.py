"""Batches for Lightning, from what ``data.cache`` encoded and ``data.sampler`` chooses."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lora_dae.config import ConfigError
from lora_dae.data.cache import EncodeImages, EncodeText, LatentCache, LivePairs, build_cache, captions_of
from lora_dae.data.pair import PairDataset
from lora_dae.data.sampler import Announced, StepBatchSampler
from lora_dae.data.store import RowStore

Batch = dict[str, Tensor]
SOME = 100_000


class PairDataModule(lightning.LightningDataModule):
    """Encodes each split once, when it is first needed, then serves batches.

    The Trainer needs ``use_distributed_sampler=False`` (ranks take their shares here), ``max_steps`` (the
    training stream has no end and no epochs) and ``check_val_every_n_epoch=None`` with a whole number as
    ``val_check_interval``. ``batch_size``, set by ``option``, is per device. Batches are read in the main process:
    from memory maps that costs less than handing them over from a worker.

    A resumed run goes on with the sample after the last one that was trained on, also on another number of devices
    if the samples of a step (devices x batch size x accumulation) stay as many; otherwise it is refused.
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
        vae: str,
        text_encoder: str,
        batch_size: int,
        option: str = "data.batch_size",
        seed: int = 0,
        cache: str = "disk",
        masks: bool = False,
        stores: dict[str, RowStore] | None = None,
    ) -> None:
        super().__init__()
        self.pairs: dict[str, PairDataset] = {"train": train, "val": _as_trained(val), "test": _as_trained(test)}
        self.caches: dict[str, LatentCache | LivePairs] = {}
        self.cache_dir = Path(cache_dir)
        self.encode_images = encode_images
        self.encode_text = encode_text
        self.vae, self.text_encoder = vae, text_encoder
        self.batch_size, self.option = batch_size, option
        self.seed = seed
        self.cache, self.masks = cache, masks
        self.stores: dict[str, RowStore] = {} if stores is None else stores

    def setup(self, stage: str | None = None) -> None:
        """Opens the caches, on every rank, and builds with the others what is missing; test only for its stage."""
        names = ("test",) if stage == "test" else ("train", "val")
        for name in names:
            if name not in self.caches:
                self.caches[name] = self._open(name)

    def captions(self, name: str) -> list[str]:
        """Every caption that training may show, of the first SOME samples: to look at them, not to train on."""
        pairs = self.pairs[name]
        some = range(min(len(pairs), SOME))
        return [caption for index in some for caption in captions_of(pairs[index], name == "train")]

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training stream, from the trainer's present step on."""
        start_step = 0
        if self.trainer is not None:
            if self.trainer.max_steps < 0:
                raise ConfigError("the training stream has no epochs: give trainer.max_steps.")
            start_step = self.trainer.global_step * self.trainer.accumulate_grad_batches
        rank, world_size = self._rank()
        pairs, cache = self.pairs["train"], self.caches["train"]
        blocks, sizes = getattr(pairs, "blocks", None), self._sizes("train")
        sampler = StepBatchSampler(
            len(pairs), self.batch_size, self.seed, rank, world_size, start_step, groups=sizes, blocks=blocks
        )
        batches: Sampler[list[int]] = Announced(sampler, cache.expect) if isinstance(cache, LivePairs) else sampler
        return DataLoader(cache, batch_sampler=batches, collate_fn=_as_is)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._in_order("test")

    def state_dict(self) -> dict[str, Any]:
        return {"samples_per_step": self._samples_per_step()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before, now = state.get("samples_per_step"), self._samples_per_step()
        if before is not None and before != now:
            raise ConfigError(
                f"the checkpoint was trained with {before} samples a step (devices x batch size x accumulation), this "
                f"run has {now}: choose trainer.devices, {self.option} and trainer.accumulate_grad_batches so that "
                "it stays the same, and no sample comes twice or not at all."
            )

    def _samples_per_step(self) -> int:
        accumulated = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return self.batch_size * self._rank()[1] * accumulated

    def _in_order(self, name: str) -> DataLoader[Batch]:
        """Every sample once; rank r takes each world_size-th, so ranks may differ by one.

        In order; batches of several sizes shuffled alike each time, so that the first few are not of one size.
        """
        rank, world_size = self._rank()
        batches = self._by_size(name, range(len(self.caches[name])), rank, world_size)
        sizes = self._sizes(name)
        if sizes is not None and len(np.unique(np.asarray(sizes), axis=0)) > 1:
            batches = [batches[k] for k in np.random.default_rng(0).permutation(len(batches))]
        return self._loader(name, batches)

    def some(self, name: str, most: int) -> DataLoader[Batch]:
        """At most ``most`` samples from all over a split, size by size; all of them on this process."""
        count = len(self.caches[name])
        return self._loader(name, self._by_size(name, range(0, count, -(-count // most)), 0, 1))

    def _by_size(self, name: str, numbers: range, rank: int, world_size: int) -> list[list[int]]:
        given = self._sizes(name)
        sizes = np.zeros(len(self.caches[name]), np.uint8) if given is None else given
        share = sorted(numbers, key=lambda index: sizes[index])[rank::world_size]
        return [batch for _, part in groupby(share, lambda i: sizes[i]) for batch in _chunks(part, self.batch_size)]

    def _loader(self, name: str, batches: list[list[int]]) -> DataLoader[Batch]:
        return DataLoader(self.caches[name], batch_sampler=batches, collate_fn=_as_is)

    def _sizes(self, name: str) -> list[tuple[int, int]] | np.ndarray | None:
        """A label of each sample's size; None where all are alike. Shards know without looking at any."""
        pairs = self.pairs[name]
        return pairs.size_labels if hasattr(pairs, "size_labels") else self.caches[name].sizes

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _open(self, name: str) -> LatentCache | LivePairs:
        views = name == "train"
        if self.cache == "off":
            return LivePairs(self.pairs[name], self.encode_images, self.encode_text, self.masks, views)
        return build_cache(
            self.pairs[name],
            None if self.cache == "memory" else self.cache_dir,
            self.encode_images,
            self.encode_text,
            self.vae,
            self.text_encoder,
            masks=self.masks,
            views=views,
            stores=self.stores,
            description=f"Encoding {name}",
            quiet=self._rank()[0] > 0,
        )


def _chunks(numbers: Iterable[int], size: int) -> list[list[int]]:
    whole = list(numbers)
    return [whole[k : k + size] for k in range(0, len(whole), size)]


def _as_trained(dataset: PairDataset) -> PairDataset:
    """A held-out split in the sizes of training, where it has others."""
    return dataset.as_trained() if hasattr(dataset, "as_trained") else dataset


def _as_is(batch: Any) -> Any:
    """__getitems__ has collated already."""
    return batch
