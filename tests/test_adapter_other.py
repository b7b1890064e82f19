"""LoHa and LoKr: their published formulas on our layers, nothing else trains, and files come back whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_models import predict, randomize, tiny_unet
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lora_dae.adapter.files import save_merged
from lora_dae.adapter.inject import adapted_layer, inject, layer_ranks, trainable_parameters
from lora_dae.adapter.other import FILE_NAME, load_other, save_other
from lora_dae.adapter.table import adapter_rows
from lora_dae.config import AdapterConfig, Config, ConfigError
from lora_dae.rules import check

KINDS = ("loha", "lokr")


def cfg(kind: str) -> AdapterConfig:
    return AdapterConfig(kind=kind, targets=["cross_attention", "conv"], rank=2, alpha=3.0, conv_rank=4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_trains_and_it_begins_as_the_identity(kind: str) -> None:
    unet = tiny_unet()
    before = predict(unet)
    inject(unet, cfg(kind))
    unet.eval()
    torch.testing.assert_close(predict(unet), before, atol=1e-6, rtol=1e-5)
    trained = trainable_parameters(unet)
    assert {adapted_layer(name) for name in trained} == set(layer_ranks(tiny_unet(), cfg(kind)))
    rows = {row.name: row for row in adapter_rows(unet, {})}
    assert set(rows) == {"cross_attention", "conv"} and rows["cross_attention"].ranks == (2,)
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in trained.values())
    randomize(unet)
    assert not torch.allclose(predict(unet), before, atol=1e-3)


def test_loha_is_a_hadamard_product_of_two_low_rank_ones() -> None:
    """W + alpha / rank * (A1 B1) o (A2 B2), FedPara's proposition 1 as LyCORIS writes it."""
    unet = tiny_unet()
    inject(unet, cfg("loha"))
    randomize(unet)
    name = next(n for n in layer_ranks(tiny_unet(), cfg("loha")) if n.endswith("attn2.to_k"))
    layer, x = unet.get_submodule(name), torch.randn(3, 16)
    w = {part: getattr(layer, f"hada_{part}")["default"] for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    delta = (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"]) * 3.0 / 2
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + delta).T)


def test_lokr_is_a_kronecker_product() -> None:
    """W + alpha / rank * w1 (x) w2, whichever of the two is whole or a product itself."""
    unet = tiny_unet()
    inject(unet, cfg("lokr"))
    randomize(unet)
    name = next(n for n in layer_ranks(tiny_unet(), cfg("lokr")) if n.endswith("attn2.to_q"))
    layer: torch.nn.Module = unet.get_submodule(name)

    def factor(which: str) -> torch.Tensor:
        whole = getattr(layer, f"lokr_{which}")
        if "default" in whole:
            return whole["default"]
        return getattr(layer, f"lokr_{which}_a")["default"] @ getattr(layer, f"lokr_{which}_b")["default"]

    base = layer.base_layer
    x = torch.randn(3, base.in_features)  # type: ignore[arg-type]
    delta = torch.kron(factor("w1"), factor("w2")) * 3.0 / 2
    torch.testing.assert_close(layer(x), x @ (base.weight + delta).T + (0 if base.bias is None else base.bias))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_network(kind: str, tmp_path: Path) -> None:
    unet = tiny_unet()
    inject(unet, cfg(kind))
    randomize(unet)
    unet.eval()
    expected = predict(unet)
    file = save_other(unet, tmp_path, cfg(kind), {"backbone": "tiny"})
    fresh = tiny_unet()
    load_other(fresh, tmp_path, cfg(kind))
    assert torch.equal(predict(fresh.eval()), expected)
    assert not trainable_parameters(fresh)
    with pytest.raises(ConfigError, match="another adapter"):
        load_other(tiny_unet(), tmp_path, AdapterConfig(kind=kind, rank=1))
    weights = load_file(file)
    weights.popitem()
    save_file(weights, tmp_path / FILE_NAME, {"kind": kind})
    with pytest.raises(ConfigError, match="another adapter"):
        load_other(tiny_unet(), tmp_path, cfg(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_folder_is_a_plain_unet_that_predicts_the_same(kind: str, tmp_path: Path) -> None:
    """Merging is all that other programs can have of these kinds; largest difference 1e-4 of the largest value."""
    unet = tiny_unet()
    inject(unet, cfg(kind))
    randomize(unet)
    expected = predict(unet.eval())
    assert not torch.allclose(expected, predict(tiny_unet()), atol=1e-3)
    plain = UNet2DConditionModel.from_pretrained(save_merged(unet, tmp_path / "unet"))
    assert plain.state_dict().keys() == tiny_unet().state_dict().keys()
    torch.testing.assert_close(predict(plain.eval()), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("change", [{"use_dora": True}, {"dropout": 0.1}, {"init": "gaussian"}, {"init_from": "x"}])
def test_what_only_lora_has_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="adapter.kind=loha has no"):
        check(Config(run_dir="x", adapter=AdapterConfig(kind="loha", **change)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adapter.kind=qlora"):
        check(Config(run_dir="x", adapter=AdapterConfig(kind="qlora")))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (AdapterConfig(kind="loha", targets=["conv", "text_encoder"]), "which adapter.kind=loha does not train"),
        (AdapterConfig(full_finetune=True, kind="lokr"), "trains the UNet itself"),
        (AdapterConfig(full_finetune=True, use_dora=True), "trains the UNet itself"),
        (AdapterConfig(full_finetune=True, dropout=0.1), "trains the UNet itself"),
    ],
    ids=["text", "kind", "dora", "dropout"],
)
def test_what_would_be_left_untrained_or_unsaved_is_refused(adapter: AdapterConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(Config(run_dir="x", adapter=adapter))


def test_textual_inversion_reads_one_caption_a_photo() -> None:
    cfg = Config(run_dir="x", adapter=AdapterConfig(kind="textual_inversion"))
    cfg.enhancement.enabled = False
    check(cfg)
    cfg.data.captions.shuffles = 2
    with pytest.raises(ConfigError, match="one caption a photo"):
        check(cfg)
