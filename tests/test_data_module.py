"""Which samples a step sees, and that a resumed run sees the very same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from test_data_cache import Encoders, Pairs

from lora_dae.config import ConfigError
from lora_dae.data.module import PairDataModule, StepBatchSampler


def first_steps(count: int, **settings: Any) -> list[list[int]]:
    stream = iter(StepBatchSampler(**settings))
    return [next(stream) for _ in range(count)]


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
        backbone_fingerprint="backbone",
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


def test_ranks_share_the_validation_data_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datamodule(tmp_path)
    data.setup()
    shares = []
    for rank in range(3):
        monkeypatch.setattr(data, "_rank", lambda rank=rank: (rank, 3))
        shares.append([int(i) for batch in data.val_dataloader() for i in batch["index"]])
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
