"""plan=true: numbers of a run, without weights; fake tensors count what real ones do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import tiny_unet
from compose import config
from conftest import write_photos
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.adapter.products import Frozen
from lora_dae.cli import typed
from lora_dae.config import AdapterConfig, Config, ConfigError, conf_dir, register
from lora_dae.enhancement.module import EnhancementModule
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

    unet = load_backbone(cfg.backbone).unet
    inject(unet, cfg.adapter)
    attach_source_input(unet)
    expected = [*trainable_parameters(unet).values(), *EnhancementModule(source_channels=8, decoder=True).parameters()]
    assert plan.trainable == sum(p.numel() for p in expected)
    assert plan.adapter_file == 4 * plan.trainable
    assert plan.stages == [("adapter", 4, 4), ("texture", 2, 4), ("decoder", 2, 2), ("gain", 1, 2)]
    assert (plan.images, plan.family) == (24, "sd1")
    assert plan.cache == 24 * (2 * 2 * 8 * 16 * 16 + 2 * 16 * 32)  # mean and source, text
    weights = sum(p.numel() * 4 for p in unet.parameters())
    assert plan.step_peak > weights


def test_what_saves_memory_is_seen_to(tiny_backbone: Path, tmp_path: Path) -> None:
    usual = numbers(tiny_backbone, tmp_path).step_peak
    every = numbers(tiny_backbone, tmp_path, "backbone.gradient_checkpointing=true").step_peak
    attention = numbers(tiny_backbone, tmp_path, "backbone.gradient_checkpointing=attention").step_peak
    assert every < attention < usual
    assert numbers(tiny_backbone, tmp_path, "data.batch_size=2").step_peak < usual
    mixed = ("backbone.weights=bf16", "trainer.precision=bf16-mixed")
    assert numbers(tiny_backbone, tmp_path, *mixed).step_peak < usual


def test_text_encoder_that_trains(tiny_backbone: Path, tmp_path: Path) -> None:
    """Its adapter is counted by r (in + out), its memory is the step's, and only tokens are cached."""
    plain = numbers(tiny_backbone, tmp_path)
    both = numbers(tiny_backbone, tmp_path, "adapter.targets=[cross_attention,conv,text_encoder]", "adapter.rank=16")
    assert both.trainable - plain.trainable == 2 * 16 * (4 * 2 * 32 + 2 * (32 + 64))  # two layers of width 32
    encoder = load_file(tiny_backbone / "text_encoder" / "model.safetensors")
    size = sum(4 * tensor.numel() for tensor in encoder.values())
    assert both.step_peak - plain.step_peak > size and plain.resting - both.resting == size
    assert plain.cache - both.cache == 24 * 2 * (16 * 32 - 16 * 2)
    assert "text_encoder" in both.table and "text_encoder" not in plain.table


def test_largest_named_bucket_counts(tiny_backbone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_photos(folder, 8)
    photos = ("data=folder", f"data.root={folder}", "conditioning=none", "data.val_fraction=0.25",
              "data.test_fraction=0.25", "data.resolution=64")  # fmt: skip
    square = numbers(tiny_backbone, tmp_path, *photos).step_peak
    assert numbers(tiny_backbone, tmp_path, *photos, "data.buckets=[auto]").step_peak == square
    assert numbers(tiny_backbone, tmp_path, *photos, "data.buckets=[64x64,64x96]").step_peak > square


def test_small_maps_in_bfloat16_are_planned_too(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SD 1.5's deepest convolutions are: there a run keeps weights in oneDNN's order, which no fake tensor has."""
    made: list[bool] = []
    before = Frozen.__init__

    def seen(self: Frozen, base: Any, *rest: Any) -> None:
        before(self, base, *rest)
        made.append(isinstance(base, torch.nn.Conv2d))

    monkeypatch.setattr(Frozen, "__init__", seen)
    small = ("trainer.precision=bf16-mixed", "data.batch_size=1", "data.resolution=32")
    assert numbers(tiny_backbone, tmp_path, *small).step_peak > 0
    assert any(made)


EXPERIMENTS = ("sd15_rank16", "sd15_rank16_paired", "sd21_rank16", "sdxl_rank16")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_memory_in_the_experiments_first_lines(experiment: str, tmp_path: Path) -> None:
    """What their comment promises is what the plan counts (within 15 %), and it fits a card of 24 GB."""
    written = export_pairs(tmp_path / "pairs")
    overrides = (
        f"experiment={experiment}",
        f"data.root={written}",
        "data.val_fraction=0.25",
        "data.test_fraction=0.25",
    )
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = typed(compose("train", [f"run_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", *overrides]))
    plan = planning.make_plan(cfg)
    head = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    promised = re.search(r"one step holds ([\d.]+) GB", head)
    assert promised is not None and plan.step_peak / 1e9 == pytest.approx(float(promised[1]), rel=0.15)
    assert plan.step_peak < 20e9
    assert ("source_input" in plan.table) == experiment.endswith("paired")


def export_pairs(root: Path) -> Path:
    """A folder of photos with a source column."""
    write_photos(root, 8)
    lines = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    rows = [json.dumps({**line, "source": line["file_name"]}) for line in lines]
    (root / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return root


def test_paired_plan_has_the_source_input(tiny_backbone: Path, tmp_path: Path) -> None:
    """Its channels train and are counted, as many as conv_in has weights."""
    photos = ("data=folder", f"data.root={export_pairs(tmp_path / 'pairs')}", "data.val_fraction=0.25",
              "data.test_fraction=0.25")  # fmt: skip
    alone, paired = (numbers(tiny_backbone, tmp_path, *photos, f"conditioning={c}") for c in ("none", "source"))
    texture = EnhancementModule(source_channels=8).texture
    assert paired.trainable - alone.trainable == 16 * 8 * 3 * 3 + sum(p.numel() for p in texture.parameters())
    assert paired.step_peak > alone.step_peak and paired.cache > alone.cache
    assert "source_input" in paired.table


def test_without_data_it_counts_by_the_photo(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "data=folder", "plan=true")
    training.run(cfg)
    said = " ".join(capsys.readouterr().out.split())
    assert "at most 0.0 MB a photo (data.root is not given)" in said and "4 of 4 photos" in said
    assert planning.make_plan(cfg).cache == 2 * 8 * 16 * 16 + 2 * 16 * 32
    with pytest.raises(ConfigError, match="data=folder needs data.root"):
        training.run(replace(cfg, plan=False))


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
