"""A saved adapter makes plain diffusers draw what the training model draws, and not what the base draws."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_models import draw, plain_pipeline, predict, randomize, tiny_unet
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_dae.adapter.files import FILE_NAME, load_adapter, merged_unet, save_adapter, save_merged
from lora_dae.adapter.inject import inject, make_full_finetune, trainable_parameters
from lora_dae.adapter.source_input import attach_source_input
from lora_dae.config import AdapterConfig, ConfigError

ATTENTION_CONV = ["cross_attention", "conv"]
EVERYTHING = ["cross_attention", "self_attention", "feed_forward", "conv", "conv_in", "conv_out"]
CASES = {
    "attention": AdapterConfig(["cross_attention"], rank=4, alpha=2),
    "attention_conv": AdapterConfig(ATTENTION_CONV, rank=4, alpha=8, conv_rank=3, conv_alpha=1),
    "with_conv_in": AdapterConfig([*ATTENTION_CONV, "conv_in"], rank=4, alpha=8, conv_rank=3),
    "everything": AdapterConfig(EVERYTHING, rank=4, conv_rank=2, conv_alpha=5),
    "dora": AdapterConfig(ATTENTION_CONV, rank=4, conv_rank=3, conv_alpha=1, use_dora=True),
    "rslora": AdapterConfig(ATTENTION_CONV, rank=4, alpha=8, conv_rank=3, use_rslora=True),
    "dropout": AdapterConfig(ATTENTION_CONV, rank=4, dropout=0.5),
}


def trained(cfg: AdapterConfig, channels: int = 4) -> UNet2DConditionModel:
    unet = tiny_unet(channels=channels)
    inject(unet, cfg)
    randomize(unet)
    return unet.eval()


@pytest.mark.parametrize(
    ("case", "channels"), [*((case, 4) for case in CASES), ("attention_conv", 8), ("with_conv_in", 8)]
)
@pytest.mark.parametrize(("kernel", "atol"), [("peft", 1e-6), ("fused", 5e-5)])  # fused: sums in another order
def test_plain_pipeline_draws_what_the_training_model_draws(
    kernel: str, atol: float, case: str, channels: int, tmp_path: Path
) -> None:
    unet = trained(replace(CASES[case], kernel=kernel), channels)
    base = draw(plain_pipeline(tiny_unet(channels=channels)))
    expected = draw(plain_pipeline(unet))
    file = save_adapter(unet, tmp_path)
    assert file == tmp_path / FILE_NAME
    for source in (tmp_path, file):
        pipeline = plain_pipeline(tiny_unet(channels=channels))
        pipeline.load_lora_weights(source)
        torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=atol)
    assert (expected - base).abs().mean() > 0.1


@pytest.mark.parametrize("case", CASES)
def test_load_adapter_restores_every_weight_and_freezes(case: str, tmp_path: Path) -> None:
    unet = trained(CASES[case])
    save_adapter(unet, tmp_path, {"backbone": "studio"})
    fresh = tiny_unet()
    assert load_adapter(fresh, tmp_path) == {"backbone": "studio"}
    loaded = dict(fresh.named_parameters())
    for name, parameter in trainable_parameters(unet).items():
        assert torch.equal(loaded[name], parameter), name
    assert not trainable_parameters(fresh)
    assert torch.equal(predict(fresh.eval()), predict(unet))


@pytest.mark.parametrize("unused", [None, False, {}], ids=str)
def test_files_whose_header_names_all_of_peft_are_read(unused: object, tmp_path: Path) -> None:
    """As they once were written; also by a younger PEFT, with settings that this one does not know and none uses."""
    unet = trained(CASES["attention_conv"])
    file = save_adapter(unet, tmp_path)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    everything = {f"unet.{name}": value for name, value in unet.peft_config["default"].to_dict().items()}
    told = {**everything, **json.loads(header[LORA_ADAPTER_METADATA_KEY]), "unet.of_a_younger_peft": unused}
    assert "unet.peft_type" in told
    old = tmp_path / "old.safetensors"
    save_file(load_file(file), old, {**header, LORA_ADAPTER_METADATA_KEY: json.dumps(told)})
    fresh = tiny_unet()
    load_adapter(fresh, old)
    assert torch.equal(predict(fresh.eval()), predict(unet))


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_file_round_trip_on_other_families(family: str, tmp_path: Path) -> None:
    unet = tiny_unet(family)
    inject(unet, CASES["with_conv_in"])
    randomize(unet)
    fresh = tiny_unet(family)
    load_adapter(fresh, save_adapter(unet, tmp_path / "a.safetensors"))
    assert torch.equal(predict(fresh.eval(), family=family), predict(unet.eval(), family=family))


def test_channels_last_weights_are_saved_alike(tmp_path: Path) -> None:
    unet = trained(CASES["attention_conv"])
    first = load_file(save_adapter(unet, tmp_path / "a.safetensors"))
    second = load_file(save_adapter(unet.to(memory_format=torch.channels_last), tmp_path / "b.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_file_holds_the_adapter_alone(tmp_path: Path) -> None:
    """A source input has a file of its own, so that the LoRA file stays loadable elsewhere."""
    unet = tiny_unet()
    attach_source_input(unet)
    inject(unet, CASES["attention_conv"])
    with safe_open(save_adapter(unet, tmp_path, {"seed": "3"}), framework="pt") as opened:
        keys, header = list(opened.keys()), opened.metadata()
    assert all(key.startswith("unet.") and ".lora_" in key for key in keys)
    assert header["seed"] == "3"


@pytest.mark.parametrize("case", CASES)
def test_merged_folder_is_a_plain_unet_that_predicts_the_same(case: str, tmp_path: Path) -> None:
    unet = trained(CASES[case])
    before = predict(unet)
    plain = UNet2DConditionModel.from_pretrained(save_merged(unet, tmp_path / "unet"))
    assert plain.state_dict().keys() == tiny_unet().state_dict().keys()
    torch.testing.assert_close(predict(plain.eval()), before, rtol=0, atol=1e-4)
    assert torch.equal(predict(unet), before)  # the training model is left alone


def test_merged_unet_takes_the_source_in_a_wider_conv_in(tmp_path: Path) -> None:
    unet = tiny_unet()
    attach_source_input(unet)
    inject(unet, CASES["with_conv_in"])
    randomize(unet)
    plain = UNet2DConditionModel.from_pretrained(save_merged(unet.eval(), tmp_path)).eval()
    assert plain.config["in_channels"] == 8 and unet.config["in_channels"] == 4
    torch.testing.assert_close(predict(plain, channels=8), predict(unet, channels=8), rtol=0, atol=1e-4)


def test_full_finetune_is_saved_as_a_plain_unet(tmp_path: Path) -> None:
    unet = tiny_unet()
    make_full_finetune(unet)
    randomize(unet, std=0.01)
    plain = UNet2DConditionModel.from_pretrained(save_merged(unet.eval(), tmp_path)).eval()
    assert torch.equal(predict(plain), predict(unet))


def test_merge_refuses_weights_that_are_not_finite() -> None:
    unet = trained(CASES["attention"])
    next(iter(trainable_parameters(unet).values())).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        merged_unet(unet)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no adapter at"):
        load_adapter(tiny_unet(), tmp_path)


def test_pickle_is_refused(tmp_path: Path) -> None:
    torch.save({"unet.conv_in.lora_A.weight": torch.zeros(1)}, tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        load_adapter(tiny_unet(), tmp_path)


def test_file_without_lora_weights(tmp_path: Path) -> None:
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="holds no LoRA weights"):
        load_adapter(tiny_unet(), tmp_path)


@pytest.mark.parametrize(
    "key",
    ["lora_unet_conv_in.lora_down.weight", "unet.conv_in.lora.down.weight", "unet.conv_in.lora_A.weight"],
)
def test_other_layouts_are_named_as_such(key: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(1, 4, 3, 3)}, tmp_path / FILE_NAME)
    with pytest.raises(ConfigError, match="LoRA file of another layout"):
        load_adapter(tiny_unet(), tmp_path)


def test_adapter_of_another_backbone(tmp_path: Path) -> None:
    save_adapter(trained(CASES["with_conv_in"], channels=8), tmp_path)
    with pytest.raises(ConfigError, match=r"does not fit conv_in of this backbone .*load the backbone"):
        load_adapter(tiny_unet(channels=4), tmp_path)


def test_adapter_of_a_deeper_backbone(tmp_path: Path) -> None:
    unet = tiny_unet("sdxl")
    inject(unet, CASES["attention"])
    save_adapter(unet, tmp_path)
    fresh = tiny_unet("sd15")
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ConfigError, match="which this backbone does not have"):
        load_adapter(fresh, tmp_path)
    assert fresh.state_dict().keys() == before.keys()


def test_nothing_to_save_and_nothing_to_replace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter to save"):
        save_adapter(tiny_unet(), tmp_path)
    unet = trained(CASES["attention"])
    with pytest.raises(ConfigError, match="already carries an adapter"):
        load_adapter(unet, save_adapter(unet, tmp_path))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_half_precision_backbone_draws_what_it_was_trained_to(dora: bool, tmp_path: Path) -> None:
    """Its adapter is float32, in the file and after loading: every bit of the training model's output."""

    def half() -> UNet2DConditionModel:
        return tiny_unet().to(torch.bfloat16)

    unet = half()
    inject(unet, AdapterConfig(["cross_attention", "conv"], rank=2, use_dora=dora))
    randomize(unet)
    file = save_adapter(unet, tmp_path)
    loaded = half()
    load_adapter(loaded, file)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(loaded.eval()), predict(unet.eval()))
