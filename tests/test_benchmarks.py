"""The benchmarks measure what they say: steps that train, a floor that does not, and a comparison that knows noise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import compare, evaluation, steps
from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig


def parts(tiny_backbone: Path) -> steps.Parts:
    backbone = load_backbone(BackboneConfig(name="folder", path=str(tiny_backbone)))
    backbone.unet.requires_grad_(False)
    width = backbone.unet.config["cross_attention_dim"]
    config = CLIPTextConfig(
        vocab_size=500, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    text_encoder = CLIPTextModel(config)
    return steps.Parts(
        backbone.unet, backbone.vae, text_encoder.requires_grad_(False), torch.randn(2, 8, 16, 16),
        torch.rand(2, 3, 64, 64), torch.randint(0, 400, (2, 8)), torch.randn(2, 8, width),
    )  # fmt: skip


@pytest.mark.parametrize("name", steps.ROWS)
def test_every_step_leaves_the_shared_weights_as_they_are(name: str, tiny_backbone: Path) -> None:
    found = parts(tiny_backbone)
    before = {k: v.clone() for k, v in found.unet.state_dict().items()}
    step = steps.row(name, found)
    step()
    step()
    assert all(torch.equal(v, before[k]) for k, v in found.unet.state_dict().items())
    assert all(p.grad is None for p in found.unet.parameters())


def test_the_command_writes_ratios_and_compare_knows_what_is_noise(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "build", lambda *_: parts(tiny_backbone))
    file = tmp_path / "steps.json"
    monkeypatch.setattr(sys, "argv", ["steps", "--repeats", "2", "--rows", "ours", "--output", str(file)])
    steps.main()
    found = json.loads(file.read_text())
    assert found["rows"]["floor"]["of_floor"] == 1 and found["rows"]["ours"]["seconds"] > 0
    assert found["rows"]["device"]["matmul_gflops"] > 0
    old = {"a": {"of_floor": 1.2, "spread": 0.01}, "b": {"of_floor": 1.2, "spread": 0.1}, "device": {"x": 1.0}}
    new = {"a": {"of_floor": 1.3, "spread": 0.01}, "b": {"of_floor": 1.3, "spread": 0.1}, "device": {"x": 1.0}}
    assert {k: v[2] for k, v in compare.moved(old, new).items()} == {"a": True, "b": False}
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**found, "title": "another machine"}))
    monkeypatch.setattr(sys, "argv", ["compare", str(file), str(other)])
    with pytest.raises(SystemExit, match="like with like"):
        compare.main()


def test_the_evaluations_benchmark_compares_the_folders_way_with_the_bare_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "evaluation.json"
    words = ["--images", "5", "--size", "32", "--repeats", "1", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["evaluation", *words])
    evaluation.main()
    found = json.loads(file.read_text())
    assert found["bare_images_per_second"] > 0 and found["folder_of_bare"] > 0 and found["everything_of_bare"] > 0
    assert found["memory_kB_per_image"] >= 0  # a peak does not fall
