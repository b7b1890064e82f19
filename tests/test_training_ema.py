"""The moving average against its closed form, and inside a Lightning fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lora_dae.adapter.inject import trainable_parameters
from lora_dae.config import ConfigError
from lora_dae.training.ema import EMACallback, TrainableEMA


def one(value: float) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.full((2,), value, dtype=torch.float64))}


def test_closed_form_with_constant_weights() -> None:
    """Starting at 0 and fed 1 for ever, the gap to 1 is the product of the decays."""
    ema = TrainableEMA(one(0.0), decay=0.9)
    gap = 1.0
    for n in range(200):
        ema.update(one(1.0))
        gap *= min(0.9, (1 + n) / (10 + n))
        assert ema.shadow["w"][0].item() == pytest.approx(1 - gap, abs=1e-12)


def test_warmed_up_average_is_the_weighted_sum_of_the_past() -> None:
    ema = TrainableEMA(one(5.0), decay=0.5)
    ema.num_updates = 1000  # beyond the warm-up
    values = [1.0, -2.0, 4.0]
    for value in values:
        ema.update(one(value))
    expected = 0.5**3 * 5.0 + sum(0.5 ** (len(values) - i) * value for i, value in enumerate(values))
    assert ema.shadow["w"][0].item() == pytest.approx(expected)


def test_decay_zero_follows_the_weights() -> None:
    ema = TrainableEMA(one(0.0), decay=0.0)
    ema.update(one(3.0))
    assert ema.shadow["w"].tolist() == [3.0, 3.0]


def test_swap_is_in_place_nests_and_gives_every_bit_back() -> None:
    parameters = one(0.1)
    ema = TrainableEMA(one(7.0), decay=0.9)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped(parameters):
        assert parameters["w"][0] == 7.0
        with ema.swapped(parameters):
            assert parameters["w"][0] == 7.0
        assert parameters["w"][0] == 7.0
        raise RuntimeError("inside")
    assert torch.equal(parameters["w"], one(0.1)["w"])
    assert ema.shadow["w"][0] == 7.0


def test_state_continues_the_straight_run() -> None:
    straight = TrainableEMA(one(0.0), 0.99)
    for value in (1.0, 2.0):
        straight.update(one(value))
    resumed = TrainableEMA(one(9.0), 0.99)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for ema in (straight, resumed):
        ema.update(one(3.0))
    assert torch.equal(resumed.shadow["w"], straight.shadow["w"])
    assert resumed.num_updates == 3


def test_state_of_other_parameters_is_refused() -> None:
    ema = TrainableEMA(one(0.0), 0.9)
    with pytest.raises(ConfigError, match="does not fit"):
        ema.load_state_dict({"num_updates": 1, "shadow": {"w": torch.zeros(3)}})
    with pytest.raises(ConfigError, match="does not fit"):
        ema.load_state_dict({"num_updates": 1, "shadow": {}})


def test_decay_out_of_range() -> None:
    with pytest.raises(ConfigError, match="ema_decay is 1.0"):
        TrainableEMA(one(0.0), 1.0)


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 1)
        self.history: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.head(self.frozen(batch[0])) - 1).square().mean()

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.history.append(self.head.weight.detach().clone())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(self.head.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def fit(steps: int, ckpt_path: str | None = None, **kwargs: Any) -> tuple[Trainer, Toy, EMACallback]:
    module, callback = Toy(), EMACallback(0.99)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path, weights_only=False if ckpt_path else None)
    return trainer, module, callback


def test_callback_averages_what_trains_and_validates_on_it() -> None:
    _, module, callback = fit(4)
    assert callback.ema is not None
    assert set(callback.ema.shadow) == {"head.weight", "head.bias"}
    assert callback.ema.num_updates == 4
    assert torch.equal(module.validated[-1], callback.ema.shadow["head.weight"])
    assert not torch.equal(module.head.weight, callback.ema.shadow["head.weight"])
    with callback.swapped(module):
        assert torch.equal(module.head.weight, callback.ema.shadow["head.weight"])


def test_callback_counts_optimizer_steps_not_batches() -> None:
    _, _, callback = fit(2, accumulate_grad_batches=2)
    assert callback.ema is not None and callback.ema.num_updates == 2


def test_resumed_fit_ends_where_the_straight_fit_ends(tmp_path: Any) -> None:
    _, straight_module, straight = fit(8)
    trainer, module, _ = fit(4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]["head.weight"]
    assert torch.equal(saved, module.head.weight)  # the checkpoint holds the trained weights, not the average
    _, resumed_module, resumed = fit(8, ckpt_path=str(tmp_path / "last.ckpt"))
    assert straight.ema is not None and resumed.ema is not None
    assert resumed.ema.num_updates == 8
    for name, parameter in trainable_parameters(straight_module).items():
        assert torch.equal(resumed_module.get_parameter(name), parameter)
        assert torch.equal(resumed.ema.shadow[name], straight.ema.shadow[name])
