"""Every kind of adapter by every road: the same weight of every layer, and the same drawn latents.

    diffusers       our file, by load_lora_weights of plain diffusers
    exported        the same after export.py's conversion of it
    kohya           kohya's file, by diffusers' own import (DoRA: LyCORIS reads it, in test_adapter_kohya.py)
    merged          a diffusers folder with the adapter in its weights
    merged file     one checkpoint in the CompVis/SGM layout

Largest differences: of a weight WEIGHT (adapters here change some by more than .1), of latents LATENT of the largest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import randomize
from family_models import ENCODERS, encoders, pipeline, write_backbone
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lora_dae.adapter.files import load_adapter, merge_in_place, save_adapter
from lora_dae.adapter.inject import inject
from lora_dae.adapter.peft_layout import from_peft
from lora_dae.adapter.text import inject_text
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig, Config
from lora_dae.export.adapter import write_diffusers, write_kohya
from lora_dae.export.merged import write_merged_file, write_merged_folder
from lora_dae.sampling.load import LoadedRun

WEIGHT, LATENT = 2e-6, 2e-5
BOTH = ["cross_attention", "conv"]
CASES = {
    "attention only": AdapterConfig(["cross_attention"], rank=4),
    "conv only": AdapterConfig(["conv"], rank=4),
    "alpha is not rank": AdapterConfig(BOTH, rank=4, alpha=8),
    "ranks differ": AdapterConfig(BOTH, rank=4, alpha=2, conv_rank=3, conv_alpha=1),
    "DoRA": AdapterConfig(BOTH, rank=4, alpha=8, conv_rank=3, use_dora=True),
    "text encoder": AdapterConfig([*BOTH, "text_encoder"], rank=4, alpha=8, conv_rank=3, conv_alpha=1),
}
FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("round_trips")
    return {family: write_backbone(root / family, family) for family in FAMILY}


def trained(folder: Path, cfg: AdapterConfig) -> Any:
    """A pipeline whose networks carry an adapter of random weights."""
    pipe = pipeline(folder)
    torch.manual_seed(3)
    inject(pipe.unet, cfg)
    if cfg.trains_text:
        inject_text(encoders(pipe), cfg)
    with_adapter = (pipe.unet, *(encoders(pipe).values() if cfg.trains_text else ()))
    for number, model in enumerate(with_adapter):
        randomize(model, seed=number)
        model.eval()
    return pipe


def draw(pipe: Any) -> Tensor:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe("a red dress", latents=noise, num_inference_steps=3, output_type="latent").images


def weights(pipe: Any) -> dict[str, Tensor]:
    """Every tensor of the networks that draw, by name, of a pipeline without an adapter beside them."""
    models = {"unet": pipe.unet, **encoders(pipe)}
    return {f"{c}.{n}": t.clone() for c, model in models.items() for n, t in model.state_dict().items()}


def fused(pipe: Any) -> Any:
    """The pipeline with what it loaded added into its weights, by diffusers."""
    components = [n for n in ("unet", *ENCODERS) if getattr(getattr(pipe, n, None), "peft_config", None)]
    pipe.fuse_lora(components=components)
    pipe.unload_lora_weights()
    return pipe


def roads(file: Path, folder: Path, family: str, dora: bool, work: Path) -> dict[str, Callable[[], tuple[Any, bool]]]:
    """What each road leads to: a pipeline, and whether the adapter stands beside its weights."""
    with safe_open(file, framework="pt") as opened:
        layers = from_peft(load_file(file), opened.metadata(), str(file))

    def loaded(written: Path) -> tuple[Any, bool]:
        pipe = pipeline(folder)
        pipe.load_lora_weights(written)
        return pipe, True

    def run() -> LoadedRun:
        backbone = load_backbone(BackboneConfig(path=str(folder)))
        load_adapter(backbone.unet, file, backbone.text_encoders)
        return LoadedRun(work, Config(run_dir=str(work)), backbone, None)

    def kohya() -> tuple[Any, bool]:
        config = load_backbone(BackboneConfig(path=str(folder))).unet.config
        return loaded(write_kohya(layers, work, FAMILY[family], config, "fp32", title="x", resolution=32))

    def merged_file() -> tuple[Any, bool]:
        written = write_merged_file(run(), work, "fp32", FAMILY[family])
        whole = load_backbone(BackboneConfig(name="file", path=str(written), configs=str(folder)))
        pipe = pipeline(folder)
        pipe.unet = type(pipe.unet).from_config(whole.unet.config)  # without what backbones of SDXL are hooked with
        pipe.unet.load_state_dict(whole.unet.state_dict())
        for name, encoder in whole.text_encoders.items():
            setattr(pipe, name, encoder)
        return pipe, False

    found: dict[str, Callable[[], tuple[Any, bool]]] = {
        "diffusers": lambda: loaded(file),
        "exported": lambda: loaded(write_diffusers(layers, work / "exported", "fp32", {})),
        "kohya": kohya,
        "merged": lambda: (pipeline(write_merged_folder(run(), work, "fp32")), False),
        "merged file": merged_file,
    }
    if dora:
        del found["kohya"]
    return found


@pytest.mark.parametrize(
    ("case", "family"), [*((case, family) for case in CASES for family in ("sd15", "sdxl")), ("ranks differ", "sd21")]
)
def test_all_roads_lead_to_the_same_weights_and_latents(
    case: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, cfg = folders[family], CASES[case]
    base = weights(pipeline(folder))
    pipe = trained(folder, cfg)
    file = save_adapter(pipe.unet, tmp_path / "run" / "pytorch_lora_weights.safetensors", None, encoders(pipe))
    drawn = draw(pipe)
    own = copy.deepcopy({"unet": pipe.unet, **encoders(pipe)})
    merge_in_place(own["unet"], {name: own[name] for name in encoders(pipe)})
    expected = {f"{c}.{n}": t for c, model in own.items() for n, t in model.state_dict().items()}
    changed = {name.split(".")[0] for name in base if not torch.equal(base[name], expected[name])}
    assert changed == ({"unet", *encoders(pipe)} if cfg.trains_text else {"unet"})
    assert max(float((expected[name] - base[name]).abs().max()) for name in base) > 0.1
    assert float((drawn - draw(pipeline(folder))).abs().max()) > 0.05
    for name, arrive in roads(file, folder, family, cfg.use_dora, tmp_path).items():
        there, beside = arrive()
        error = float((draw(there) - drawn).abs().max() / drawn.abs().max())
        assert error <= LATENT, (name, error)
        found = weights(fused(there) if beside else there)
        assert found.keys() == expected.keys(), name
        for layer, weight in expected.items():
            error = float((found[layer] - weight).abs().max())
            assert error <= WEIGHT, (name, layer, error)


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_merged_file_says_what_its_network_predicts(
    prediction: str, zero_snr: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """By the empty tensors that ComfyUI writes and reads; the configs that complete the file say epsilon."""
    told = BackboneConfig(path=str(folders["sdxl"]), prediction_type=prediction, zero_terminal_snr=zero_snr)
    run = LoadedRun(tmp_path, Config(run_dir=str(tmp_path)), load_backbone(told), None)
    file = write_merged_file(run, tmp_path, "fp16", "sdxl")
    markers = {name for name in load_file(file) if "." not in name}
    assert markers == ({"v_pred", "ztsnr"} if zero_snr else {"v_pred"} if prediction != "epsilon" else set())
    found = inspect_backbone(BackboneConfig(name="file", path=str(file), configs=str(folders["sdxl"])))
    assert (found.prediction_type, found.zero_terminal_snr) == (prediction, zero_snr)


@pytest.mark.parametrize(("dtype", "step"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_merged_in_half_precision_differs_by_its_rounding(
    dtype: str, step: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Half a unit in the last place of every weight, and latents within as much of the largest, times ten."""
    pipe = trained(folders["sd15"], CASES["ranks differ"])
    file = save_adapter(pipe.unet, tmp_path / "a.safetensors")
    drawn = draw(pipe)
    backbone = load_backbone(BackboneConfig(path=str(folders["sd15"])))
    load_adapter(backbone.unet, file)
    exact = copy.deepcopy(backbone.unet)
    merge_in_place(exact)
    run = LoadedRun(tmp_path, Config(run_dir=str(tmp_path)), backbone, None)
    there = pipeline(write_merged_folder(run, tmp_path, dtype))
    found = there.unet.state_dict()
    for name, weight in exact.state_dict().items():
        smallest = 2.0**-24 if dtype == "fp16" else 0.0  # below fp16's normal numbers steps stop shrinking
        assert bool(((found[name].float() - weight).abs() <= weight.abs() * step + smallest).all()), name
    error = (draw(there.to(torch.float32)) - drawn).abs().max() / drawn.abs().max()
    assert float(error) <= 10 * step
