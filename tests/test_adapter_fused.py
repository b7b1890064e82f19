"""Fused LoRA layers are PEFT's: same outputs, same gradients, same parameters, for every geometry."""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_models import FAMILIES, predict, randomize, tiny_unet
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from lora_dae.adapter import fused, products
from lora_dae.adapter.fused import FusedConv2d, FusedLinear, fuse, merged_once, merging_pays
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.config import AdapterConfig

CONVOLUTIONS = {
    "3x3": nn.Conv2d(6, 10, 3, padding=1),
    "stride": nn.Conv2d(6, 10, 3, stride=2, padding=1),
    "no bias": nn.Conv2d(6, 10, 3, padding=1, bias=False),
    "1x1": nn.Conv2d(6, 10, 1),
    "no padding": nn.Conv2d(6, 10, 3),
    "oblong": nn.Conv2d(6, 4, (3, 5), padding=(0, 2), stride=(1, 2)),
}


class One(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pair(layer: nn.Module, dtype: torch.dtype, **options: object) -> tuple[One, One]:
    """The same adapted layer computed by PEFT and fused."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], init_lora_weights=False, **options)  # type: ignore[arg-type]
    theirs = One(copy.deepcopy(layer)).to(dtype)
    theirs.requires_grad_(False)
    inject_adapter_in_model(config, theirs)
    theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    assert fuse(ours) == 1
    return theirs, ours


def everything(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of a loss that weighs each output differently."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    return {"output": y.detach(), "x": x.grad} | {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "split"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_give_peft_s_output_and_gradients(
    kind: str, merged: bool, dtype: torch.dtype, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "merging_pays", lambda *sizes: merged)
    theirs, ours = pair(CONVOLUTIONS[kind].to(memory_format=memory_format), dtype)
    x = torch.randn(2, 6, 9, 8, dtype=dtype).to(memory_format=memory_format)
    expected, got = everything(theirs, x), everything(ours, x)
    assert expected.keys() == got.keys() and len(got) == 4
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "split"])
def test_linears_give_peft_s_output_and_gradients(
    merged: bool, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "merging_pays", lambda *sizes: merged)
    theirs, ours = pair(nn.Linear(6, 10, bias=bias), dtype)
    x = torch.randn(4, 5, 6, dtype=dtype)
    expected, got = everything(theirs, x), everything(ours, x)
    assert expected.keys() == got.keys() and len(got) == 4
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_are_the_derivatives() -> None:
    """Against finite differences, independent of PEFT."""
    _, ours = pair(nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.float64)
    parameters = {k: p for k, p in ours.named_parameters() if p.requires_grad}
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    names = list(parameters)

    def output(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(ours, dict(zip(names, values, strict=True)), (x,))

    assert merging_pays(2 * 25 // 4, 18, 3)
    assert torch.autograd.gradcheck(output, (x, *(parameters[k].detach().requires_grad_() for k in names)))


LAYERS = {"linear": nn.Linear(6, 10), **CONVOLUTIONS}


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "split"])
@pytest.mark.parametrize("kind", LAYERS)
def test_bf16_autocast_gives_bf16_output_and_float32_gradients_near_the_exact_ones(
    kind: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "merging_pays", lambda *sizes: merged)
    theirs, ours = pair(LAYERS[kind], torch.float32)
    few, many = torch.randn(1, 6, 5, 6), torch.randn(8, 6, 9, 8)  # positions: few have a mirrored weight of their own
    inputs = [torch.randn(16, 8, 6)] * 2 if kind == "linear" else [few, few, many, few]
    for x in inputs:  # the second call finds what the first one made
        assert few.numel() // 6 < products.FEW < many.numel() // 6
        theirs.zero_grad(), ours.zero_grad()
        exact = everything(theirs, x)
        with torch.autocast("cpu", torch.bfloat16):
            got = everything(ours, x)
        assert got["output"].dtype == torch.bfloat16 and all(
            v.dtype == torch.float32 for k, v in got.items() if k != "output"
        )
        for name, value in exact.items():
            gap = (got[name].float() - value).norm() / value.norm()
            assert gap < 0.02, (name, gap)  # bf16 keeps 8 bits: relative 2^-9 a rounding


@pytest.mark.parametrize("kind", ["linear", "3x3", "stride"])
def test_split_layers_follow_their_frozen_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written into, replaced, or called in another precision; a copied layer makes its own."""
    monkeypatch.setattr(fused, "merging_pays", lambda *sizes: False)
    theirs, ours = pair(copy.deepcopy(LAYERS[kind]), torch.float32)
    x = torch.randn(16, 6) if kind == "linear" else torch.randn(8, 6, 9, 8)

    def same() -> None:
        for model in (ours, copy.deepcopy(ours)):
            with torch.autocast("cpu", torch.bfloat16):
                half = model(x)
            exact = theirs(x)
            assert (half.float() - exact).norm() < 0.02 * exact.norm()
            torch.testing.assert_close(model(x), exact)

    same()
    with torch.no_grad():
        for model in (theirs, ours):
            model.layer.base_layer.weight.mul_(-3)
    same()
    new = nn.Parameter(torch.randn_like(theirs.layer.base_layer.weight), requires_grad=False)
    theirs.layer.base_layer.weight = ours.layer.base_layer.weight = new
    same()


def test_the_split_order_is_taken_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position through a square layer: B A x costs 2n, forming B A costs n * n."""
    assert not merging_pays(1, 100, 100) and merging_pays(51, 100, 100) and not merging_pays(50, 100, 100)
    _, ours = pair(nn.Linear(100, 100), torch.float32)
    monkeypatch.setattr(products, "merge", lambda *a: pytest.fail("merged"))
    ours(torch.randn(50, 100))
    with pytest.raises(pytest.fail.Exception):
        ours(torch.randn(51, 100))


def test_dropout_is_peft_s_in_training_and_fused_without() -> None:
    theirs, ours = pair(nn.Linear(6, 10), torch.float32, lora_dropout=0.5)
    x = torch.randn(40, 6)
    for mode in (True, False):
        outputs = []
        for model in (theirs, ours):
            torch.manual_seed(1)
            outputs.append(model.train(mode)(x))
        torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"alpha": 3.0, "conv_alpha": 1.0}])
def test_a_whole_unet_predicts_the_same_with_either_kernel(family: str, options: dict) -> None:
    predictions, names = [], []
    for kernel in ("peft", "fused"):
        unet = tiny_unet(family)
        torch.manual_seed(5)
        inject(unet, AdapterConfig(rank=2, kernel=kernel, **options))
        assert any(isinstance(m, (FusedLinear, FusedConv2d)) for m in unet.modules()) == (kernel == "fused")
        randomize(unet)
        predictions.append(predict(unet, family=family))
        names.append(list(trainable_parameters(unet)))
    assert names[0] == names[1]
    torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-4, atol=1e-5)


OPTIONS = [{}, {"use_dora": True}, {"use_rslora": True}, {"dropout": 0.5}]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merged_once_predicts_the_same_and_leaves_no_trace(options: dict, family: str) -> None:
    """Largest difference 1e-5 of the largest value while merged; afterwards every bit as before."""
    unet = tiny_unet(family)
    inject(unet, AdapterConfig(rank=2, alpha=3, **options))
    randomize(unet)
    unet.eval()
    before, weights = predict(unet, family=family), copy.deepcopy(unet.state_dict())
    with merged_once(unet):
        merged = predict(unet, family=family)
        again = predict(unet, family=family)
    assert torch.equal(merged, again)
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert torch.equal(predict(unet, family=family), before)
    assert all(torch.equal(value, weights[key]) for key, value in unet.state_dict().items())


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_merged_once_is_that_of_the_whole_weight_at_any_size(
    name: str, memory_format: torch.memory_format
) -> None:
    """Against the same layer in float64; its weight was put into the order that suits the first size."""
    _, ours = pair(copy.deepcopy(CONVOLUTIONS[name]), torch.float32)
    exact = copy.deepcopy(ours).double().eval()
    ours.eval().to(memory_format=memory_format)
    with torch.no_grad(), merged_once(ours):
        for shape in ((8, 6, 9, 8), (1, 6, 31, 20), (8, 6, 9, 8)):
            x = torch.randn(shape).to(memory_format=memory_format)
            y = ours(x)
            torch.testing.assert_close(y.double(), exact(x.double()), rtol=0, atol=1e-5)
            if memory_format == torch.channels_last:
                assert y.is_contiguous(memory_format=memory_format)  # or the next layer would have to turn it


def test_merged_once_merges_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And merges anew in the next block, as the adapter has trained on by then."""
    merges = []
    original = fused.merge
    monkeypatch.setattr(fused, "merge", lambda *a: merges.append(1) or original(*a))
    _, ours = pair(nn.Linear(6, 10), torch.float32)
    x = torch.randn(40, 6)
    ours.eval()
    with torch.no_grad(), merged_once(ours):
        first = [ours(x) for _ in range(3)]
        with merged_once(ours):
            first.append(ours(x))
    assert len(merges) == 1 and all(torch.equal(y, first[0]) for y in first)
    ours.layer.lora_B["default"].weight.data += 1
    with torch.no_grad(), merged_once(ours):
        assert not torch.allclose(ours(x), first[0])
    assert len(merges) == 2


def test_merged_once_lets_gradients_and_other_scales_through() -> None:
    _, ours = pair(nn.Linear(6, 10), torch.float32)
    x = torch.randn(40, 6)
    ours.eval()
    with merged_once(ours):
        ours(x).sum().backward()
        assert ours.layer.lora_A["default"].weight.grad is not None
        with torch.no_grad():
            whole = ours(x)
            ours.layer.scale_layer(0.5)
            half = ours(x)
            ours.layer.unscale_layer()
            base = ours.layer.base_layer(x)
    torch.testing.assert_close(half - base, (whole - base) / 2)


def test_a_disabled_adapter_leaves_the_backbone() -> None:
    unet = tiny_unet()
    base = predict(unet)
    inject(unet, AdapterConfig(rank=2))
    randomize(unet)
    unet.eval().disable_adapters()
    torch.testing.assert_close(predict(unet), base, rtol=0, atol=0)
    unet.enable_adapters()
    assert not torch.equal(predict(unet), base)


def test_what_becomes_of_a_text_is_computed_once_while_it_stays_the_same_tensor() -> None:
    """As in the steps of one image; a text that somebody writes into, or another tensor, counts as another text."""
    _, ours = pair(nn.Linear(6, 10), torch.float32)
    keys, queries = ours.eval(), copy.deepcopy(ours)
    attention = nn.ModuleDict({"attn2": nn.ModuleDict({"to_k": keys.layer, "to_q": queries.layer})})
    text = torch.randn(2, 40, 6)
    with torch.no_grad(), merged_once(attention):
        first = keys(text)
        assert keys(text) is first and queries(text) is not queries(text)
        assert torch.equal(keys(text.clone()), first)
        text += 1
        changed = keys(text)
        assert not torch.allclose(changed, first) and torch.equal(changed, keys(text.clone()))
        keys(text).zero_()  # by somebody who owns what he was given
        assert torch.equal(keys(text), queries(text))
    with torch.no_grad():
        assert keys(text) is not keys(text)
