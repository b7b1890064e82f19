"""Which samples a step sees, and that a resumed run sees the very same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from test_data_cache import Encoders, Pairs

from lora_dae.config import ConfigError
from lora_dae.data.module import PairDataModule
from lora_dae.data.pair import replace_pixels
from lora_dae.data.sampler import StepBatchSampler


def first_steps(count: int, **settings: Any) -> list[list[int]]:
    stream = iter(StepBatchSampler(**settings))
    return [[number % settings["dataset_size"] for number in next(stream)] for _ in range(count)]


def test_every_sample_comes_once_per_pass() -> None:
    flat = sum(first_steps(30, dataset_size=10, batch_size=4), [])  # 12 passes
    for start in range(0, 120, 10):
        assert sorted(flat[start : start + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]


def test_starting_at_a_step_continues_the_stream() -> None:
    settings = {"dataset_size": 37, "batch_size": 5, "seed": 3, "rank": 1, "world_size": 2}
    assert first_steps(40, **settings)[13:] == first_steps(27, **settings, start_step=13)


def test_ranks_share_what_one_device_would_see() -> None:
    one = first_steps(20, dataset_size=37, batch_size=6, seed=1)
    shares = [first_steps(20, dataset_size=37, batch_size=2, seed=1, rank=r, world_size=3) for r in range(3)]
    assert one == [sum(step, []) for step in zip(*shares, strict=True)]


def test_a_batch_may_be_larger_than_the_data() -> None:
    assert Counter(first_steps(1, dataset_size=3, batch_size=9)[0]) == {0: 3, 1: 3, 2: 3}


def test_seeds_give_other_orders() -> None:
    assert first_steps(3, dataset_size=99, batch_size=9, seed=0) != first_steps(
        3, dataset_size=99, batch_size=9, seed=1
    )


SIZES = ["tall"] * 23 + ["square"] * 40 + ["wide"] * 7


@pytest.mark.parametrize("world_size", [1, 3])
def test_buckets_keep_batches_of_one_size_on_all_ranks(world_size: int) -> None:
    settings = {"dataset_size": 70, "batch_size": 2, "seed": 1, "groups": SIZES, "world_size": world_size}
    shares = [first_steps(400, rank=rank, **settings) for rank in range(world_size)]
    for step in zip(*shares, strict=True):
        assert len({SIZES[i] for share in step for i in share}) == 1
        assert all(len(share) == 2 for share in step)
    # Every sample once per pass: after any number of steps, of one size, none is a pass ahead of another.
    seen = Counter(i for step in zip(*shares, strict=True) for share in step for i in share)
    for size in set(SIZES):
        counts = [seen[i] for i in range(70) if SIZES[i] == size]
        assert max(counts) - min(counts) <= 1
    # And each size in its share: within a batch or two of 400 steps x samples / 70.
    mean = 400 * 2 * world_size / 70
    assert all(abs(seen[i] - mean) < 1.5 for i in range(70))


def test_bucketed_streams_begin_anywhere_and_are_shared_exactly() -> None:
    settings = {"dataset_size": 70, "seed": 1, "groups": SIZES}
    one = first_steps(60, batch_size=6, **settings)
    assert first_steps(20, batch_size=6, start_step=40, **settings) == one[40:]
    shares = [first_steps(60, batch_size=2, rank=r, world_size=3, **settings) for r in range(3)]
    assert one == [sum(step, []) for step in zip(*shares, strict=True)]


def test_one_size_is_the_stream_without_buckets() -> None:
    settings = {"dataset_size": 11, "batch_size": 4, "seed": 2}
    assert first_steps(9, **settings) == first_steps(9, groups=["square"] * 11, **settings)


def test_blocks_are_read_few_at_a_time() -> None:
    blocks = [10] * 40
    flat = sum(first_steps(100, dataset_size=400, batch_size=4, blocks=blocks), [])
    assert sorted(flat) == list(range(400))
    for start in range(0, 400, 80):  # WINDOW = 8 blocks of 10
        assert len({i // 10 for i in flat[start : start + 80]}) == 8
    assert flat != sorted(flat) and flat != sum(first_steps(100, dataset_size=400, batch_size=4), [])


BLOCKS = [50] * 59 + [30]  # 2980 samples
LABELS = np.random.default_rng(5).choice(3, 2980, p=[0.6, 0.39, 0.01]).astype(np.uint16)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_buckets_in_blocks_keep_every_promise(world_size: int) -> None:
    """One size on all ranks, each sample once a pass, few blocks at a time, and the stream begins anywhere."""
    settings = {"dataset_size": 2980, "seed": 1, "groups": LABELS, "blocks": BLOCKS}
    shares = [first_steps(3000, batch_size=2, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    steps = [sum(step, []) for step in zip(*shares, strict=True)]
    assert all(len(set(LABELS[step])) == 1 and len(step) == 2 * world_size for step in steps)
    assert first_steps(3000, batch_size=2 * world_size, **settings) == steps  # what one device would see
    assert first_steps(20, batch_size=2 * world_size, start_step=1490, **settings) == steps[1490:1510]
    for label in range(3):
        members = np.flatnonzero(LABELS == label)
        stream = [i for step in steps if LABELS[step[0]] == label for i in step]
        assert len(stream) > len(members)
        for start in range(0, len(stream) - len(members), len(members)):
            assert sorted(stream[start : start + len(members)]) == members.tolist()
    assert steps[:99] != first_steps(99, batch_size=2 * world_size, **{**settings, "seed": 2})

    def touched(settings: dict[str, Any]) -> int:
        """The most blocks that 240 samples in a row lie in."""
        flat = sum(first_steps(1000 // world_size, batch_size=2 * world_size, **settings), [])
        return max(len({i // 50 for i in flat[start : start + 240]}) for start in range(0, len(flat) - 240, 60))

    assert (
        touched(settings) <= 24 < 50 <= touched({**settings, "blocks": None})
    )  # of 60: two windows of 8, and leftovers


def test_numbers_name_the_pass() -> None:
    sampler = StepBatchSampler(5, 5)
    assert [{number // 5 for number in sampler.numbers(step)} for step in range(3)] == [{0}, {1}, {2}]


def test_ten_million_samples_start_at_once() -> None:
    sampler = StepBatchSampler(10_000_000, 8, start_step=123_456_789, rank=3, world_size=16, blocks=[1000] * 10_000)
    numbers = next(iter(sampler))
    number = (123_456_789 * 16 + 3) * 8 // 10_000_000
    assert len(numbers) == 8 and {n // 10_000_000 for n in numbers} == {number}


class Recorder(lightning.LightningModule):
    """Trains one number and writes down which samples it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["index"].tolist())
        return (self.weight - batch["latent_mean"].mean()) ** 2

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.validated += batch["index"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def datamodule(cache: Path) -> PairDataModule:
    encoders = Encoders()
    return PairDataModule(
        *(Pairs(count, fingerprint=name) for name, count in (("train", 21), ("val", 7), ("test", 5))),
        cache_dir=cache,
        encode_images=encoders.encode_images,
        encode_text=encoders.encode_text,
        vae="vae",
        text_encoder="text encoder",
        batch_size=4,
        seed=5,
    )


def trainer(root: Path, **settings: Any) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        val_check_interval=6,
        num_sanity_val_steps=0,
        **settings,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_sees_what_the_straight_run_saw(tmp_path: Path, accumulate: int) -> None:
    settings = {"accumulate_grad_batches": accumulate}
    straight = Recorder()
    trainer(tmp_path, max_steps=13, **settings).fit(straight, datamodule(tmp_path / "cache"))
    assert len(straight.seen) == 13 * accumulate

    first, second = Recorder(), Recorder()
    halfway = trainer(tmp_path, max_steps=7, **settings)
    halfway.fit(first, datamodule(tmp_path / "cache"))
    halfway.save_checkpoint(tmp_path / "7.ckpt")
    trainer(tmp_path, max_steps=13, **settings).fit(
        second, datamodule(tmp_path / "cache"), ckpt_path=str(tmp_path / "7.ckpt"), weights_only=False
    )
    assert first.seen + second.seen == straight.seen
    assert torch.equal(second.weight, straight.weight)
    assert straight.validated[:7] == list(range(7))


@pytest.mark.filterwarnings("ignore")
def test_training_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer.max_steps"):
        trainer(tmp_path, max_epochs=2).fit(Recorder(), datamodule(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore")
def test_resuming_with_other_batches_is_refused_or_shared_exactly(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=3, accumulate_grad_batches=2)
    first.fit(Recorder(), datamodule(tmp_path / "cache"))
    first.save_checkpoint(tmp_path / "3.ckpt")
    load = {"ckpt_path": str(tmp_path / "3.ckpt"), "weights_only": False}
    with pytest.raises(ConfigError, match="8 samples a step .* this run has 4: choose .*, data.batch_size and"):
        trainer(tmp_path, max_steps=5).fit(Recorder(), datamodule(tmp_path / "cache"), **load)
    doubled, recorder = datamodule(tmp_path / "cache"), Recorder()
    doubled.batch_size = 8
    trainer(tmp_path, max_steps=5).fit(recorder, doubled, **load)
    assert recorder.seen == first_steps(2, dataset_size=21, batch_size=8, seed=5, start_step=3)


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_validation_of_one_size_is_in_order(tmp_path: Path, cache: str) -> None:
    """So that its first few batches, which a training looks at, stay what they are."""
    data = datamodule(tmp_path)
    data.cache, data.batch_size = cache, 2
    data.setup()
    seen = [index for batch in data.val_dataloader() for index in batch["index"].tolist()]
    assert len(seen) > 4 and seen == sorted(seen)


def test_validation_batches_are_of_one_size_and_hold_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In squares as drawn; asked for as trained, the samples have two sizes in turn."""

    class TwoSizes(Pairs):
        def as_trained(self) -> TwoSizes:
            self.trained = True
            return self

        def __getitem__(self, index: int) -> Any:
            pair = super().__getitem__(index)
            return replace_pixels(pair, image=pair.image[:4]) if index % 2 and hasattr(self, "trained") else pair

    data = datamodule(tmp_path)
    data.pairs["val"] = TwoSizes(9).as_trained()
    data.setup()
    for world_size in (1, 2):
        seen: list[int] = []
        for rank in range(world_size):
            monkeypatch.setattr(data, "_rank", lambda rank=rank, world_size=world_size: (rank, world_size))
            for batch in data.val_dataloader():
                indices = batch["index"].tolist()
                assert batch["latent_mean"].shape[2:] == ((1, 2) if indices[0] % 2 else (2, 2)) and len(indices) <= 4
                seen += indices
        assert sorted(seen) == list(range(9))
    monkeypatch.setattr(data, "_rank", lambda: (0, 1))
    data.batch_size = 1
    orders = [[int(batch["index"]) for batch in data.val_dataloader()] for _ in range(2)]
    assert orders[0] == orders[1]
    assert {index % 2 for index in orders[0][:4]} == {0, 1}  # a validation of few batches sees both sizes
    val = TwoSizes(9)
    PairDataModule(
        val, val, val, cache_dir=tmp_path, encode_images=Encoders().encode_images, encode_text=Encoders().encode_text,
        vae="", text_encoder="", batch_size=2,
    )  # fmt: skip
    assert val.trained


def test_ranks_share_the_validation_data_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datamodule(tmp_path)
    data.setup()
    shares = []
    for rank in range(3):
        monkeypatch.setattr(data, "_rank", lambda rank=rank: (rank, 3))
        shares.append([int(i) for batch in data.val_dataloader() for i in batch["index"]])
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    for most, expected in (
        (7, [0, 1, 2, 3, 4, 5, 6]),
        (4, [0, 2, 4, 6]),
        (2, [0, 4]),
    ):  # from all over it, on each rank
        assert [int(i) for batch in data.some("val", most) for i in batch["index"]] == expected
