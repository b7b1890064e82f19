"""SD 1.x, 2.x and XL, from folders and single files: diffusers' tensors, and at full size the known counts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from family_models import write_backbone, write_single_file
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_dae.adapter.inject import layer_ranks
from lora_dae.backbone.family import unet_family
from lora_dae.backbone.hub import REPOSITORIES
from lora_dae.backbone.layout import CONFIGS, inspect_backbone
from lora_dae.backbone.load import encode_batch, load_backbone
from lora_dae.backbone.parts import clip_vocabulary, load_tokenizer
from lora_dae.backbone.pooled import pooled_width, unpack
from lora_dae.config import AdapterConfig, BackboneConfig, ConfigError
from lora_dae.diffusion import alpha_sigma

FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: write_backbone(root / family, family) for family in FAMILY}


def config(path: Path, **settings: object) -> BackboneConfig:
    return BackboneConfig(name="folder", path=str(path), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILY)
def test_family_is_that_of_the_weights(family: str, folders: dict[str, Path]) -> None:
    assert inspect_backbone(config(folders[family])).family == FAMILY[family]


@pytest.mark.parametrize("family", FAMILY)
def test_single_file_gives_the_folders_tensors(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """By diffusers' own converters, with no hub: names, transposes and OpenCLIP's joined projections."""
    file = write_single_file(tmp_path / "any_name.safetensors", folders[family])
    ours = load_backbone(BackboneConfig(name="file", path=str(file), configs=str(folders[family])))
    expected = load_backbone(config(folders[family]))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        one, other = getattr(ours, part), getattr(expected, part)
        if other is None:
            assert one is None
            continue
        states = one.state_dict(), other.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[1]), part
    assert ours.folder.family == FAMILY[family]
    assert torch.equal(ours.encode_text(["a red dress"]), expected.encode_text(["a red dress"]))


def test_sdxl_text_is_that_of_its_pipeline(folders: dict[str, Path]) -> None:
    backbone = load_backbone(config(folders["sdxl"]))
    pipe = StableDiffusionXLPipeline.from_pretrained(folders["sdxl"])
    captions = ["a red dress", "a blue shirt"]
    text, null, pooled, null_pooled = pipe.encode_prompt(captions, None, "cpu", 1, True)
    width = pooled_width(backbone.unet.config)
    packed = backbone.encode_text(["", *captions])
    assert packed.shape == (3, backbone.text_length, 24)
    ours, ours_pooled = unpack(packed, width)
    torch.testing.assert_close(ours[1:], text, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours_pooled[1:], pooled, rtol=0, atol=1e-6)
    assert torch.equal(ours[:1], null[:1]) and torch.equal(ours_pooled[:1], null_pooled[:1])  # zeros, as published


def test_sdxl_unet_takes_the_packed_text(folders: dict[str, Path]) -> None:
    """Equal to diffusers' call with pooled text and (32, 32, 0, 0, 32, 32)."""
    backbone = load_backbone(config(folders["sdxl"]))
    packed = backbone.encode_text(["a red dress", "a blue shirt"])
    text, pooled = unpack(packed, pooled_width(backbone.unet.config))
    sample, sizes = torch.randn(2, 4, 16, 16), torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    with torch.no_grad():
        ours = backbone.unet(sample, 500, encoder_hidden_states=packed, return_dict=False)[0]
        added = {"text_embeds": pooled, "time_ids": sizes}
        expected = backbone.unet(sample, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", FAMILY)
def test_noise_schedule_is_normalized(family: str, folders: dict[str, Path]) -> None:
    """alpha^2 + sigma^2 = 1 at every timestep, also where the folder's scheduler is Euler's."""
    scheduler = load_backbone(config(folders[family])).scheduler
    alpha, sigma = alpha_sigma(scheduler, torch.arange(1000), torch.zeros(1000, 1, 1, 1))
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(alpha))
    assert float(alpha[0]) == pytest.approx(math.sqrt(1 - 0.00085), abs=1e-6)


@pytest.mark.parametrize("family", FAMILY)
def test_zero_terminal_snr(family: str, folders: dict[str, Path]) -> None:
    settings = {"prediction_type": "v_prediction", "zero_terminal_snr": True}
    scheduler = load_backbone(config(folders[family], **settings)).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert float(scheduler.alphas_cumprod[-1]) == 0
    scheduler.set_timesteps(4)
    assert int(scheduler.timesteps[0]) == 999
    with pytest.raises(ConfigError, match="predicts v"):
        inspect_backbone(config(folders[family], zero_terminal_snr=True))


def test_zero_terminal_snr_can_be_switched_off(tmp_path: Path) -> None:
    """Then the last level is that of Stable Diffusion's own betas: about 0.0047 of the signal's power is left."""
    path = write_backbone(tmp_path / "sd21", "sd21", "v_prediction")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True}))
    assert float(load_backbone(config(path)).scheduler.alphas_cumprod[-1]) == 0
    plain = load_backbone(config(path, zero_terminal_snr=False)).scheduler
    assert float(plain.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)


def test_another_vae(folders: dict[str, Path], tiny_backbone: Path, tmp_path: Path) -> None:
    other = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, scaling_factor=0.5)
    other.save_pretrained(tmp_path / "vae")
    cfg = config(folders["sd15"], vae_path=str(tmp_path / "vae"))
    assert load_backbone(cfg).vae.config["scaling_factor"] == 0.5
    assert load_backbone(cfg).fingerprint != load_backbone(config(folders["sd15"])).fingerprint
    with pytest.raises(ConfigError, match="takes 4 channels but its VAE gives 8"):
        inspect_backbone(config(folders["sd15"], vae_path=str(tiny_backbone / "vae")))
    with pytest.raises(ConfigError, match="made for this backbone's latents"):
        inspect_backbone(config(folders["sd15"], vae_path=str(tiny_backbone / "vae")))
    with pytest.raises(ConfigError, match="there is no VAE in .*nowhere"):
        inspect_backbone(config(folders["sd15"], vae_path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(("side", "photos"), [(128, 16), (256, 16), (512, 4), (768, 1), (1024, 1)])
def test_large_photos_pass_the_vae_in_small_batches(side: int, photos: int) -> None:
    assert encode_batch(side * side) == photos


def test_half_precision_weights(folders: dict[str, Path]) -> None:
    backbone = load_backbone(config(folders["sd15"], weights="bf16"))
    assert {p.dtype for p in backbone.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in backbone.vae.parameters()} == {torch.float32}


def test_pickles_are_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "model.ckpt")
    with pytest.raises(ConfigError, match="is a pickle.*from_single_file of diffusers"):
        inspect_backbone(BackboneConfig(name="file", path=str(tmp_path / "model.ckpt")))


def test_hub_without_connection_or_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="stable-diffusion-xl-base-1.0 is not in the cache .*backbone.path"):
        inspect_backbone(BackboneConfig(name="sdxl"))


def test_hub_model_from_the_cache(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its pinned revision, without a connection."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, revision = REPOSITORIES["sd15"]
    snapshot = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / revision
    shutil.copytree(folders["sd15"], snapshot)
    assert inspect_backbone(BackboneConfig(name="sd15")).path == snapshot
    with pytest.raises(ConfigError, match="is not in the cache"):
        inspect_backbone(BackboneConfig(name="sd15", revision="0" * 40))


def test_damaged_backbones(folders: dict[str, Path], tmp_path: Path) -> None:
    file = write_single_file(tmp_path / "x.safetensors", folders["sd15"])
    whole = file.read_bytes()
    cfg = BackboneConfig(name="file", path=str(file), configs=str(folders["sd15"]))
    file.write_bytes(whole[:-100])
    with pytest.raises(ConfigError, match="is cut off"):
        inspect_backbone(cfg)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        inspect_backbone(cfg)
    file.write_bytes(whole)
    state = load_file(file)
    name = next(key for key in state if key.startswith("model.diffusion_model.") and key.endswith("to_q.weight"))
    save_file({**state, name: torch.full_like(state[name], float("nan"))}, file)
    with pytest.raises(ConfigError, match="are not finite"):
        load_backbone(cfg)
    del state[name]
    save_file(state, file)
    with pytest.raises(ConfigError, match="lack 1 tensors|cannot be loaded"):
        load_backbone(cfg)
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match="holds no UNet"):
        inspect_backbone(cfg)


def test_single_file_without_its_familys_configs(folders: dict[str, Path], tmp_path: Path) -> None:
    """The packaged configs are of the full size; a tiny file does not fit them, and is told so before loading."""
    file = write_single_file(tmp_path / "x.safetensors", folders["sd21"])
    with pytest.raises(ConfigError, match="no plain SD 2.x .* 4 -> 8 channels, expected 4 -> 320"):
        inspect_backbone(BackboneConfig(name="file", path=str(file), prediction_type="v_prediction"))


def test_checkpoint_of_sd2_has_to_be_told_what_it_predicts(folders: dict[str, Path], tmp_path: Path) -> None:
    """The base models and those of 768 pixels have weights of the same names and shapes."""
    file = write_single_file(tmp_path / "x.safetensors", folders["sd21"])
    with pytest.raises(ConfigError, match="does not say what it predicts: set backbone.prediction_type=epsilon"):
        inspect_backbone(BackboneConfig(name="file", path=str(file)))


@pytest.mark.parametrize(
    ("part", "file", "content", "message"),
    [
        ("tokenizer", "vocab.json", None, "has no vocab.json"),
        ("tokenizer", "merges.txt", None, "has no merges.txt"),
        (
            "tokenizer_2",
            "tokenizer_config.json",
            None,
            "tokenizer_2 has no tokenizer_config.json",
        ),  # 77 tokens are said there
        ("tokenizer", "vocab.json", b"{", "cannot be read"),
        ("tokenizer_2", "merges.txt", b"\x00\xff a", "tokenizer_2 cannot be read"),
    ],
)
def test_tokenizer_that_is_not_whole(
    part: str, file: str, content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any weight is loaded."""
    path = write_backbone(tmp_path / "copy", "sdxl")
    (path / part / file).unlink()
    if content is not None:
        (path / part / file).write_bytes(content)

    def load(*args: object) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr("lora_dae.backbone.load.load_part", load)
    with pytest.raises(ConfigError, match=f"{message}.* from the model's source"):
        load_backbone(config(path))


def test_clip_vocabulary_is_the_real_one() -> None:
    """As every CLIP has it: 'a diagram' is 49406 320 22697 49407."""
    vocabulary, merges = clip_vocabulary()
    assert (len(vocabulary), len(merges)) == (49408, 48894)
    assert [vocabulary[t] for t in ("<|startoftext|>", "a</w>", "diagram</w>", "<|endoftext|>")] == [
        49406, 320, 22697, 49407,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "part", "padding"),
    [("sd1", "tokenizer", 49407), ("sd2", "tokenizer", 0), ("sdxl", "tokenizer", 49407), ("sdxl", "tokenizer_2", 0)],
)
def test_checkpoints_get_their_familys_tokenizer(family: str, part: str, padding: int, tmp_path: Path) -> None:
    """Of the package: 77 tokens, padded as published (CLIP with its end mark, OpenCLIP with 0)."""
    told = {"path": CONFIGS / family, "single_file": tmp_path / "x.safetensors"}
    tokenizer = load_tokenizer(SimpleNamespace(**told), part)  # type: ignore[arg-type]
    tokens = tokenizer(["a diagram"], padding="max_length", max_length=tokenizer.model_max_length).input_ids[0]
    assert tokens == [49406, 320, 22697, 49407, *[padding] * 73]


def full_unet(family: str) -> UNet2DConditionModel:
    """Of the published size, on the meta device."""
    with init_empty_weights():
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / family / "unet"))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_full_size_unets(family: str) -> None:
    """The published parameter counts, and the adapter's by the closed form r (in + out)."""
    unet = full_unet(family)
    assert count(unet) == {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[family]
    assert unet_family({n: p.shape for n, p in unet.named_parameters()}) == family
    ranks = layer_ranks(unet, AdapterConfig(["cross_attention"], rank=16))
    total = sum(
        16 * (layer.in_features + layer.out_features)
        for layer in map(unet.get_submodule, ranks)  # type: ignore[misc]
    )
    config, text = unet.config, unet.config["cross_attention_dim"]
    depths = config["transformer_layers_per_block"]
    widths = config["block_out_channels"]
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    expected = 0
    for width, depth, kind in zip(widths, depths, config["down_block_types"], strict=True):
        if "CrossAttn" in kind:  # two blocks down, three up; q and out are square, k and v read the text
            expected += (2 + 3) * depth * 16 * (4 * width + 2 * (text + width))
    expected += depths[-1] * 16 * (4 * widths[-1] + 2 * (text + widths[-1]))
    assert total == expected


def test_full_size_text_encoders_and_vae() -> None:
    sizes = {("sd1", "text_encoder"): 123_060_480, ("sd2", "text_encoder"): 340_387_840,
             ("sdxl", "text_encoder"): 123_060_480, ("sdxl", "text_encoder_2"): 694_659_840}  # fmt: skip
    for (family, part), expected in sizes.items():
        settings = CLIPTextConfig.from_dict(json.loads((CONFIGS / family / part / "config.json").read_text()))
        model = CLIPTextModelWithProjection if part.endswith("2") else CLIPTextModel
        with init_empty_weights():
            assert count(model(settings)) == expected, (family, part)
    with init_empty_weights():
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "sdxl" / "vae"))
    assert count(vae) == 83_653_863


def test_pipelines_of_diffusers_load_the_tiny_folders(folders: dict[str, Path]) -> None:
    """So what the tests here call a backbone is one to diffusers as well."""
    pipe = StableDiffusionPipeline.from_pretrained(folders["sd15"])
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a dress", num_inference_steps=2, height=32, width=32, output_type="np").images.shape == (1, 32, 32, 3)
