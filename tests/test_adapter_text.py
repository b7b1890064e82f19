"""LoRA on the text encoder: plain diffusers reads both files, trains it as the run does, and draws the same."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import randomize
from compose import config
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from family_models import encoders, pipeline, write_backbone
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_dae
from lora_dae.adapter.atomic import save_tensors
from lora_dae.adapter.files import load_adapter, merge_in_place, save_adapter
from lora_dae.adapter.initial import initialize
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.adapter.kohya import KOHYA_FILE, kohya_metadata, to_kohya
from lora_dae.adapter.peft_layout import from_peft, to_peft
from lora_dae.adapter.text import inject_text, text_layers
from lora_dae.adapter.weights import resize
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.tokens import pack_tokens, unpack_tokens
from lora_dae.config import AdapterConfig, BackboneConfig, ConfigError
from lora_dae.export.command import ExportRequest, export_run
from lora_dae.rules import check
from lora_dae.sampling.load import load_run
from lora_dae.training import run as training
from lora_dae.training.module import LoraDae

FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
TARGETS = ["cross_attention", "conv", "text_encoder"]
CASES = {
    "scaled": AdapterConfig(TARGETS, rank=4, alpha=8, conv_rank=3, conv_alpha=1),
    "dora": AdapterConfig(TARGETS, rank=4, use_dora=True),
    "rslora": AdapterConfig(TARGETS, rank=4, alpha=8, use_rslora=True, dropout=0.5),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text")
    return {family: write_backbone(root / family, family) for family in FAMILY}


def trained(folder: Path, cfg: AdapterConfig) -> Any:
    """A pipeline whose UNet and text encoders carry an adapter of random weights."""
    pipe = pipeline(folder)
    torch.manual_seed(3)
    inject(pipe.unet, cfg)
    inject_text(encoders(pipe), cfg)
    for number, model in enumerate((pipe.unet, *encoders(pipe).values())):
        randomize(model, seed=number)
        model.eval()
    return pipe


def draw(pipe: Any) -> Tensor:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe("a red dress", latents=noise, num_inference_steps=2, output_type="latent").images


def text_of(pipe: Any) -> Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(
            "a blue shirt", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
        )[0]


def kohya(file: Path, pipe: Any, family: str) -> Path:
    with safe_open(file, framework="pt") as opened:
        layers = from_peft(load_file(file), opened.metadata(), str(file))
    header = kohya_metadata(layers, FAMILY[family], title="x", resolution=32)
    return save_tensors(to_kohya(layers, FAMILY[family], pipe.unet.config), file.parent / "kohya.safetensors", header)


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("case", CASES)
def test_plain_diffusers_reads_both_files(case: str, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Embeddings and drawn latents of load_lora_weights: largest difference 2e-5 of the largest value.

    Not DoRA from kohya's file, which diffusers does not read.
    """
    pipe = trained(folders[family], CASES[case])
    text, expected = text_of(pipe), draw(pipe)
    plain = pipeline(folders[family])
    assert (text_of(plain) - text).abs().max() > 0.05
    file = save_adapter(pipe.unet, tmp_path / "a.safetensors", None, encoders(pipe))
    for source in (file,) if case == "dora" else (file, kohya(file, pipe, family)):
        fresh = pipeline(folders[family])
        fresh.load_lora_weights(source)
        torch.testing.assert_close(text_of(fresh), text, rtol=0, atol=2e-5)
        torch.testing.assert_close(draw(fresh), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILY)
def test_file_gives_every_weight_back(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pipe, fresh = trained(folders[family], CASES["scaled"]), pipeline(folders[family])
    load_adapter(fresh.unet, save_adapter(pipe.unet, tmp_path, None, encoders(pipe)), encoders(fresh))
    for name, encoder in encoders(pipe).items():
        loaded = dict(encoders(fresh)[name].named_parameters())
        mine = {key: p for key, p in encoder.named_parameters() if ".lora_" in key}
        assert mine and all(torch.equal(loaded[key], value) for key, value in mine.items())
        assert not trainable_parameters(encoders(fresh)[name])
    assert torch.equal(text_of(fresh), text_of(pipe))


def test_headers_name_nothing_that_an_older_peft_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers hands LoraConfig whatever a header names; these settings PEFT has had since DoRA (0.9, 2024)."""
    pipe = trained(folders["sdxl"], CASES["rslora"])
    file = save_adapter(pipe.unet, tmp_path, None, encoders(pipe))
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    exported = to_peft(from_peft(load_file(file), header, str(file)))[1]
    old = "r lora_alpha target_modules rank_pattern alpha_pattern lora_dropout use_dora use_rslora".split()
    for told in (header, exported):
        names = json.loads(told[LORA_ADAPTER_METADATA_KEY])
        assert {name.split(".")[0] for name in names} == {"unet", *encoders(pipe)}
        assert {name.split(".")[1] for name in names} <= set(old)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", FAMILY)
def test_begins_where_a_file_ended(layout: str, family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Under another rank and scale of our own."""
    pipe, ours = trained(folders[family], CASES["scaled"]), pipeline(folders[family])
    file = save_adapter(pipe.unet, tmp_path / "a.safetensors", None, encoders(pipe))
    cfg = replace(CASES["scaled"], rank=6, alpha=3, conv_rank=4)
    inject(ours.unet, cfg)
    inject_text(encoders(ours), cfg)
    source = file if layout == "diffusers" else kohya(file, pipe, family)
    assert "text_encoder" in initialize(ours.unet.eval(), source, encoders=encoders(ours))
    torch.testing.assert_close(text_of(ours), text_of(pipe), rtol=0, atol=1e-5)
    without = pipeline(folders[family])
    inject(without.unet, cfg)
    with pytest.raises(ConfigError, match=r"do not train here \((text_encoder|lora_te)"):
        initialize(without.unet, source)


@pytest.mark.parametrize("case", CASES)
def test_merged_encoders_are_plain_and_embed_the_same(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = trained(folders["sdxl"], CASES[case])
    expected = text_of(pipe)
    merge_in_place(pipe.unet, encoders(pipe))
    torch.testing.assert_close(text_of(pipe), expected, rtol=0, atol=1e-5)
    for name, encoder in encoders(pipe).items():
        encoder.save_pretrained(tmp_path / name)
        plain = type(encoder).from_pretrained(tmp_path / name)
        assert plain.state_dict().keys() == encoders(pipeline(folders["sdxl"]))[name].state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), encoder.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILY)
def test_adapter_is_as_large_as_its_closed_form(family: str, folders: dict[str, Path]) -> None:
    """r (in + out) of four square projections and the two of the MLP, in every layer but SDXL's unread one."""
    pipe = pipeline(folders[family])
    inject_text(encoders(pipe), AdapterConfig(TARGETS, rank=3))
    for name, encoder in encoders(pipe).items():
        width, inner = encoder.config.hidden_size, encoder.config.intermediate_size
        layers = encoder.config.num_hidden_layers - (family == "sdxl" and name == "text_encoder")
        expected = layers * 3 * (4 * 2 * width + 2 * (width + inner))
        assert sum(p.numel() for p in trainable_parameters(encoder).values()) == expected
        assert len(text_layers(encoder)) == 6 * encoder.config.num_hidden_layers


def test_every_trainable_layer_has_a_gradient(folders: dict[str, Path]) -> None:
    """So that none is unused where several GPUs wait for all of them; the gradient of B is that of a difference."""
    backbone = load_backbone(BackboneConfig(name="folder", path=str(folders["sdxl"])))
    inject_text(backbone.text_encoders, AdapterConfig(TARGETS, rank=2))
    tokens = backbone.tokenize(["a red dress", ""])
    backbone.embed_tokens(tokens).square().sum().backward()
    for encoder in backbone.text_encoders.values():
        up = {name: p for name, p in trainable_parameters(encoder).items() if "lora_B" in name}
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in up.values())


def test_names_are_kohyas_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """As sd-scripts writes them (``lora_te_`` for one encoder, ``lora_te1_`` and ``lora_te2_`` for two)."""
    found = {}
    for family in ("sd15", "sdxl"):
        pipe = trained(folders[family], CASES["scaled"])
        found[family] = set(load_file(kohya(save_adapter(pipe.unet, tmp_path, None, encoders(pipe)), pipe, family)))
    assert "lora_te_text_model_encoder_layers_1_mlp_fc1.lora_down.weight" in found["sd15"]
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha" in found["sdxl"]
    assert "lora_te2_text_model_encoder_layers_1_self_attn_out_proj.lora_up.weight" in found["sdxl"]
    names = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert "text_encoder_2.text_model.encoder.layers.1.mlp.fc2.lora_A.weight" in names


def test_smaller_file_loads_too(folders: dict[str, Path], tmp_path: Path) -> None:
    """After an SVD resize the header is our own converter's: plain diffusers takes it at the right scale."""
    pipe = trained(folders["sdxl"], CASES["scaled"])
    file = save_adapter(pipe.unet, tmp_path, None, encoders(pipe))
    with safe_open(file, framework="pt") as opened:
        layers = from_peft(load_file(file), opened.metadata(), str(file))
    whole, kept = resize(layers, 4)  # the rank that it has: nothing is lost
    assert kept == pytest.approx(1)
    smaller = dict(whole)
    first = next(name for name in smaller if name.startswith("text_encoder."))
    smaller[first] = resize({first: smaller[first]}, 2)[0][first]  # mixed ranks in one encoder
    for state in (whole, smaller):
        fresh = pipeline(folders["sdxl"])
        tensors, header = to_peft(state)
        fresh.load_lora_weights(save_tensors(tensors, tmp_path / "small.safetensors", header))
        changed = (text_of(fresh) - text_of(pipe)).abs().max()
        assert changed < 1e-4 if state is whole else 1e-4 < changed < 1


def test_tokens_survive_half_precision() -> None:
    tokens = torch.arange(49408).reshape(1, 2, -1)
    assert torch.equal(unpack_tokens(pack_tokens(tokens).half().float()), tokens)


def test_embedding_tokens_is_encoding_text(folders: dict[str, Path]) -> None:
    for family in FAMILY:
        backbone = load_backbone(BackboneConfig(name="folder", path=str(folders[family])))
        captions = ["a red dress", "", "a very " + "long " * 30 + "caption"]
        with torch.no_grad():
            embedded = backbone.embed_tokens(backbone.tokenize(captions))
        assert torch.equal(embedded, backbone.encode_text(captions))


def short(folder: Path, run_dir: Path, photos: Path, *overrides: str) -> Any:
    return config(
        folder, run_dir, folder.parent / "cache", "backbone=folder", "data=folder", f"data.root={photos}",
        "data.resolution=32", "trainer.max_steps=2", "adapter.rank=2", "data.val_fraction=0.25",
        "data.test_fraction=0.25", "evaluation.frozen=false", "evaluation.num_samples=2",
        "optimizer.learning_rate=0.05", "adapter.targets=[cross_attention,text_encoder]", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(folders: dict[str, Path], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny SDXL that trained its text encoders."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    training.run(short(folders["sdxl"], run_dir, tiny_folder))
    return run_dir


def test_whole_run_trains_both_encoders(finished: Path, folders: dict[str, Path]) -> None:
    weights = load_file(finished / "adapter" / "pytorch_lora_weights.safetensors")
    for component in ("text_encoder", "text_encoder_2"):
        ups = [v for k, v in weights.items() if k.startswith(f"{component}.") and "lora_B" in k]
        assert any(bool(up.any()) for up in ups), component
    run = load_run(finished)
    plain = load_backbone(BackboneConfig(name="folder", path=str(folders["sdxl"])))
    assert not torch.equal(run.backbone.encode_text(["a dress"]), plain.encode_text(["a dress"]))
    assert run.drawer(bf16=False).images(["a red dress"], None, 0.5).shape == (1, 32, 32, 3)
    assert any("lora_te2" in key for key in load_file(finished / "adapter" / KOHYA_FILE))


def test_merged_and_attached_draw_what_the_run_draws(finished: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    """Largest difference of latents 1e-4 of the largest; detach() leaves the encoders bit for bit as they were."""
    request = ExportRequest(str(finished), "merged", "fp32", None, str(tmp_path), None)
    export_run(request, Console())
    attached = pipeline(folders["sdxl"])
    before = copy.deepcopy({name: encoder.state_dict() for name, encoder in encoders(attached).items()})
    lora_dae.attach(attached, finished / "adapter", strength=0.0)
    text = load_run(finished).backbone.encode_text(["a blue shirt"])[:, :-1]  # its last row is the pooled text
    for pipe in (pipeline(tmp_path / "merged"), attached):
        torch.testing.assert_close(text_of(pipe), text, rtol=0, atol=1e-5)
    expected = draw(pipeline(tmp_path / "merged"))
    torch.testing.assert_close(draw(attached), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    lora_dae.detach(attached)
    for name, encoder in encoders(attached).items():
        after = encoder.state_dict()
        assert after.keys() == before[name].keys()
        assert all(torch.equal(after[key], value) for key, value in before[name].items())


def test_says_that_texts_are_not_cached_and_resumes_exactly(
    folders: dict[str, Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Killed after step 1 of 2 and gone on: bit for bit the straight run; two windows, no cache at all."""
    nothing = (
        type("Table", (), {"methods": {}, "references": {}, "corrected": lambda self: {}})(),
        np.zeros((8, 8, 3), np.uint8),
    )
    monkeypatch.setattr(training, "evaluate_run", lambda *args, **kwargs: nothing)
    options = ("enhancement=none", "trainer.val_check_interval=1", "backbone.text_chunks=2", "data.cache=off")
    training.run(short(folders["sd15"], tmp_path / "straight", tiny_folder, *options))
    assert "none is cached" in capsys.readouterr().out
    original = LoraDae.training_step

    class KilledError(Exception):
        pass

    def dies(self: LoraDae, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 1:
            raise KilledError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LoraDae, "training_step", dies)
    with pytest.raises(KilledError):
        training.run(short(folders["sd15"], tmp_path / "cut", tiny_folder, *options))
    monkeypatch.setattr(LoraDae, "training_step", original)
    training.run(short(folders["sd15"], tmp_path / "cut", tiny_folder, *options, "ckpt_path=last"))
    one, other = (load_file(tmp_path / name / "adapter" / KOHYA_FILE) for name in ("straight", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_wrong_files_and_settings(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = trained(folders["sdxl"], CASES["scaled"])
    file = save_adapter(pipe.unet, tmp_path, None, encoders(pipe))
    fresh = pipeline(folders["sdxl"])
    with pytest.raises(ConfigError, match="of the text_encoder, which this backbone does not have"):
        load_adapter(fresh.unet, file)
    tensors = load_file(file)
    key = next(name for name in tensors if name.startswith("text_encoder_2.") and "lora_B" in name)
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    save_file({**tensors, key: torch.full_like(tensors[key], float("nan"))}, file, header)
    with pytest.raises(ConfigError, match="not finite"):
        load_adapter(fresh.unet, file, encoders(fresh))
    with pytest.raises(ConfigError, match="text_encoder is only 8 wide"):
        inject_text(encoders(fresh), AdapterConfig(TARGETS, rank=9))
    for overrides in (["adapter.targets=[text_encoder]"], ["adapter=full", "adapter.targets=[conv,text_encoder]"]):
        with pytest.raises(ConfigError, match="text_encoder without LoRA in the UNet"):
            check(config(folders["sd15"], tmp_path / "run", tmp_path / "cache", *overrides))
