"""The source latent's own input channels: nothing at first, then exactly a wider conv_in."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapter_models import TEXT_DIM, draw, plain_pipeline, predict, randomize, tiny_unet
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lora_dae.adapter.files import load_adapter, save_adapter
from lora_dae.adapter.inject import inject, make_full_finetune, trainable_parameters
from lora_dae.adapter.source_input import (
    FILE_NAME,
    attach_source_input,
    detach_source_input,
    get_source_input,
    load_source_input,
    save_source_input,
)
from lora_dae.config import AdapterConfig, ConfigError

ADAPTER = AdapterConfig(["cross_attention", "conv", "conv_in"], rank=4, conv_rank=3, conv_alpha=1)


def with_source(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet, frozen, with a source input that is not zero."""
    unet.requires_grad_(False)
    attach_source_input(unet)
    randomize(unet)
    return unet


def both(unet: UNet2DConditionModel, sample: torch.Tensor) -> torch.Tensor:
    return unet(sample, 500, torch.ones(sample.shape[0], 3, TEXT_DIM)).sample


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_at_first_any_source_gives_exactly_the_base(memory_format: torch.memory_format) -> None:
    unet = tiny_unet().to(memory_format=memory_format)
    latents = torch.randn(2, 4, 8, 8)
    base = both(unet, latents)
    attach_source_input(unet)
    assert torch.equal(both(unet, torch.cat([latents, torch.randn(2, 4, 8, 8)], dim=1)), base)


def test_equals_a_conv_in_with_twice_the_channels() -> None:
    unet = with_source(tiny_unet())
    wide = tiny_unet()
    conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    conv.weight.data = torch.cat([unet.conv_in.weight, get_source_input(unet).conv.weight], dim=1)
    conv.bias.data = unet.conv_in.bias
    wide.conv_in = conv
    torch.testing.assert_close(predict(unet, channels=8), predict(wide, channels=8), rtol=0, atol=1e-5)


def test_no_source_is_a_zero_source_and_a_plain_pipeline_still_draws() -> None:
    unet = with_source(tiny_unet())
    latents = torch.randn(2, 4, 8, 8)
    without = both(unet, latents)
    assert torch.equal(both(unet, torch.cat([latents, torch.zeros_like(latents)], dim=1)), without)
    assert not torch.equal(both(unet, torch.cat([latents, latents], dim=1)), without)
    assert torch.equal(draw(plain_pipeline(unet)), draw(plain_pipeline(tiny_unet())))


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_failed_forward_leaves_nothing_behind(as_keyword: bool) -> None:
    unet = with_source(tiny_unet())
    sample, text = torch.randn(1, 8, 8, 8), torch.ones(1, 3, TEXT_DIM)
    expected = unet(sample, 500, text).sample
    with pytest.raises((TypeError, RuntimeError)):
        unet(sample, None, text)  # raises before conv_in
    got = unet(sample=sample, timestep=500, encoder_hidden_states=text) if as_keyword else unet(sample, 500, text)
    assert torch.equal(got.sample, expected)


def test_wrong_number_of_channels() -> None:
    unet = with_source(tiny_unet())
    with pytest.raises(ConfigError, match="got a sample of 5 channels; give it 4 .* or 8"):
        both(unet, torch.randn(1, 5, 8, 8))


def test_only_the_new_channels_train_and_the_base_is_untouched() -> None:
    unet = tiny_unet().requires_grad_(False)
    before = copy.deepcopy(unet.state_dict())
    attach_source_input(unet)
    trains = trainable_parameters(unet)
    assert list(trains) == ["source_input.conv.weight"]
    optimizer = torch.optim.SGD(trains.values(), lr=1.0)
    both(unet, torch.randn(2, 8, 8, 8)).square().mean().backward()
    optimizer.step()
    assert trains["source_input.conv.weight"].abs().max() > 0
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in before.items())
    assert unet.config["in_channels"] == 4


@pytest.mark.parametrize("use_dora", [False, True])
def test_order_of_attaching_and_injecting_does_not_matter(use_dora: bool) -> None:
    cfg = AdapterConfig(ADAPTER.targets, rank=4, conv_rank=3, use_dora=use_dora)
    first, second = tiny_unet(), tiny_unet()
    attach_source_input(first)
    torch.manual_seed(0)
    inject(first, cfg)
    torch.manual_seed(0)
    inject(second, cfg)
    attach_source_input(second)
    assert trainable_parameters(first).keys() == trainable_parameters(second).keys()
    weights = {name: torch.randn_like(parameter) * 0.2 for name, parameter in trainable_parameters(first).items()}
    for unet in (first, second):
        unet.load_state_dict(weights, strict=False)
    assert torch.equal(predict(first.eval(), channels=8), predict(second.eval(), channels=8))


def test_full_finetune_includes_it() -> None:
    unet = tiny_unet().requires_grad_(False)
    attach_source_input(unet)
    make_full_finetune(unet)
    assert all(parameter.requires_grad for parameter in unet.parameters())


def test_survives_deepcopy_and_the_copy_is_independent() -> None:
    unet = with_source(tiny_unet())
    expected = predict(unet, channels=8)
    twin = copy.deepcopy(unet)
    assert torch.equal(predict(twin, channels=8), expected)
    get_source_input(twin).conv.weight.data.zero_()
    assert torch.equal(predict(unet, channels=8), expected)
    assert not torch.equal(predict(twin, channels=8), expected)
    detach_source_input(twin)
    with pytest.raises(RuntimeError, match="channels"):
        predict(twin, channels=8)
    assert torch.equal(predict(unet, channels=8), expected)


def test_survives_dtype_and_memory_format() -> None:
    unet = with_source(tiny_unet())
    expected = predict(unet, channels=8)
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(predict(unet, channels=8), expected, rtol=0, atol=1e-5)
    unet.to(torch.float64)
    sample = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    assert unet(sample, 1, torch.ones(1, 3, TEXT_DIM, dtype=torch.float64)).sample.dtype == torch.float64


def test_half_precision_backbone_with_float32_source_weights() -> None:
    unet = with_source(tiny_unet().to(torch.bfloat16))
    text = torch.ones(1, 3, TEXT_DIM, dtype=torch.bfloat16)
    out = unet(torch.randn(1, 8, 8, 8, dtype=torch.bfloat16), 1, text).sample
    assert get_source_input(unet).conv.weight.dtype == torch.float32 and out.dtype == torch.bfloat16


def test_detach_gives_back_the_plain_unet() -> None:
    unet = with_source(tiny_unet())
    detached = detach_source_input(unet)
    assert detached is not None and get_source_input(unet) is None
    assert unet.state_dict().keys() == tiny_unet().state_dict().keys()
    assert not unet._forward_pre_hooks and not unet.conv_in._forward_hooks
    assert torch.equal(predict(unet), predict(tiny_unet()))
    assert detach_source_input(unet) is None


@pytest.mark.parametrize("adapter_first", [False, True])
def test_files_of_its_own_restore_it_beside_the_adapter(adapter_first: bool, tmp_path: Path) -> None:
    unet = tiny_unet()
    attach_source_input(unet)
    inject(unet, ADAPTER)
    randomize(unet)
    save_adapter(unet, tmp_path)
    file = save_source_input(unet, tmp_path, {"backbone": "studio"})
    assert file == tmp_path / FILE_NAME
    fresh = tiny_unet()
    if adapter_first:
        load_adapter(fresh, tmp_path)
    assert load_source_input(fresh, tmp_path) == {"backbone": "studio"}
    if not adapter_first:
        load_adapter(fresh, file.parent)
    assert torch.equal(predict(fresh.eval(), channels=8), predict(unet.eval(), channels=8))
    (weight,) = load_file(file).values()
    assert torch.equal(weight, get_source_input(unet).conv.weight)


def test_a_folder_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    unet, folder = with_source(tiny_unet()), tmp_path / "v1.5"
    folder.mkdir()
    inject(unet, ADAPTER)
    assert save_adapter(unet, folder).parent == save_source_input(unet, folder).parent == folder
    fresh = tiny_unet()
    load_source_input(fresh, folder)
    load_adapter(fresh, folder)
    assert torch.equal(predict(fresh.eval(), channels=8), predict(unet.eval(), channels=8))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no source input at"):
        load_source_input(tiny_unet(), tmp_path)
    torch.save({}, tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        load_source_input(tiny_unet(), tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="does not hold a source input"):
        load_source_input(tiny_unet(), tmp_path)
    save_source_input(with_source(tiny_unet(channels=8)), tmp_path)
    unet = tiny_unet(channels=4)
    with pytest.raises(ConfigError, match="load the backbone that it was trained on"):
        load_source_input(unet, tmp_path)
    assert get_source_input(unet) is None
    with pytest.raises(ConfigError, match="no source input to save"):
        save_source_input(unet, tmp_path)
    with pytest.raises(ConfigError, match="already has a source input"):
        attach_source_input(with_source(unet))
