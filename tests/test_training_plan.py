"""plan=true: numbers of a run, without weights; fake tensors count what real ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_models import tiny_unet
from compose import config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.config import AdapterConfig, Config
from lora_dae.training import plan as planning
from lora_dae.training import run as training
from lora_dae.training.memory import PeakMemory, materialize


def test_counts_storages_while_they_live() -> None:
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        view = first[:10]
        assert memory.now == 4000
        second = torch.ones(500)
        del first
        assert memory.now == 6000  # the view keeps the whole storage
        del view, second
        assert memory.now == 0
    assert memory.peak == 6000


def step(unet: torch.nn.Module) -> None:
    unet(
        torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2, 3, 16)
    ).sample.square().mean().backward()


def test_fake_tensors_peak_where_real_ones_do() -> None:
    """One step of forward and backward through a UNet with LoRA: the same number of bytes, and no memory used."""
    peaks = []
    for mode in (FakeTensorMode(), torch.enable_grad()):
        with torch.device("meta"):
            unet = tiny_unet()
            inject(unet, AdapterConfig(["cross_attention", "conv"], rank=2))
        with mode, PeakMemory() as memory:
            materialize(unet, torch.float32)
            step(unet)
        peaks.append(memory.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def numbers(backbone: Path, tmp_path: Path, *overrides: str) -> planning.Plan:
    return planning.make_plan(config(backbone, tmp_path / "run", tmp_path / "cache", *overrides))


def test_numbers_are_those_of_the_run(tiny_backbone: Path, tmp_path: Path) -> None:
    plan = numbers(tiny_backbone, tmp_path)
    cfg: Config = config(tiny_backbone, tmp_path / "run", tmp_path / "cache")
    from lora_dae.adapter.source_input import attach_source_input
    from lora_dae.backbone.load import load_backbone
    from lora_dae.enhancement.module import EnhancementModule

    unet = load_backbone(cfg.backbone).unet
    inject(unet, cfg.adapter)
    attach_source_input(unet)
    expected = [*trainable_parameters(unet).values(), *EnhancementModule().parameters()]
    assert plan.trainable == sum(p.numel() for p in expected)
    assert plan.adapter_file == 4 * plan.trainable
    assert (plan.steps, plan.images, plan.family) == (4, 24, "sd1")
    assert plan.cache == 24 * (2 * 2 * 8 * 16 * 16 + 2 * 16 * 32)  # mean and source, text
    weights = sum(p.numel() * 4 for p in unet.parameters())
    assert plan.step_peak > weights


def test_what_saves_memory_is_seen_to(tiny_backbone: Path, tmp_path: Path) -> None:
    usual = numbers(tiny_backbone, tmp_path).step_peak
    assert numbers(tiny_backbone, tmp_path, "backbone.gradient_checkpointing=true").step_peak < usual
    assert numbers(tiny_backbone, tmp_path, "data.batch_size=2").step_peak < usual
    mixed = ("backbone.weights=bf16", "trainer.precision=bf16-mixed")
    assert numbers(tiny_backbone, tmp_path, *mixed).step_peak < usual


def test_loads_no_weight_and_writes_no_run(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: object) -> Tensor:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(training, "load_backbone", load)
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "plan=true")
    assert training.run(cfg).table is None
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    for part in ("What trains", "Plan of default", "memory, one step", "cache", "cross_attention"):
        assert part in said, part
