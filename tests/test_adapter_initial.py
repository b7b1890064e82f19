"""Starting from a LoRA of others: the injected UNet draws what the file draws, or one sentence says why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_models import predict, tiny_unet
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_adapter_files import ATTENTION_CONV, CASES
from test_adapter_kohya import FAMILY, kohya_file, trained

from lora_dae.adapter.files import save_adapter
from lora_dae.adapter.initial import initialize
from lora_dae.adapter.inject import inject
from lora_dae.config import AdapterConfig, ConfigError


def injected(cfg: AdapterConfig, family: str = "sd15") -> UNet2DConditionModel:
    unet = tiny_unet(family)
    inject(unet, cfg)
    return unet.eval()


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("case", ["attention_conv", "everything", "dora"])
def test_begins_where_the_file_ended(case: str, layout: str, family: str, tmp_path: Path) -> None:
    """Also under another rank and scale of our own."""
    unet = trained(case, family)
    file = kohya_file(unet, family, tmp_path) if layout == "kohya" else save_adapter(unet, tmp_path / "a.safetensors")
    ours = injected(replace(CASES[case], rank=6, alpha=3, conv_rank=4, conv_alpha=11), family)
    table = initialize(ours, file)
    torch.testing.assert_close(predict(ours, family=family), predict(unet, family=family), rtol=1e-5, atol=2e-6)
    assert "cross_attention" in table and "left out" in table


def test_old_diffusers_names_without_a_header(tmp_path: Path) -> None:
    """``attn2.processor.to_q_lora.down.weight``, as diffusers wrote it in 2023; alpha is the rank."""
    unet = injected(AdapterConfig(["cross_attention"], rank=2))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    state = {}
    for key, value in load_file(save_adapter(unet, tmp_path / "a.safetensors")).items():
        module, _, part = key.partition(".lora_")
        layer, _, projection = module.removesuffix(".0").rpartition(".")
        direction = "down" if part.startswith("A") else "up"
        state[f"{layer}.processor.{projection}_lora.{direction}.weight"] = value
    save_file(state, tmp_path / "old.safetensors")
    ours = injected(AdapterConfig(["cross_attention"], rank=2))
    initialize(ours, tmp_path / "old.safetensors")
    torch.testing.assert_close(predict(ours), predict(unet), rtol=0, atol=1e-6)


def test_layers_that_do_not_train_here_are_named_or_left_out(tmp_path: Path) -> None:
    file = kohya_file(trained("attention_conv", "sd15"), "sd15", tmp_path)
    attention = AdapterConfig(["cross_attention"], rank=4)
    with pytest.raises(ConfigError, match=r"layers in .* do not train here \(unet\..*allow_partial=true"):
        initialize(injected(attention), file)
    ours = injected(attention)
    assert "left out" in initialize(ours, file, allow_partial=True)
    assert not torch.equal(predict(ours), predict(tiny_unet()))


def test_layers_that_no_group_means_are_named_as_such(tmp_path: Path) -> None:
    """kohya's default LoRA trains proj_in and proj_out as well: adapter.targets cannot ask for them."""
    file = kohya_file(trained("attention", "sd15"), "sd15", tmp_path)
    state = load_file(file)
    for name in ("proj_in", "proj_out"):
        weight = tiny_unet().get_submodule(f"mid_block.attentions.0.{name}").weight
        base = f"lora_unet_mid_block_attentions_0_{name}"
        state[f"{base}.lora_down.weight"] = torch.zeros(4, *weight.shape[1:])
        state[f"{base}.lora_up.weight"] = torch.zeros(weight.shape[0], 4, *[1] * (weight.ndim - 2))
    save_file(state, tmp_path / "default.safetensors")
    both = r"2 of them \(proj_in, proj_out\) are in no group of adapter.targets: leave these out .*allow_partial=true"
    with pytest.raises(ConfigError, match=both):
        initialize(injected(CASES["attention"]), tmp_path / "default.safetensors")
    assert "left out" in initialize(injected(CASES["attention"]), tmp_path / "default.safetensors", allow_partial=True)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""], ids=["peft", "bare"])
def test_the_layout_of_peft_itself_is_named_as_such(prefix: str, tmp_path: Path) -> None:
    """As save_pretrained of PEFT writes it, and without any prefix."""
    file = save_adapter(trained("attention", "sd15"), tmp_path / "a.safetensors")
    state = {prefix + name.removeprefix("unet."): value for name, value in load_file(file).items()}
    save_file(state, tmp_path / "peft.safetensors")
    with pytest.raises(ConfigError, match="is in PEFT's own layout .*save_lora_weights"):
        initialize(injected(CASES["attention"]), tmp_path / "peft.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, r"has rank 4 at .*set adapter.rank=4"),
        ({"conv_rank": 2}, r"has rank 3 at .*set adapter.conv_rank=3"),
        ({"use_dora": True}, "set adapter.use_dora=false"),
    ],
)
def test_configs_that_cannot_hold_the_file(change: dict[str, int], message: str, tmp_path: Path) -> None:
    file = kohya_file(trained("attention_conv", "sd15"), "sd15", tmp_path)
    with pytest.raises(ConfigError, match=message):
        initialize(injected(replace(CASES["attention_conv"], **change)), file)  # type: ignore[arg-type]


def test_lora_of_another_family_is_named_as_such(tmp_path: Path) -> None:
    """An SDXL file by kohya's names on SD 1.5, told by the width of its text."""
    down, up = torch.zeros(4, 2048), torch.zeros(640, 4)
    base = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}, tmp_path / "xl.safetensors")
    with pytest.raises(ConfigError, match="another family: it attends to 2048 text features, as SDXL does"):
        initialize(injected(AdapterConfig(ATTENTION_CONV, rank=4)), tmp_path / "xl.safetensors", allow_partial=True)


@pytest.mark.parametrize(("family", "other"), [("sdxl", "sd15"), ("sd15", "sdxl")])
def test_wrong_pairings_are_errors(family: str, other: str, tmp_path: Path) -> None:
    file = kohya_file(trained("everything", family), family, tmp_path)
    with pytest.raises(ConfigError):
        initialize(injected(CASES["everything"], other), file)


def test_damaged_files(tmp_path: Path) -> None:
    file = kohya_file(trained("attention", "sd15"), "sd15", tmp_path)
    whole = file.read_bytes()
    ours = injected(CASES["attention"])
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        initialize(ours, file)
    file.write_bytes(whole)
    state = load_file(file)
    next(iter(v for k, v in state.items() if "lora_up" in k)).fill_(float("nan"))
    save_file(state, file)
    with pytest.raises(ConfigError, match="not finite"):
        initialize(ours, file)
    with pytest.raises(ConfigError, match="may be a pickle"):
        initialize(ours, Path(__file__))
    with pytest.raises(ConfigError, match="does not exist"):
        initialize(ours, tmp_path / "nowhere.safetensors")
