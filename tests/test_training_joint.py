"""Source texture that trains in the adapter's own steps: one loss, gradients into both, no stage of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from compose import config
from safetensors.torch import load_file
from test_training_ddp import Interrupt
from test_training_on_policy import scheduler
from test_training_paired import Blurry, draw, paired_batch

from lora_dae.config import EnhancementConfig
from lora_dae.diffusion import alpha_sigma, snr
from lora_dae.enhancement import EnhancementModule
from lora_dae.enhancement.bands import split_bands
from lora_dae.training import run as training
from lora_dae.training.ended import InterruptedRunError
from lora_dae.training.module import LoraDae
from lora_dae.training.objective import Draws, denoise
from lora_dae.training.paired import joint_loss

QUICK = ("enhancement.gain=false", "enhancement.decoder=false")


def denoised(unet: torch.nn.Module, base: Any, batch: dict[str, torch.Tensor], timesteps: torch.Tensor) -> Any:
    clean, never = batch["latent_mean"], torch.zeros(len(timesteps), dtype=torch.bool)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    whole = {**batch, "latent_std": torch.zeros_like(clean)}
    return denoise(unet, base, whole, torch.zeros(2, 3), Draws(torch.zeros_like(clean), noise, timesteps, never, never))


def test_with_closed_gates_it_is_the_weighted_error_of_bands() -> None:
    """min(SNR, 5) times the squared error of x0's bands, nothing where the module is off."""
    base, batch = scheduler(), paired_batch()
    module = EnhancementModule(max_log_gain=0.0, source_channels=4)
    assert module.texture is not None
    with torch.no_grad():
        for parameter in module.texture.parameters():
            parameter.zero_()
    timesteps = torch.tensor([20, 60, 120, 200, 300, 400, 999, 999])
    unet = Blurry(batch["latent_mean"], base)
    draws = draw(batch, base, EnhancementConfig(wrong_source=0.0), 0)
    found = joint_loss(base, module, batch, denoised(unet, base, batch, timesteps), draws, 5.0)
    missing = split_bands(unet.blurred - batch["latent_mean"], module.levels)[0]
    error = sum(band.square().mean((1, 2, 3)) for band in missing)
    ratio = snr(*alpha_sigma(base, timesteps, batch["latent_mean"])).flatten()
    expected = error * ratio.clamp(max=5.0)
    expected[6:] = 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


class Norms(lightning.Callback):
    """Of the gradients of each step: the adapter's, the texture's."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.found: list[tuple[float, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: LoraDae, optimizer: Any) -> None:
        parts = [[p.grad.norm() for p in group["params"]] for group in optimizer.param_groups]
        self.stages.append(pl_module.stage)
        self.found.append(tuple(float(torch.stack(part).norm()) for part in parts))  # type: ignore[arg-type]
        assert [group["initial_lr"] for group in optimizer.param_groups] == [2e-3, 2e-2]


def test_both_learn_from_it_and_no_stage_follows(tiny_backbone: Path, tmp_path: Path) -> None:
    def make(name: str, *overrides: str) -> Any:
        return config(tiny_backbone, tmp_path / name, tmp_path / "cache", *QUICK, *overrides)

    norms = Norms()
    training.train(make("joint", "enhancement.joint=true"), [norms])
    assert set(norms.stages) == {"adapter"} and len(norms.found) == 4
    assert all(adapter > 0 and texture > 0 for adapter, texture in norms.found[1:])
    training.train(make("apart"))
    joint, apart = (weights(tmp_path / name) for name in ("joint", "apart"))
    assert joint.keys() == apart.keys()
    assert all(
        any(not torch.equal(joint[k], apart[k]) for k in joint if file in k) for file in ("enhancement", "kohya")
    )
    # Resumed at step 2 of 4, with two groups in the optimizer, it ends at the same weights.
    resumed = make("joint", "enhancement.joint=true", "trainer.val_check_interval=2")
    stop = Interrupt(step=2)
    with pytest.raises(InterruptedRunError):
        training.train(replace(resumed, run_dir=str(tmp_path / "cut")), [stop])
    training.train(replace(resumed, run_dir=str(tmp_path / "cut"), ckpt_path="last"))
    cut = weights(tmp_path / "cut")
    assert all(torch.equal(joint[k], cut[k]) for k in joint)
