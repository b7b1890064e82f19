"""What trains faster does what it says, in the steps in which it says so, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import TEXT_DIM, tiny_unet
from compose import config
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from lora_dae.config import Config, ConfigError, ObjectiveConfig
from lora_dae.rules import check
from lora_dae.sweep.identity import content_hash, training_part
from lora_dae.training import run as training
from lora_dae.training.module import LoraDae
from lora_dae.training.shortcuts import FewerKeys, at_half_size, see_keys

OPTIONS = ("adapter.rank=2", "enhancement=none", "logger=none")


def test_latents_of_half_the_size_are_distributed_as_averages_of_four() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(1, 2, 4, 6, generator=generator), torch.rand(1, 2, 4, 6, generator=generator)
    half = at_half_size({"latent_mean": mean, "latent_std": std, "index": torch.tensor([7])})
    draws = mean + std * torch.randn(40_000, 2, 4, 6, generator=generator)
    pooled = draws.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    torch.testing.assert_close(half["latent_mean"], pooled.mean(0, keepdim=True), atol=0.02, rtol=0)
    torch.testing.assert_close(half["latent_std"], pooled.std(0, keepdim=True), atol=0, rtol=0.03)
    assert half["index"].tolist() == [7]


def test_source_mask_and_target_size_shrink_too() -> None:
    batch = {name: torch.rand(2, 1, 4, 4) for name in ("latent_mean", "latent_std", "source", "mask")}
    batch["size_ids"] = torch.tensor([[90.0, 80, 1, 2, 64, 32]] * 2)
    half = at_half_size(batch)
    assert all(half[name].shape == (2, 1, 2, 2) for name in ("latent_mean", "latent_std", "source", "mask"))
    torch.testing.assert_close(half["mask"][0, 0, 1, 0], batch["mask"][0, 0, 2:, :2].mean())
    assert half["size_ids"].tolist() == [[90, 80, 1, 2, 32, 16]] * 2  # original size and crop are the photo's


def test_self_attention_sees_a_share_of_the_tokens_only_while_gradients_are_taken() -> None:
    torch.manual_seed(0)
    attention = Attention(8, heads=2, dim_head=4, processor=AttnProcessor2_0())
    states, text = torch.randn(2, 10, 8), torch.randn(2, 3, 8)
    everything, crossed = attention(states), attention(states, text)
    attention.set_processor(FewerKeys(AttnProcessor2_0(), 0.5))
    torch.manual_seed(3)
    half = attention(states)
    torch.manual_seed(3)
    seen = torch.randperm(10)[:5]
    attention.set_processor(AttnProcessor2_0())
    assert torch.equal(half, attention(states, states[:, seen])) and not torch.allclose(half, everything)
    attention.set_processor(FewerKeys(AttnProcessor2_0(), 0.5))
    assert torch.equal(attention(states, text), crossed)
    with torch.no_grad():
        assert torch.equal(attention(states), everything)


def test_all_tokens_again_is_the_network_as_it_was() -> None:
    unet = tiny_unet()
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, TEXT_DIM)
    plain = unet(sample, 500, text).sample
    see_keys(unet, 0.5)
    assert not torch.equal(unet(sample, 500, text).sample, plain)
    see_keys(unet, 1.0)
    assert torch.equal(unet(sample, 500, text).sample, plain)


def trained(backbone: Path, tmp_path: Path, name: str, *options: str) -> tuple[list[tuple[bool, int]], Tensor, float]:
    """(training?, width of the latents) of every loss, an adapter's weight, the last validation loss."""
    sizes: list[tuple[bool, int]] = []
    original = LoraDae._losses

    def noted(self: LoraDae, batch: dict[str, Tensor], draws: Any) -> Tensor:
        sizes.append((self.training, batch["latent_mean"].shape[-1]))
        return original(self, batch, draws)

    class Last(training.lightning.Callback):
        weight, loss = torch.zeros(1), 0.0

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.weight = next(p.detach().clone() for n, p in pl_module.named_parameters() if "lora_B" in n)
            self.loss = float(trainer.callback_metrics["val/loss"])

    last = Last()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraDae, "_losses", noted)
        training.train(config(backbone, tmp_path / name, tmp_path / "cache", *OPTIONS, *options), [last])
    return sizes, last.weight, last.loss


def test_the_priors_pictures_are_of_half_the_size_too(tiny_backbone: Path, tmp_path: Path) -> None:
    prior = (
        "objective.prior_weight=1",
        "objective.prior_images=2",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
    )
    sizes = trained(tiny_backbone, tmp_path, "prior", *prior, "objective.low_resolution_share=0.5")[0]
    widths = [width for training, width in sizes if training]
    assert widths == [widths[0]] * 2 + [2 * widths[0]] * 2


def test_the_first_share_of_steps_is_at_half_size(tiny_backbone: Path, tmp_path: Path) -> None:
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=4")
    full = trained(tiny_backbone, tmp_path, "plain", *steps)[0]
    width = full[0][1]
    assert full[:4] == [(True, width)] * 4
    sizes = trained(tiny_backbone, tmp_path, "half", *steps, "objective.low_resolution_share=0.5")[0]
    assert sizes[:4] == [(True, width // 2)] * 2 + [(True, width)] * 2
    assert all(size == (False, width) for size in sizes[4:])  # validation is as ever


def test_fewer_tokens_train_other_weights_and_the_same_ones_again(tiny_backbone: Path, tmp_path: Path) -> None:
    """The validation loss before anything is learned is that of all tokens."""
    none = ("trainer.max_steps=1", "trainer.val_check_interval=1", "optimizer.learning_rate=0")
    some = ("trainer.max_steps=2", "trainer.val_check_interval=2")
    fewer = "objective.token_share=0.5"
    assert trained(tiny_backbone, tmp_path, "a", *none, fewer)[2] == trained(tiny_backbone, tmp_path, "b", *none)[2]
    first, again = (trained(tiny_backbone, tmp_path, name, *some, fewer)[1] for name in ("c", "d"))
    assert torch.equal(first, again)
    assert not torch.equal(first, trained(tiny_backbone, tmp_path, "e", *some)[1])


def test_trainings_of_before_these_options_are_found_again() -> None:
    """A hash from before they were there."""
    cfg = Config(run_dir="")
    assert "token_share" not in training_part(cfg)["objective"]
    for change in ({"token_share": 0.5}, {"low_resolution_share": 0.25}):
        changed = replace(cfg, objective=ObjectiveConfig(**change))  # type: ignore[arg-type]
        assert content_hash(training_part(changed)) != content_hash(training_part(cfg))


@pytest.mark.parametrize("change", [{"token_share": 0.0}, {"token_share": 1.5}, {"low_resolution_share": 1.0}], ids=str)
def test_shares_that_are_none_are_refused(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=f"objective.{name}="):
        check(Config(run_dir="", objective=ObjectiveConfig(**change)))  # type: ignore[arg-type]
