"""Exactly the chosen layers train, at the rank and scale that were asked for."""

from __future__ import annotations

import math

import pytest
import torch
from adapter_models import FAMILIES, predict, randomize, tiny_unet
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_dae.adapter.inject import inject, make_full_finetune, trainable_parameters
from lora_dae.adapter.source_input import attach_source_input
from lora_dae.adapter.table import adapter_rows, adapter_table
from lora_dae.adapter.targets import is_spatial_conv, select
from lora_dae.config import UNET_GROUPS, AdapterConfig, ConfigError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [[group] for group in UNET_GROUPS] + [["cross_attention", "conv"]])
def test_exactly_these_layers_train(family: str, targets: list[str]) -> None:
    unet = tiny_unet(family)
    expected = {f"{name}.{matrix}.default.weight" for name in select(unet, targets) for matrix in ("lora_A", "lora_B")}
    inject(unet, AdapterConfig(targets=targets, rank=2))
    trains = trainable_parameters(unet)
    assert set(trains) == expected
    assert all(parameter.dtype == torch.float32 for parameter in trains.values())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_injected_unet_predicts_what_the_backbone_predicts(family: str, use_dora: bool) -> None:
    unet = tiny_unet(family)
    base = predict(unet, family=family)
    inject(unet, AdapterConfig(rank=3, use_dora=use_dora))
    torch.testing.assert_close(predict(unet.eval(), family=family), base, rtol=0, atol=2e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_scale_of_every_layer(use_rslora: bool) -> None:
    unet = tiny_unet()
    cfg = AdapterConfig(list(UNET_GROUPS), rank=4, alpha=6, conv_rank=2, conv_alpha=1, use_rslora=use_rslora)
    inject(unet, cfg)
    for name in select(unet, UNET_GROUPS):
        layer = unet.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        rank, alpha = (2, 1) if is_spatial_conv(layer) else (4, 6)
        assert layer.lora_A["default"].weight.shape[0] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / (math.sqrt(rank) if use_rslora else rank)), name


def test_alpha_defaults_to_rank() -> None:
    unet = tiny_unet()
    inject(unet, AdapterConfig(rank=4, conv_rank=2))
    assert {module.scaling["default"] for module in unet.modules() if isinstance(module, LoraLayer)} == {1.0}


def test_one_layer_computes_the_equation() -> None:
    """W x + (alpha / rank) B A x, on a strided convolution: A has its stride and padding, B is 1x1."""
    unet = tiny_unet()
    inject(unet, AdapterConfig(["conv"], rank=4, conv_rank=3, conv_alpha=5))
    randomize(unet)
    layer = unet.down_blocks[0].downsamplers[0].conv
    assert layer.base_layer.stride == layer.lora_A["default"].stride == (2, 2)
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    low = nn.functional.conv2d(x, a, stride=2, padding=1)
    base = layer.base_layer
    expected = nn.functional.conv2d(x, base.weight, base.bias, stride=2, padding=1)
    expected = expected + 5 / 3 * nn.functional.conv2d(low, b)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_same_seed_same_adapter_and_gaussian_differs_from_kaiming() -> None:
    def first_weights(init: str) -> torch.Tensor:
        unet = tiny_unet()
        torch.manual_seed(5)
        inject(unet, AdapterConfig(init=init, rank=4))
        return next(iter(trainable_parameters(unet).values())).detach()

    assert torch.equal(first_weights("kaiming"), first_weights("kaiming"))
    bound = 1 / math.sqrt(8)  # kaiming_uniform_ with a = sqrt(5) on 8 inputs
    assert first_weights("kaiming").abs().max() <= bound < first_weights("gaussian").abs().max()


def test_trainables_are_float32_on_a_half_precision_backbone() -> None:
    unet = tiny_unet().to(torch.bfloat16)
    inject(unet, AdapterConfig(rank=2))
    assert {parameter.dtype for parameter in trainable_parameters(unet).values()} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16


def test_dropout_is_active_after_injection_and_off_in_eval() -> None:
    unet = tiny_unet()
    inject(unet, AdapterConfig(rank=4, dropout=0.5))
    randomize(unet)
    assert not torch.equal(predict(unet), predict(unet))
    unet.eval()
    assert torch.equal(predict(unet), predict(unet))


def test_dora_on_convolutions_works_on_a_channels_last_backbone() -> None:
    unet = tiny_unet().to(memory_format=torch.channels_last)
    inject(unet, AdapterConfig(rank=4, use_dora=True))
    unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 16)).sample.mean().backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(unet).values())


def test_full_finetune_trains_every_weight() -> None:
    unet = tiny_unet().requires_grad_(False)
    make_full_finetune(unet)
    assert trainable_parameters(unet).keys() == dict(unet.named_parameters()).keys()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (AdapterConfig(rank=0), r"adapter\.rank is 0; set it to 1 or more"),
        (AdapterConfig(rank=4, conv_rank=-1), r"adapter\.conv_rank is -1"),
        (
            AdapterConfig(["cross_attention"], rank=9),
            r"adapter\.rank is 9, but .*attn2\.to_q has full rank 8",
        ),
        (
            AdapterConfig(["conv_out"], rank=4, conv_rank=5),
            r"adapter\.conv_rank is 5, but conv_out has full rank 4",
        ),
        (AdapterConfig(init="pissa"), r"adapter\.init is 'pissa'; choose from kaiming, gaussian"),
    ],
)
def test_what_does_not_fit_is_one_clear_sentence(cfg: AdapterConfig, message: str) -> None:
    unet = tiny_unet()
    with pytest.raises(ConfigError, match=message):
        inject(unet, cfg)
    assert not any(isinstance(module, LoraLayer) for module in unet.modules())


def test_second_injection_is_refused() -> None:
    unet = tiny_unet()
    inject(unet, AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match="already carries an adapter"):
        inject(unet, AdapterConfig(rank=2))


def test_table_counts_what_trains() -> None:
    unet = tiny_unet()
    backbone = sum(parameter.numel() for parameter in unet.parameters())
    attach_source_input(unet)
    inject(unet, AdapterConfig(rank=4, conv_rank=2))
    extra = nn.Linear(3, 5)
    rows = {row.name: row for row in adapter_rows(unet, {"enhancement": extra})}
    assert list(rows) == ["cross_attention", "conv", "source_input", "enhancement"]
    assert rows["cross_attention"].modules == len(select(unet, ["cross_attention"]))
    assert rows["cross_attention"].ranks == (4,) and rows["conv"].ranks == (2, 4)
    assert rows["enhancement"].parameters == 20
    total = sum(parameter.numel() for parameter in [*unet.parameters(), *extra.parameters()] if parameter.requires_grad)
    assert sum(row.parameters for row in rows.values()) == total
    assert sum(row.share for row in rows.values()) == pytest.approx(total / backbone)
    text = adapter_table(unet, {"enhancement": extra})
    assert "cross_attention" in text and "2/4" in text and f"{total:,}" in text


def test_table_of_a_full_finetune_is_the_whole_backbone() -> None:
    unet = tiny_unet()
    make_full_finetune(unet)
    (row,) = adapter_rows(unet, {})
    assert row.name == "unet" and row.share == 1.0
