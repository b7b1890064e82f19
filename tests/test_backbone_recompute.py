"""What gradient checkpointing computes again: the blocks that were named, and nothing of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig

KINDS = (ResnetBlock2D, BasicTransformerBlock)


def runs_and_gradient(folder: Path, which: bool | str) -> tuple[list[float], torch.Tensor]:
    """How often blocks of each kind run in a step, on average, and the gradient of the first convolution."""
    unet = load_backbone(BackboneConfig(name="folder", path=str(folder), gradient_checkpointing=which)).unet
    unet.requires_grad_(False)
    unet.conv_in.weight.requires_grad_(True)
    blocks = [[m for m in unet.modules() if isinstance(m, kind)] for kind in KINDS]
    runs = [0.0] * len(KINDS)

    def note(block: nn.Module, _: object) -> None:
        kind = KINDS.index(type(block))  # type: ignore[arg-type]
        runs[kind] += 1 / len(blocks[kind])

    for block in (one for same in blocks for one in same):
        block.register_forward_pre_hook(note)
    torch.manual_seed(0)
    size = unet.config["cross_attention_dim"]
    output = unet(torch.randn(2, unet.config["in_channels"], 8, 8), torch.tensor([1, 500]), torch.randn(2, 4, size))
    output.sample.square().mean().backward()
    assert unet.conv_in.weight.grad is not None
    return runs, unet.conv_in.weight.grad


@pytest.mark.parametrize("which", [False, True, "attention"])
def test_the_named_blocks_run_twice(tiny_backbone: Path, which: bool | str) -> None:
    (resnets, transformers), gradient = runs_and_gradient(tiny_backbone, which)
    assert transformers == pytest.approx(1 + (which is not False))
    if which is True:
        assert 1.5 < resnets <= 2  # diffusers keeps those of the middle block's beginning
    else:
        assert resnets == pytest.approx(1)
    torch.testing.assert_close(gradient, runs_and_gradient(tiny_backbone, False)[1], rtol=1e-5, atol=1e-7)
