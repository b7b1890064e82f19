"""Prior preservation: DreamBooth's sum of two losses, on pictures of the frozen backbone, the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compose import config
from safetensors.torch import load_file

from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig, Config, ConfigError, ObjectiveConfig, SamplingConfig
from lora_dae.rules import check
from lora_dae.sampling.draw import Drawer
from lora_dae.training import run as training
from lora_dae.training.module import LoraDae
from lora_dae.training.prior import Prior

OPTIONS = ("adapter.rank=2", "enhancement=none", "logger=none", "objective.prior_images=5", "trainer.max_steps=1")


def test_the_prior_is_what_the_frozen_backbone_draws(tiny_backbone: Path, tmp_path: Path) -> None:
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *OPTIONS, "objective.prior_weight=0.5",
                 "objective.prior_caption=a dress")  # fmt: skip
    training.train(cfg)
    found = load_file(tmp_path / "run" / "prior.safetensors")["latents"]
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    drawer = Drawer(backbone, None, "none", "none", 64, cfg.sampling)
    expected = drawer.latents(["a dress"] * 5, None, 0.0, list(range(5)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_loss_is_that_of_the_photos_and_a_share_of_the_priors(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LoraDae._losses
    seen: list[tuple[float, torch.Tensor]] = []

    def noted(self: LoraDae, batch: dict[str, torch.Tensor], draws: Any) -> torch.Tensor:
        losses = original(self, batch, draws)
        if self.training:
            seen.append((float(losses.mean()), batch["text"].detach()))
        return losses

    class Last(training.lightning.Callback):
        loss = 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *rest: Any) -> None:
            self.loss = float(trainer.callback_metrics["train/loss"])

    monkeypatch.setattr(LoraDae, "_losses", noted)
    for weight in (0.0, 0.25):
        seen.clear()
        last = Last()
        cfg = config(tiny_backbone, tmp_path / f"run{weight}", tmp_path / "cache", *OPTIONS,
                     f"objective.prior_weight={weight}")  # fmt: skip
        training.train(cfg, [last])
        if weight == 0:
            assert len(seen) == 1
            photos = seen[0][0]
            continue
        assert seen[0][0] == pytest.approx(photos)  # the photos draw the same noise with and without
        assert last.loss == pytest.approx(seen[0][0] + 0.25 * seen[1][0], rel=1e-5)
        assert torch.equal(seen[1][1][0], seen[1][1][1])  # one caption for all


def test_a_training_that_goes_on_in_another_folder_keeps_to_the_same_pictures(
    tiny_backbone: Path, tmp_path: Path
) -> None:
    """And they lie in that folder from then on."""

    def train(name: str, *options: str) -> torch.Tensor:
        own = (*OPTIONS, "objective.prior_weight=0.5", *options)
        training.train(config(tiny_backbone, tmp_path / name, tmp_path / "cache", *own))
        return load_file(tmp_path / name / "prior.safetensors")["latents"]

    drawn, checkpoint = train("first"), tmp_path / "first" / "checkpoints" / "adapter.ckpt"
    taken_over = train("second", "trainer.max_steps=2", f"ckpt_path={checkpoint}")
    assert torch.equal(taken_over, drawn)
    (tmp_path / "first" / "prior.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"first.prior\.safetensors is gone"):
        train("third", "trainer.max_steps=2", f"ckpt_path={checkpoint}")
    assert torch.equal(train("second", "trainer.max_steps=3", "ckpt_path=last"), drawn)


def test_the_text_encoder_may_train_beside_the_prior(tiny_backbone: Path, tmp_path: Path) -> None:
    """Then a batch has tokens instead of embeddings, and so has the prior's."""
    options = (*OPTIONS, "objective.prior_weight=0.5", "adapter.targets=[cross_attention,text_encoder]")
    training.train(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    found = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert any(name.startswith("text_encoder.") and "lora_B" in name and value.any() for name, value in found.items())


def test_batches_go_round_in_order_with_empty_sources() -> None:
    prior = Prior(Path("x"), Config(run_dir="x"), None, False)  # type: ignore[arg-type]
    prior.latents, prior.text = torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 4), torch.ones(5, 6)
    like = {"text": torch.zeros(4, 5, 6), "source": torch.ones(4, 2, 4, 4)}
    batch = prior.batch(range(2, 6), like)
    assert batch["latent_mean"][:, 0, 0, 0].tolist() == [2, 0, 1, 2]
    assert not batch["source"].any() and not batch["latent_std"].any() and batch["text"].shape == (4, 5, 6)
    assert "source" not in prior.batch(range(4), {"text": like["text"]})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    start = tmp_path / "start.safetensors"
    start.touch()
    cfg = Config(run_dir="x", objective=ObjectiveConfig(prior_weight=1.0), sampling=SamplingConfig())
    cfg.adapter.init_from = str(start)
    with pytest.raises(ConfigError, match="prior_weight keeps"):
        check(cfg)
    with pytest.raises(ConfigError, match="prior_images=0"):
        check(Config(run_dir="x", objective=ObjectiveConfig(prior_images=0)))
