"""The choice of an attention kernel changes speed, not results, and is made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from lora_dae.backbone import attention
from lora_dae.backbone.attention import choose_attention
from lora_dae.config import ConfigError

LATENTS = (2, 8, 8, 8)
SHAPES = {"self 64x16/2", "cross-16 64x16/2", "self 16x32/2", "cross-16 16x32/2"}


@pytest.fixture()
def unet(tiny_backbone: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(tiny_backbone / "unet").requires_grad_(False)


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(LATENTS, generator=generator), torch.randn(2, 16, 32, generator=generator)
    return unet(latents, torch.tensor([10, 900]), text).sample


def test_a_setting_is_obeyed_everywhere_and_hardly_changes_the_output(unet: UNet2DConditionModel) -> None:
    outputs = {}
    for setting, processor in {"plain": AttnProcessor, "sdpa": AttnProcessor2_0}.items():
        assert choose_attention(unet, torch.float32, LATENTS, 16, setting) == {"all": setting}
        assert {type(used) for used in unet.attn_processors.values()} == {processor}
        outputs[setting] = output(unet)
    torch.testing.assert_close(outputs["plain"], outputs["sdpa"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_finds_every_shape_and_leaves_the_unet_as_it_was(unet: UNet2DConditionModel, dtype: torch.dtype) -> None:
    before = output(unet)
    assert set(choose_attention(unet, dtype, LATENTS, 16)) == SHAPES
    torch.testing.assert_close(output(unet), before, atol=1e-5, rtol=1e-5)
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_faster_kernel_is_set_shape_by_shape(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def sdpa_is_slow_across(layer, states, context, dtype) -> float:  # type: ignore[no-untyped-def]
        slow = isinstance(layer.processor, AttnProcessor2_0) == (context is not None)
        return 2.0 if slow else 1.0

    monkeypatch.setattr(attention, "_time", sdpa_is_slow_across)
    chosen = choose_attention(unet, torch.float32, LATENTS, 16)
    assert chosen == {shape: "plain" if shape.startswith("cross") else "sdpa" for shape in SHAPES}
    for name, used in unet.attn_processors.items():
        assert type(used) is (AttnProcessor if "attn2" in name else AttnProcessor2_0), name


def test_the_choice_is_remembered(unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "cache" / "attention.json"
    first = choose_attention(unet, torch.float32, LATENTS, 16, memory=memory)
    monkeypatch.delattr(attention, "_time")
    assert choose_attention(unet, torch.float32, LATENTS, 16, memory=memory) == first
    with pytest.raises(NameError):  # another batch size is another question
        choose_attention(unet, torch.float32, (3, 8, 8, 8), 16, memory=memory)


def test_kernels_are_timed_for_who_only_draws(unet: UNet2DConditionModel) -> None:
    with torch.no_grad():
        assert set(choose_attention(unet, torch.float32, LATENTS, 16, "auto")) == SHAPES


def test_timing_leaves_the_global_generator_alone(unet: UNet2DConditionModel) -> None:
    """Else a seed's weights would depend on whether the choice was remembered."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    choose_attention(unet, torch.float32, LATENTS, 16)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_setting_is_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(ConfigError, match="flash is unknown"):
        choose_attention(unet, torch.float32, LATENTS, 16, "flash")


def test_who_only_draws_leaves_the_memory_as_it_is(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    memory = tmp_path / "attention.json"
    choose_attention(unet, torch.float32, LATENTS, 16, memory=memory)
    before = memory.stat()
    choose_attention(unet, torch.float32, LATENTS, 16, memory=memory)
    assert (memory.stat().st_ino, memory.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    choose_attention(unet, torch.float32, (3, *LATENTS[1:]), 16, memory=memory)  # another batch size is new
    assert memory.stat().st_ino != before.st_ino


def test_where_nothing_can_be_written_the_choice_is_made_all_the_same(
    unet: UNet2DConditionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where the folder should be, which not even root can write into. It is said once."""
    (tmp_path / "cache").touch()
    attention.say_once.cache_clear()
    for _ in range(2):
        assert set(choose_attention(unet, torch.float32, LATENTS, 16, memory=tmp_path / "cache" / "x.json")) == SHAPES
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache"]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"here": 1}', b"\xff"])
def test_a_damaged_memory_is_written_anew(content: bytes, unet: UNet2DConditionModel, tmp_path: Path) -> None:
    memory = tmp_path / "attention.json"
    memory.write_bytes(content)
    first = choose_attention(unet, torch.float32, LATENTS, 16, memory=memory)
    (known,) = json.loads(memory.read_text()).values()
    assert set(first) == SHAPES and sorted(known.values()) == sorted(first.values())
