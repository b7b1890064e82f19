"""Two real processes are one: same gradients, weights, numbers and files; and they stop together."""

from __future__ import annotations

import os
import signal
import time
from csv import DictReader
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from compose import config
from PIL import Image
from ranks import Ended, run_ranks
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from lora_dae.config import Config, ConfigError
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.report.plots import read_metrics
from lora_dae.sampling.draw import Drawer
from lora_dae.training import run as training
from lora_dae.training import together
from lora_dae.training.ended import InterruptedRunError
from lora_dae.training.module import LoraDae
from lora_dae.training.stages import gradient_bytes

# Four samples a step, however they are shared out.
TWO = ("trainer=ddp", "trainer.devices=2", "data.batch_size=1", "trainer.accumulate_grad_batches=2",
       "enhancement.batch_size=1")  # fmt: skip
ONE = ("data.batch_size=4", "enhancement.batch_size=2")
IN_TURN = ("data.batch_size=2", "trainer.accumulate_grad_batches=2", "enhancement.batch_size=2")


class Record(lightning.Callback):
    """Gradients before every optimizer step, losses of validation, and what DDP sent."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.sent: list[int] = []
        self.expected = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.world_size > 1:
            trainer.strategy.model.register_comm_hook(None, lambda state, bucket: self._send(bucket))

    def _send(self, bucket: Any) -> Any:
        self.sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(None, bucket)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.expected += gradient_bytes(pl_module)
        found = [p.grad.flatten() for p in pl_module.parameters() if p.requires_grad]
        self.gradients.append(torch.cat(found).clone())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val/loss"]))


def weights(run_dir: Path) -> torch.Tensor:
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    return torch.cat([found[key].float().flatten() for found in tensors for key in sorted(found)])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative, of whole vectors: Adam turns rounding errors of single vanishing gradients into signs."""
    return float((a - b).norm() / b.norm())


def distances(run_dir: Path) -> dict[str, float]:
    """The one row of the log with distances to the photos of validation."""
    with (run_dir / "csv" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {k: v for k, v in row.items() if "_effnet" in k and v} | {"step": row["step"]} for row in DictReader(file)
        ]
    (row,) = [row for row in rows if len(row) > 1]
    assert row.pop("step") == "1"  # Lightning's number of the second step
    return {name: float(value) for name, value in row.items()}


def names(run_dir: Path) -> set[str]:
    return {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


def make(backbone: Path, shared: Path, name: str, *overrides: str) -> Config:
    options = ("adapter.rank=2", "evaluation.frozen=false", "logger=csv", "trainer.log_every_n_steps=1", *overrides)
    return config(backbone, shared / name, shared / "cache", *options)


SAMPLES = ("trainer.max_steps=3", "tracking.sample_every_n_steps=2", "tracking.num_grid_prompts=3", "enhancement=gain",
           "tracking.distance_every_n_steps=2", "evaluation.num_samples=5")  # fmt: skip


def test_two_processes_train_what_one_trains(tiny_backbone: Path, shared: Path, monkeypatch: Any) -> None:
    """Gradients and weights of both stages, losses, moving average, pictures, files; one reduction per step."""
    alone = Record()
    training.train(make(tiny_backbone, shared, "one", *IN_TURN, *SAMPLES), [alone])

    original = Drawer.images

    def counted(self: Drawer, captions: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        print(f"draws {len(captions)}", flush=True)
        return original(self, captions, *args, **kwargs)

    def rank(number: int) -> None:
        monkeypatch.setattr(Drawer, "images", counted)
        record = Record()
        training.train(make(tiny_backbone, shared, "two", *TWO, *SAMPLES), [record])
        assert not torch.distributed.is_initialized()  # rank 0 alone goes on, and nobody waits for it
        assert sum(record.sent) == record.expected > 0  # not once per accumulated batch
        torch.save([record.gradients, record.losses], shared / f"record{number}.pt")

    ended = run_ranks(rank, shared / "logs")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    gradients, losses = torch.load(shared / "record0.pt", weights_only=True)
    others, _ = torch.load(shared / "record1.pt", weights_only=True)
    assert len(gradients) == len(alone.gradients) == 3 + 1
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, others, strict=True))
    apart = [distance(ours, expected) for ours, expected in zip(gradients, alone.gradients, strict=True)]
    assert apart[0] < 1e-5 and max(apart) < 1e-3, apart  # before any difference could grow, and after it could
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    assert distance(weights(shared / "two"), weights(shared / "one")) < 1e-4
    drawn = [e.text.split("draws ")[1:] for e in ended]  # three pictures of the grid, five for the distance
    assert [[int(text[0]) for text in texts] for texts in drawn] == [[2, 3], [1, 2]]
    near, expected = distances(shared / "two"), distances(shared / "one")
    assert near.keys() == expected.keys() == {"val/fd_effnet", "val/kd_effnet"}
    assert near == {name: pytest.approx(value, rel=1e-3, abs=1e-5) for name, value in expected.items()}
    for stage in (gradients[0], gradients[3]):  # as it says at each stage's beginning: 4 bytes a number
        assert f"2 processes, {stage.numel() * 4 / 1e6:.3g} MB of gradients reduced a step" in ended[0].text
    assert "2 processes" not in ended[1].text
    assert ["run folder" in e.text for e in ended] == [True, False]
    assert names(shared / "two") == names(shared / "one")
    pictures = [np.asarray(Image.open(shared / n / "samples" / "step_000002.png")).astype(int) for n in ("one", "two")]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def curves(run_dir: Path) -> dict[str, list[float]]:
    """What the adapter and the enhancement's stages logged of their losses, by file and column."""
    logs = {log.parent.name: read_metrics(log) for log in (run_dir / "csv").rglob("metrics.csv")}
    wanted = ("train/loss", "val/loss", "enhancement/band_error", "enhancement/joint")
    return {f"{log} {name}": found[name][1] for log, found in logs.items() for name in wanted if name in found}


@pytest.mark.parametrize("kind", ["stages", "joint", "registered"])
def test_two_processes_train_the_same_source_texture_and_decoder_stage(
    kind: str, tiny_backbone: Path, shared: Path
) -> None:
    """Gradients of every step of both stages: a wrong source is the next sample's, whichever process has it.

    What is logged is of all processes' samples.
    """
    options = ("trainer.max_steps=1", "enhancement.gain=false", "enhancement.wrong_source=0.5")
    joint, registered = kind == "joint", kind == "registered"
    options += (f"enhancement.joint={joint}", f"enhancement.registered={registered}")
    alone, one, two = Record(), f"texture_one_{kind}", f"texture_two_{kind}"
    sizes = ("data.batch_size=4", "enhancement.batch_size=4", "enhancement.texture_batch_size=4")
    training.train(make(tiny_backbone, shared, one, *options, *sizes), [alone])

    def rank(number: int) -> None:
        record, sizes = Record(), ("data.batch_size=2", "enhancement.batch_size=2", "enhancement.texture_batch_size=2")
        training.train(make(tiny_backbone, shared, two, "trainer=ddp", "trainer.devices=2", *options, *sizes), [record])
        torch.save([record.gradients, record.losses], shared / f"texture{number}.pt")

    ended = run_ranks(rank, shared / f"logs_texture_{kind}")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    gradients, _ = torch.load(shared / "texture0.pt", weights_only=True)
    before = 1 if joint else 1 + 2  # adapter, texture
    assert len(gradients) == len(alone.gradients) == before + 2
    apart = [distance(ours, expected) for ours, expected in zip(gradients, alone.gradients, strict=True)]
    assert max(apart[:before]) < 1e-3 and max(apart[before:]) < 0.05, apart  # L1 has kinks
    logged, expected = curves(shared / two), curves(shared / one)
    assert ("csv enhancement/joint" if joint else "texture enhancement/band_error") in expected
    assert logged == {name: pytest.approx(values, rel=1e-3) for name, values in expected.items()}


class Seen(lightning.Callback):
    """The samples of every batch, by number."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.found.append(batch["index"].tolist())


def test_two_processes_see_each_sample_once_in_an_epoch(tiny_backbone: Path, shared: Path) -> None:
    """Twelve samples, two of them a step: six steps are an epoch, and the next one has another order."""
    options = ("trainer.max_steps=12", "data.train_size=12", "data.batch_size=1", "enhancement=none")

    def rank(number: int) -> None:
        seen = Seen()
        training.train(make(tiny_backbone, shared, "epochs", "trainer=ddp", "trainer.devices=2", *options), [seen])
        torch.save(seen.found, shared / f"epochs{number}.pt")

    ended = run_ranks(rank, shared / "logs_epochs")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    steps = list(zip(*(torch.load(shared / f"epochs{number}.pt") for number in (0, 1)), strict=True))
    assert len(steps) == 12
    epochs = [[index for step in part for batch in step for index in batch] for part in (steps[:6], steps[6:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1]


class Interrupt(lightning.Callback):
    """Ctrl-C on one process, in the middle of the step after ``step``."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_on_one_stops_both_and_one_process_goes_on(tiny_backbone: Path, shared: Path) -> None:
    """In the middle of an accumulated step, whose half is forgotten; the result is that of the straight run."""
    options = ("trainer.max_steps=3", "enhancement=none")

    def rank(number: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        with pytest.raises(InterruptedRunError, match="step 1 of 3"):
            training.train(make(tiny_backbone, shared, "cut", *TWO, *options), [Interrupt(1, rank=1)])

    ended = run_ranks(rank, shared / "logs_cut")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    assert [path.name for path in (shared / "cut" / "checkpoints").iterdir()] == ["adapter.ckpt"]
    training.train(make(tiny_backbone, shared, "cut", *ONE, *options, "ckpt_path=last"))
    training.train(make(tiny_backbone, shared, "straight", *ONE, *options))
    assert distance(weights(shared / "cut"), weights(shared / "straight")) < 1e-4


def test_one_process_then_two_then_three_train_what_one_trains(tiny_backbone: Path, shared: Path) -> None:
    """A step of six samples on each: every sample, its noise and the moments are those of the straight run."""
    options = ("trainer.max_steps=3", "enhancement=none")
    whole = Record()
    training.train(make(tiny_backbone, shared, "six", *options, "data.batch_size=6"), [whole])
    with pytest.raises(InterruptedRunError, match="step 1 of 3"):
        training.train(make(tiny_backbone, shared, "grown", *options, "data.batch_size=6"), [Interrupt(0)])

    for processes in (2, 3):
        own = ("trainer=ddp", f"trainer.devices={processes}", f"data.batch_size={6 // processes}", "ckpt_path=last")

        def rank(number: int, processes: int = processes, own: tuple[str, ...] = own) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            record, cfg = Record(), make(tiny_backbone, shared, "grown", *options, *own)
            if processes == 2:
                with pytest.raises(InterruptedRunError, match="step 2 of 3"):
                    training.train(cfg, [record, Interrupt(1, rank=1)])
            else:
                training.train(cfg, [record])
            torch.save(record.gradients, shared / f"grown{processes}_{number}.pt")

        ended = run_ranks(rank, shared / f"logs_grown{processes}", processes)
        assert [e.code for e in ended] == [0] * processes, "".join(e.text for e in ended)
        (gradient,) = torch.load(shared / f"grown{processes}_{processes - 1}.pt", weights_only=True)
        assert distance(gradient, whole.gradients[processes - 1]) < 1e-3  # of this step alone
    assert distance(weights(shared / "grown"), weights(shared / "six")) < 1e-4


def test_two_processes_stop_early_at_the_same_step(tiny_backbone: Path, shared: Path, monkeypatch: Any) -> None:
    """Where the mean over both no longer falls, though it does on one of them; one of them says so."""

    def scripted(self: LoraDae, batch: Any, batch_idx: int) -> None:
        loss = -1.0 if self.global_rank == 0 else 2.0  # a step
        self._validated += torch.tensor([loss * self.global_step, 1.0])

    def rank(number: int) -> None:
        monkeypatch.setattr(LoraDae, "validation_step", scripted)
        early = ("trainer.val_check_interval=1", "trainer.early_stop_patience=1", "trainer.max_steps=5")
        training.train(make(tiny_backbone, shared, "early", *TWO, *early, "enhancement=none"))

    ended = run_ranks(rank, shared / "logs_early")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    said = "stopped early at step 2 of 5: val/loss did not fall below 0.5 in 1 validation"
    assert [said in e.text for e in ended] == [True, False]
    saved = torch.load(shared / "early" / "checkpoints" / "adapter.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_fewer_validation_pairs_than_processes_are_one_sentence(tiny_backbone: Path, shared: Path) -> None:
    """Else one would wait for the other's validation for ever."""
    cfg = make(tiny_backbone, shared, "few", *TWO, "data.val_size=1", "enhancement=none")
    load_splits(cfg.data)  # rendered before there are two

    def rank(number: int) -> None:
        with pytest.raises(ConfigError, match="2 processes share 1 validation pairs"):
            training.train(cfg)

    ended = run_ranks(rank, shared / "logs_few")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text


def stopped(ended: list[Ended], within: float = 30) -> None:
    assert all(e.code == 1 and e.seconds < within for e in ended), [(e.code, e.seconds, e.text[-2000:]) for e in ended]


def test_a_rank_may_have_more_validation_batches_than_another(tiny_backbone: Path, shared: Path) -> None:
    """Five pairs are two batches and one; nothing waits, and the loss is that of one process."""
    odd = ("data.val_size=5", "trainer.max_steps=4", "trainer.val_check_interval=2", "enhancement=none")
    alone = Record()
    training.train(make(tiny_backbone, shared, "odd_one", *odd, "data.batch_size=4"), [alone])

    def rank(number: int) -> None:
        record = Record()
        two = ("trainer=ddp", "trainer.devices=2", "data.batch_size=2")
        training.train(make(tiny_backbone, shared, "odd_two", *two, *odd), [record])
        torch.save(record.losses, shared / f"odd{number}.pt")

    ended = run_ranks(rank, shared / "logs_odd")
    assert [e.code for e in ended] == [0, 0], ended[0].text + ended[1].text
    for number in (0, 1):
        assert torch.load(shared / f"odd{number}.pt") == pytest.approx(alone.losses, rel=1e-4)


def test_nan_on_one_is_known_to_both(tiny_backbone: Path, shared: Path, monkeypatch: Any) -> None:
    original = LoraDae._losses

    def broken(self: LoraDae, batch: Any, draws: Any) -> torch.Tensor:
        bad = self.training and self.global_step == 1 and self.global_rank == 1
        return original(self, batch, draws) * (float("nan") if bad else 1.0)

    def rank(number: int) -> None:
        monkeypatch.setattr(LoraDae, "_losses", broken)
        training.train(make(tiny_backbone, shared, "nan", *TWO))

    ended = run_ranks(rank, shared / "logs_nan")
    stopped(ended)
    for e in ended:
        assert "NonFiniteLossError: the loss became nan at step 1 on samples" in e.text and "(rank 1)" in e.text


@pytest.mark.parametrize(("failing", "hangs"), [(0, False), (1, True)], ids=["0 ends", "1 hangs"])
def test_exception_on_one_ends_both(
    failing: int, hangs: bool, tiny_backbone: Path, shared: Path, monkeypatch: Any
) -> None:
    """Also where the other's collective does not break: then the process that failed would be waited for."""
    original = LoraDae.training_step

    def broken(self: LoraDae, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 1 and self.global_rank == failing:
            raise ValueError("a broken shard")
        return original(self, batch, batch_idx)

    def rank(number: int) -> None:
        monkeypatch.setattr(LoraDae, "training_step", broken)
        monkeypatch.setattr(together, "GRACE", 1.0)
        try:
            training.train(make(tiny_backbone, shared, "broken", *TWO))
        finally:
            if hangs and number == failing:
                time.sleep(6)

    ended = run_ranks(rank, shared / f"logs_{failing}_{hangs}")
    stopped(ended)
    assert "ValueError: a broken shard" in ended[failing].text and "Traceback" in ended[failing].text
    assert f"rank {failing} failed: ValueError: a broken shard" in ended[1 - failing].text or not hangs
    assert hangs or "failed" in ended[1 - failing].text or "rank 0 ended" in ended[1 - failing].text
