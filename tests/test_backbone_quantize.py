"""int8 weights: refused where they make no sense; where torchao is installed, LoRA trains on them as on bfloat16."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import randomize, tiny_unet
from compose import config
from family_models import write_backbone

from lora_dae.adapter.files import load_adapter, save_adapter
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import best_device
from lora_dae.backbone.quantize import check_int8, quantize
from lora_dae.config import AdapterConfig, BackboneConfig, ConfigError, check
from lora_dae.training import run as training
from lora_dae.training.plan import make_plan


def test_refused_on_a_cpu_before_anything_loads(tiny_backbone: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(training, "load_backbone", lambda *a: pytest.fail("weights were loaded"))
    if best_device().type != "cpu":
        pytest.skip("there is an accelerator here")
    with pytest.raises(ConfigError, match="there is none here: use bf16 or fp32"):
        training.run(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "backbone.weights=int8"))


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lora-dae\[quantize\]'"):
        check_int8("int8", torch.device("cuda"))
    check_int8("bf16", torch.device("cpu"))


@pytest.mark.parametrize("override", ["adapter=full", "adapter.use_dora=true"])
def test_for_plain_lora_alone(override: str, tiny_backbone: Path, tmp_path: Path) -> None:
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", "backbone.weights=int8", override)
    with pytest.raises(ConfigError, match="int8 is for plain LoRA"):
        check(cfg)


def test_plan_counts_a_byte_less_per_weight(tiny_backbone: Path, tmp_path: Path) -> None:
    mixed = "trainer.precision=bf16-mixed"
    peaks = [
        make_plan(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", mixed, f"backbone.weights={w}")).step_peak
        for w in ("bf16", "int8")
    ]
    unet = load_backbone(BackboneConfig(path=str(tiny_backbone))).unet
    assert peaks[0] - peaks[1] == sum(m.weight.numel() for m in unet.modules() if isinstance(m, torch.nn.Linear))


def test_trains_and_draws_as_bfloat16_does(tmp_path: Path) -> None:
    """Output and gradients differ by the rounding of the weights alone (1 of 255 a weight): below 3 %."""
    pytest.importorskip("torchao", reason="torchao (extra quantize) is not installed: int8 was NOT tested")
    plain = tiny_unet("sd21").to(torch.bfloat16).requires_grad_(False)
    small = copy.deepcopy(plain)
    quantize(small)
    linear = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
    assert type(small.get_submodule(linear).weight) is not type(plain.get_submodule(linear).weight)
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 3, 16, generator=generator)

    def predict(unet: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return unet(x, 500, text).sample.float()

    outputs, gradients = [], []
    for unet in (plain, small):
        torch.manual_seed(1)
        inject(unet, AdapterConfig(rank=2))
        randomize(unet)
        outputs.append(predict(unet))
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainable_parameters(unet).values()]))  # type: ignore[union-attr]
    for exact, rounded in (outputs, gradients):
        assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.03
    fresh = tiny_unet("sd21").to(torch.bfloat16).requires_grad_(False)
    quantize(fresh)
    load_adapter(fresh, save_adapter(small, tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(predict(fresh), outputs[1].detach(), rtol=0, atol=0.02)


def test_loads_by_its_setting(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao (extra quantize) is not installed: int8 was NOT tested")
    folder = write_backbone(tmp_path / "sdxl", "sdxl")
    unet = load_backbone(BackboneConfig(name="folder", path=str(folder), weights="int8")).unet
    assert unet.conv_in.weight.dtype == torch.bfloat16
    kinds = {type(m.weight).__name__ for m in unet.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds != {"Parameter"} and len(kinds) == 1
