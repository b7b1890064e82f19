"""The backbone is plain diffusers: its folder loads there too, and gives the same tensors."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lora_dae.backbone import layout
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.config import BackboneConfig, ConfigError


@pytest.fixture(scope="module")
def backbone(tiny_backbone: Path) -> Backbone:
    return load_backbone(BackboneConfig(path=str(tiny_backbone)))


@pytest.fixture()
def copied(tiny_backbone: Path, tmp_path: Path) -> Path:
    """A copy of the tiny backbone to damage."""
    return Path(shutil.copytree(tiny_backbone, tmp_path / "copy"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(path: Path, resolution: int | None = None) -> str:
    """What inspecting (no weights read) says against the folder."""
    with pytest.raises(ConfigError) as caught:
        inspect_backbone(BackboneConfig(path=str(path)), resolution)
    return str(caught.value)


def photos(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def test_everything_is_frozen_and_in_eval_mode(backbone: Backbone) -> None:
    for part in (backbone.unet, backbone.vae, backbone.text_encoder):
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_text_embeddings_are_those_of_the_diffusers_pipeline(backbone: Backbone, tiny_backbone: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_backbone)
    captions = ["a red dress", "", "a very " + "long " * 40 + "caption"]
    expected, null = pipe.encode_prompt(captions, "cpu", 1, True)
    assert torch.equal(backbone.encode_text(captions), expected)
    assert torch.equal(backbone.encode_text([""]), null[:1])


def test_pads_to_the_tokenizers_length(backbone: Backbone) -> None:
    assert backbone.encode_text(["a red dress"]).shape == (1, 16, 32)


def test_long_captions_fill_further_windows(backbone: Backbone, tiny_backbone: Path) -> None:
    """Each window is what the plain encoder makes of those words alone; what is short is followed by "" windows."""
    long = load_backbone(BackboneConfig(path=str(tiny_backbone), text_chunks=2))
    words = long.tokenizer(" ".join(["red dress"] * 9), add_special_tokens=False).input_ids
    assert len(words) > 14
    texts = [long.tokenizer.decode(words), "a red dress"]
    encoded = long.encode_text(texts)
    assert encoded.shape == (2, 32, 32)
    parts = [long.tokenizer.decode(words[:14]), long.tokenizer.decode(words[14:28]), "a red dress", ""]
    expected = backbone.encode_text(parts)
    torch.testing.assert_close(encoded.reshape(4, 16, 32), expected)


def test_decode_is_what_the_diffusers_pipeline_does_with_its_last_latents(
    backbone: Backbone, tiny_backbone: Path
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_backbone)
    pipe.set_progress_bar_config(disable=True)

    def draw(output_type: str):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(0)
        return pipe("a dress", num_inference_steps=2, generator=generator, output_type=output_type).images

    ours = backbone.decode(draw("latent")).permute(0, 2, 3, 1).numpy()
    assert ours.shape == (1, 32, 32, 3)
    np.testing.assert_allclose(ours, draw("np"), atol=1e-6)


def test_tiles_are_seen_at_their_seams_alone(tiny_backbone: Path) -> None:
    """diffusers' tiles of TAESD have 512 pixels and overlap in 64: the second one begins at 448, and its rim blends.

    A pixel of this VAE sees less than 8 latents to each side.
    """
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    latents = torch.randn(1, 8, 160, 160, generator=torch.Generator().manual_seed(0))
    plain, tiled = backbone.decode(latents), backbone.decode(latents, tiled=True)
    seam = slice(448, 512)
    same = torch.ones(640, 640, dtype=torch.bool)
    same[seam], same[:, seam] = False, False
    torch.testing.assert_close(tiled[..., same], plain[..., same], atol=1e-5, rtol=1e-4)
    assert (tiled - plain).abs()[..., seam, :].max() > 1e-4  # there were tiles
    assert torch.equal(backbone.decode(latents), plain)  # and are none any more


def test_a_vae_cuts_pictures_of_its_own_size_into_tiles(copied: Path) -> None:
    """diffusers leaves those whole that are no larger than the config's sample_size: of SDXL's VAE 1024 pixels."""
    shutil.rmtree(copied / "vae")
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=1024,
        mid_block_add_attention=False,
    ).save_pretrained(copied / "vae")
    edit(copied / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    backbone = load_backbone(BackboneConfig(path=str(copied)))
    decoded: list[torch.Size] = []
    backbone.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0].shape[2:]))
    latents = torch.randn(1, 8, 128, 128, generator=torch.Generator().manual_seed(0))
    for tiled in (True, False):
        assert backbone.decode(latents, tiled).shape == (1, 3, 1024, 1024)
    *tiles, whole = decoded
    assert len(tiles) > 1 and max(max(size) for size in tiles) == 64 and whole == (128, 128)


def test_tiny_vae_is_deterministic_and_scaled(backbone: Backbone) -> None:
    images = photos(18)  # more than one internal batch
    mean, std = backbone.encode_images(images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255 * 2 - 1
    expected = backbone.vae.encode(pixels).latents * 1.5
    assert mean.shape == (18, backbone.latent_channels, 32 // backbone.vae_scale_factor, 8)
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)
    assert not std.any()


def test_kl_vae_gives_mean_and_deviation_shifted_and_scaled(copied: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
    ).eval()
    shutil.rmtree(copied / "vae")
    vae.save_pretrained(copied / "vae")
    edit(copied / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    backbone = load_backbone(BackboneConfig(path=str(copied)))
    mean, std = backbone.encode_images(photos())
    pixels = torch.from_numpy(photos()).permute(0, 3, 1, 2) / 255 * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        round_trip = (vae.decode(posterior.mean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(mean, (posterior.mean - 0.25) * 0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, posterior.std * 0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.decode(mean), round_trip, atol=1e-5, rtol=1e-5)


def test_resting_models_are_on_the_device_only_while_they_are_used(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a failure. One of two names of the CPU stands in for an accelerator."""
    own = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    expected = own.encode_text(["a red dress"])
    seen: list[tuple[str, str]] = []

    def watch(name: str, model: Any) -> None:
        original = model.to

        def to(device: Any) -> Any:
            seen.append((name, str(device)))
            return original(device)

        monkeypatch.setattr(model, "to", to)

    watch("vae", own.vae)
    watch("text_encoder", own.text_encoder)
    own.rest(torch.device("cpu:0"))
    assert seen == [("vae", "cpu"), ("text_encoder", "cpu")]
    seen.clear()
    assert torch.equal(own.encode_text(["a red dress"]), expected)
    assert seen == [("text_encoder", "cpu:0"), ("text_encoder", "cpu")]
    seen.clear()
    with pytest.raises(RuntimeError):
        own.decode(torch.zeros(1, 3, 8, 8))  # not the VAE's channels
    assert seen == [("vae", "cpu:0"), ("vae", "cpu")]


@pytest.mark.parametrize("whole_file_bytes", [layout.WHOLE_FILE_BYTES, 1000])
def test_fingerprint_is_that_of_the_content(
    copied: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, whole_file_bytes: int
) -> None:
    monkeypatch.setattr(layout, "WHOLE_FILE_BYTES", whole_file_bytes)  # above it, slices are hashed
    monkeypatch.setattr(layout, "SLICE_BYTES", 16)

    def fingerprint(path: Path) -> str:
        return inspect_backbone(BackboneConfig(path=str(path))).fingerprint()

    before = fingerprint(copied)
    assert before == fingerprint(tiny_backbone)
    file = copied / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: value + 0.01 for name, value in weights.items()}, file)
    assert fingerprint(copied) != before


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_names_the_missing_part(copied: Path, part: str) -> None:
    shutil.rmtree(copied / part)
    assert f"has no {part}/" in refusal(copied)


def test_names_the_missing_folder(tmp_path: Path) -> None:
    assert "nowhere is neither a folder nor a file" in refusal(tmp_path / "nowhere")


def test_an_unknown_backbone_needs_a_path() -> None:
    with pytest.raises(ConfigError, match="backbone.path"):
        inspect_backbone(BackboneConfig(name="sd15"))


@pytest.mark.parametrize("resolution", [0, 30, 36])
def test_refuses_resolutions_that_do_not_divide(tiny_backbone: Path, resolution: int) -> None:
    assert f"data.resolution={resolution} is not a multiple of 8" in refusal(tiny_backbone, resolution)


def test_accepts_a_resolution_that_divides(tiny_backbone: Path) -> None:
    assert inspect_backbone(BackboneConfig(path=str(tiny_backbone)), 40).latent_channels == 8


def test_refuses_pickled_weights_without_opening_them(copied: Path) -> None:
    part = copied / "unet"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "diffusion_pytorch_model.bin")
    assert "is a pickle" in refusal(copied)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels"),
        ("unet/config.json", {"cross_attention_dim": 768}, "attends to 768"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "SD 1.x by its weights"),
        ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "is a VQModel"),
    ],
)
def test_refuses_parts_that_do_not_fit(copied: Path, file: str, changes: dict, message: str) -> None:
    edit(copied / file, **changes)
    assert message in refusal(copied)


def test_half_precision_variant_files_load_as_float32(copied: Path, backbone: Backbone) -> None:
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    halves = {name: value.half() for name, value in load_file(file).items()}
    save_file(halves, file.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    file.unlink()
    unet = load_backbone(BackboneConfig(path=str(copied))).unet
    assert unet.dtype == torch.float32
    torch.testing.assert_close(unet.conv_in.weight, backbone.unet.conv_in.weight, atol=1e-3, rtol=1e-3)


def test_half_precision_in_several_files(copied: Path, backbone: Backbone) -> None:
    """As diffusers writes them: the variant stands before the number, and the index names the files."""
    shutil.rmtree(copied / "unet")
    copy.deepcopy(backbone.unet).half().save_pretrained(copied / "unet", variant="fp16", max_shard_size="50KB")
    shards = sorted(file.name for file in (copied / "unet").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0].startswith("diffusion_pytorch_model.fp16-00001-of-")
    found = inspect_backbone(BackboneConfig(path=str(copied)))
    assert (found.family, found.variants["unet"]) == ("sd1", "fp16")
    (copied / "unet" / shards[1]).unlink()
    assert f"{shards[1]} is missing" in refusal(copied)


def test_refuses_weights_that_lack_a_tensor(copied: Path) -> None:
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lack 1 tensors, conv_in.weight"):
        load_backbone(BackboneConfig(path=str(copied)))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_refuses_a_file_cut_short(copied: Path, part: str) -> None:
    file = next((copied / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=f"{part}.* (cannot be loaded|is cut off)"):
        load_backbone(BackboneConfig(path=str(copied)))
