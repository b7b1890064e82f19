"""The kohya file draws the same in LyCORIS and in plain diffusers as the training model does: names, alpha, DoRA."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_models import predict, randomize, tiny_unet
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from test_adapter_files import CASES

from lora_dae.adapter.atomic import save_tensors
from lora_dae.adapter.files import merged_unet, save_adapter
from lora_dae.adapter.inject import inject
from lora_dae.adapter.kohya import from_kohya, known_names, kohya_metadata, to_kohya
from lora_dae.adapter.peft_layout import from_peft, to_peft
from lora_dae.adapter.weights import LoraWeights, cast, resize
from lora_dae.config import ConfigError

FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
# PEFT holds a linear layer's magnitude as (out,), ComfyUI and LyCORIS as (out, 1): diffusers cannot take the latter.
PLAIN_CASES = [case for case in CASES if case != "dora"]


def trained(case: str, family: str, kernel: str = "fused") -> UNet2DConditionModel:
    unet = tiny_unet(family)
    inject(unet, replace(CASES[case], kernel=kernel))
    randomize(unet)
    return unet.eval()


def layers_of(unet: UNet2DConditionModel, folder: Path) -> dict[str, LoraWeights]:
    """By way of the saved file, as an export goes."""
    file = save_adapter(unet, folder / "peft.safetensors")
    with safe_open(file, framework="pt") as opened:
        return from_peft(load_file(file), opened.metadata(), str(file))


def kohya_file(unet: UNet2DConditionModel, family: str, folder: Path) -> Path:
    layers = layers_of(unet, folder)
    header = kohya_metadata(layers, FAMILY[family], title="test", resolution=64)
    return save_tensors(to_kohya(layers, FAMILY[family], unet.config), folder / "kohya.safetensors", header)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("case", PLAIN_CASES)
@pytest.mark.parametrize(("kernel", "atol"), [("peft", 1e-6), ("fused", 1e-5)])  # fused: sums in another order
def test_diffusers_reads_the_kohya_file(kernel: str, atol: float, case: str, family: str, tmp_path: Path) -> None:
    """Its own kohya import, on every mixture of ranks and alphas; largest difference 1e-6."""
    unet = trained(case, family, kernel)
    file = kohya_file(unet, family, tmp_path)
    fresh = tiny_unet(family)
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    state, alphas = pipeline.lora_state_dict(str(file), unet_config=fresh.config)
    pipeline.load_lora_into_unet(state, alphas, fresh)
    expected, base = predict(unet, family=family), predict(tiny_unet(family), family=family)
    torch.testing.assert_close(predict(fresh.eval(), family=family), expected, rtol=0, atol=atol)
    assert (expected - base).abs().mean() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_lycoris_reads_the_kohya_file(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that defined ``dora_scale`` and LoRA for convolutions, on its own code."""
    wrapper = pytest.importorskip("lycoris.wrapper", reason="lycoris-lora (extra dev) is not installed")
    monkeypatch.setattr(wrapper.LycorisNetwork, "LORA_PREFIX", "lora_unet")
    unet = trained(case, "sd15")
    file = kohya_file(unet, "sd15", tmp_path)
    fresh = tiny_unet("sd15")
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(file), fresh)
    assert len(network.loras) == len(layers_of(unet, tmp_path))
    network.apply_to()
    torch.testing.assert_close(predict(fresh), predict(unet), rtol=0, atol=1e-5)


@pytest.mark.parametrize("part", ["attentions.0.transformer_blocks.0.attn2.to_q", "resnets.0.conv1"])
def test_comfyui_reads_dora_otherwise_than_it_was_trained(part: str, tmp_path: Path) -> None:
    """It and Forge divide ``dora_scale`` by the row norms of W (comfy/weight_adapter/base.py), LyCORIS by W + dW's."""
    unet, name = trained("dora", "sd15"), f"mid_block.{part}"
    state, key = load_file(kohya_file(unet, "sd15", tmp_path)), f"lora_unet_{name}".replace(".", "_")
    weight, expected = (model.get_submodule(name).weight.detach() for model in (tiny_unet("sd15"), merged_unet(unet)))
    down, up, scale = (state[f"{key}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "dora_scale"))
    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * state[f"{key}.alpha"] / down.shape[0]

    def norms(matrix: torch.Tensor) -> torch.Tensor:
        return matrix.flatten(1).norm(dim=1).reshape(scale.shape)

    lycoris, comfyui = ((weight + delta) * scale / norms(matrix) for matrix in (weight + delta, weight))
    torch.testing.assert_close(lycoris, expected, rtol=0, atol=1e-5)
    assert (comfyui - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize("family", FAMILY)
def test_every_name_of_a_unet_is_known_once(family: str) -> None:
    """The map back is one to one: no two modules share a kohya name."""
    names = known_names({"unet": tiny_unet(family)}, FAMILY[family])
    layers = [n for n, m in tiny_unet(family).named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert sorted(set(names.values())) == sorted(f"unet.{name}" for name in layers)
    assert len(names) == len(layers) * (2 if family == "sdxl" else 1)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("case", ["everything", "dora", "rslora"])
def test_there_and_back_is_exact(case: str, family: str, tmp_path: Path) -> None:
    unet = trained(case, family)
    layers = layers_of(unet, tmp_path)
    names = known_names({"unet": unet}, FAMILY[family])
    back = from_kohya(load_file(kohya_file(unet, family, tmp_path)), names, "file")
    again = from_peft(*to_peft(back), "file")
    assert layers.keys() == back.keys() == again.keys()
    for name, layer in layers.items():
        for other in (back[name], again[name]):
            assert torch.equal(layer.down, other.down) and torch.equal(layer.up, other.up)
            assert other.alpha == pytest.approx(layer.alpha, rel=1e-6)
            assert (layer.magnitude is None) == (other.magnitude is None)
            assert layer.magnitude is None or torch.equal(layer.magnitude, other.magnitude)  # type: ignore[arg-type]


def test_names_are_kohyas_own() -> None:
    """As they stand in files that sd-scripts wrote for SD 1.5 and SDXL."""
    sdxl = {"layers_per_block": 2, "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
    zero = LoraWeights(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)

    def name(module: str, family: str) -> str:
        return next(iter(to_kohya({module: zero}, family, sdxl))).split(".")[0]

    block = "transformer_blocks.0.attn2.to_q"
    assert name(f"unet.down_blocks.1.attentions.0.{block}", "sd1") == (
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"
    )
    for module, expected in {
        f"down_blocks.1.attentions.0.{block}": "input_blocks_4_1_transformer_blocks_0_attn2_to_q",
        f"down_blocks.2.attentions.1.{block}": "input_blocks_8_1_transformer_blocks_0_attn2_to_q",
        f"mid_block.attentions.0.{block}": "middle_block_1_transformer_blocks_0_attn2_to_q",
        f"up_blocks.1.attentions.2.{block}": "output_blocks_5_1_transformer_blocks_0_attn2_to_q",
        "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "up_blocks.2.resnets.0.time_emb_proj": "output_blocks_6_0_emb_layers_1",
    }.items():
        assert name(f"unet.{module}", "sdxl") == f"lora_unet_{expected}"
    text = "encoder.layers.3.self_attn.q_proj"
    assert name(f"text_encoder.{text}", "sd1") == "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    assert name(f"text_encoder_2.{text}", "sdxl") == "lora_te2_text_model_encoder_layers_3_self_attn_q_proj"


def test_header_says_what_a_tool_asks_for(tmp_path: Path) -> None:
    unet = trained("attention_conv", "sdxl")
    with safe_open(kohya_file(unet, "sdxl", tmp_path), framework="pt") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "8")
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1"}


def test_half_precision_keeps_the_scale_exact(tmp_path: Path) -> None:
    layers = cast(layers_of(trained("rslora", "sd15"), tmp_path), "fp16")
    alphas = [v for k, v in to_kohya(layers, "sd1", {}).items() if k.endswith(".alpha")]
    assert all(alpha.dtype == torch.float32 for alpha in alphas)
    assert {layer.down.dtype for layer in layers.values()} == {torch.float16}
    with pytest.raises(ConfigError, match="dtype=int4"):
        cast(layers, "int4")


def test_values_that_half_precision_cannot_hold_are_refused() -> None:
    layer = LoraWeights(torch.full((1, 2), 1e6), torch.zeros(2, 1), 1.0)
    with pytest.raises(ConfigError, match=r"unet\.x are not finite in fp16"):
        cast({"unet.x": layer}, "fp16")


def test_resize_is_the_truncated_svd_of_the_whole_change(tmp_path: Path) -> None:
    layers = layers_of(trained("attention_conv", "sd15"), tmp_path)
    small, kept = resize(layers, 2)
    error = total = 0.0
    for name, layer in layers.items():
        assert small[name].rank == min(2, layer.rank)
        matrix = layer.delta().flatten(1)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        torch.testing.assert_close(small[name].delta().flatten(1), best, rtol=0, atol=1e-5)
        error += float((matrix - best).square().sum())
        total += float(matrix.square().sum())
    assert kept == pytest.approx(1 - error / total, abs=1e-6)
    assert 0.3 < kept < 1
    same, whole = resize(layers, 64)
    assert whole == pytest.approx(1) and all(same[name] is layers[name] for name in layers)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("lora_unet_conv_in.hada_w1_a", (4, 4), "no LoHa"),
        ("lora_unet_conv_in.lora_mid.weight", (4, 4, 3, 3), "Tucker"),
        ("lora_unet_conv_in.lora_down.weight", (4, 4, 3, 3), "one half of lora_unet_conv_in"),
    ],
)
def test_other_kinds_are_refused(key: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_kohya({key: torch.zeros(shape)}, {}, "file")
