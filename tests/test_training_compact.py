"""Compact checkpoints: rounding without bias, a run that goes on bit for bit, and the bytes that are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lora_dae.training import compact
from lora_dae.training.compact import CompactState, round_to_bfloat16
from lora_dae.training.ema import EMACallback


def test_rounds_to_a_neighbor_and_keeps_the_mean() -> None:
    """1/3 lies between two numbers of bfloat16; 200,000 draws hit both, with a mean within 5 standard errors."""
    third = torch.full((200_000,), 1 / 3)
    below, above = 0x3EAA, 0x3EAB  # the upper half of 1/3 = 0x3EAAAAAB
    low, high = (torch.tensor([b << 16], dtype=torch.int32).view(torch.float32).item() for b in (below, above))
    rounded = round_to_bfloat16(third, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {low, high}
    error = (high - low) / 2 / 200_000**0.5
    assert abs(rounded.double().mean().item() - 1 / 3) < 5 * error


def test_what_bfloat16_holds_stays() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, 3.0e38]).bfloat16().float()
    assert torch.equal(round_to_bfloat16(values, torch.Generator().manual_seed(0)), values)


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(32, 256).requires_grad_(False)
        self.head = nn.Linear(256, 64)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.head(self.frozen(batch[0])) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-2, betas=(0.9, 0.99))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k.startswith("head")}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def fit(
    steps: int, ckpt_path: str | None = None, rounds: bool = True, batch_size: int = 32, **kwargs: Any
) -> tuple[Trainer, Regression, EMACallback]:
    module, ema = Regression(), EMACallback(0.99)
    data = torch.utils.data.TensorDataset(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[ema, CompactState(ema)] if rounds else [ema],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    loader = torch.utils.data.DataLoader(data, batch_size)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer, module, ema


def held(trainer: Trainer, module: Regression, ema: EMACallback) -> list[Tensor]:
    """All that a run goes on from."""
    assert ema.ema is not None
    moments = [s[name] for s in trainer.optimizers[0].state.values() for name in compact.MOMENTS]
    return [module.head.weight, module.head.bias, *ema.ema.shadow.values(), *moments]


@pytest.mark.parametrize("stopped", [6, 7], ids=["after rounding", "between"])
def test_resumed_training_ends_where_the_straight_one_ends(
    stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: weights, average and moments; whether the checkpoint is a compact one or not."""
    monkeypatch.setattr(compact, "EVERY", 3)
    straight = held(*fit(12))
    first, *_ = fit(stopped)
    first.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    kinds = {s[name].dtype for s in saved["optimizer_states"][0]["state"].values() for name in compact.MOMENTS}
    kinds |= {value.dtype for value in saved["callbacks"]["EMACallback"]["shadow"].values()}
    assert kinds == ({torch.bfloat16} if stopped == 6 else {torch.float32})
    for ours, expected in zip(held(*fit(12, str(tmp_path / "last.ckpt"))), straight, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)


def test_gradients_that_accumulate_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches a step: what is rounded after step 3 is not rounded again by the batch that only accumulates."""
    monkeypatch.setattr(compact, "EVERY", 3)
    calls: list[int] = []
    monkeypatch.setattr(compact, "round_to_bfloat16", lambda values, _: (calls.append(1), values)[1])
    fit(4, batch_size=2, accumulate_grad_batches=2)
    assert len(calls) == 2 * 3  # two parameters: two moments and an average each


def test_a_checkpoint_is_less_than_three_times_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "EVERY", 10)
    sizes = {}
    for rounds in (True, False):
        trainer, module, _ = fit(20, rounds=rounds)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        sizes[rounds] = (tmp_path / "last.ckpt").stat().st_size / (4 * sum(p.numel() for p in module.head.parameters()))
    assert sizes[True] < 3 < 4 <= sizes[False]


def test_training_is_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding after every single step, five times as often as it is done: the same loss within a tenth."""
    monkeypatch.setattr(compact, "EVERY", 1)
    losses = []
    for rounds in (True, False):
        _, module, _ = fit(300, rounds=rounds)
        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
        losses.append(float(module.training_step([x], 0).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
