"""Files and hubs that are not what they should be: one sentence that says what and where, and nothing is changed.

Damaged backbones are in test_backbone_families.py, LoRA files of others in test_adapter_initial.py, full disks in
test_adapter_atomic.py.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from adapter_models import randomize, tiny_unet
from compose import config
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from family_models import write_backbone
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_dae
from lora_dae.adapter.files import load_adapter, save_adapter
from lora_dae.adapter.inject import inject
from lora_dae.adapter.source_input import attach_source_input, load_source_input, save_source_input
from lora_dae.backbone import hub
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig, ConfigError
from lora_dae.enhancement.files import load_enhancement, save_enhancement
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.export.push import push_folder
from lora_dae.training import run as training

LOADERS = {
    "adapter": lambda file: load_adapter(tiny_unet(), file),
    "source input": lambda file: load_source_input(tiny_unet(), file),
    "enhancement": load_enhancement,
}


def written(kind: str, folder: Path) -> Path:
    unet = tiny_unet()
    attach_source_input(unet)
    inject(unet, AdapterConfig(["cross_attention"], rank=2))
    randomize(unet)
    if kind == "adapter":
        return save_adapter(unet, folder / "a.safetensors")
    if kind == "source input":
        return save_source_input(unet, folder / "a.safetensors")
    return save_enhancement(EnhancementModule(), folder / "a.safetensors")


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("kind", LOADERS)
def test_cut_short(kind: str, tmp_path: Path) -> None:
    file = written(kind, tmp_path)
    LOADERS[kind](file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"a\.safetensors is not a readable safetensors file"):
        LOADERS[kind](file)


@pytest.mark.parametrize("kind", LOADERS)
def test_not_a_number_inside(kind: str, tmp_path: Path) -> None:
    file = written(kind, tmp_path)
    tensors, header = load_file(file), header_of(file)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file, header)
    with pytest.raises(ConfigError, match=r"a\.safetensors .*not finite"):
        LOADERS[kind](file)


@pytest.mark.parametrize("header", ["{", "[1]", json.dumps({"unet.r": 2, "unet.no_such_setting": 1})])
def test_tampered_header(header: str, tmp_path: Path) -> None:
    """A header that is no JSON, no object, or no LoRA's."""
    file = written("adapter", tmp_path)
    save_file(load_file(file), file, {**header_of(file), LORA_ADAPTER_METADATA_KEY: header})
    with pytest.raises(ConfigError, match=r"header of .*a\.safetensors"):
        load_adapter(tiny_unet(), file)


def cut_out(name: str) -> bool:
    return "mid_block.attentions.0.transformer_blocks.0.attn2.to_q" in name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if not (cut_out(k) and "lora_B" in k)}, "lacks unet.mid_block.*lora_B"),
        (lambda t: {k: v for k, v in t.items() if not cut_out(k)}, "holds nothing for mid_block.*to_q of the unet"),
        (lambda t: {k: v[:1] if cut_out(k) and "lora_A" in k else v for k, v in t.items()}, "has rank 1 .* says 2"),
    ],
    ids=["half", "layer", "rank"],
)
@pytest.mark.parametrize("road", ["load", "attach"])
def test_adapter_with_something_cut_out(road: str, change: Any, message: str, tmp_path: Path) -> None:
    """diffusers loads such a file with no more than a warning, or fails inside PEFT."""
    file = written("adapter", tmp_path).rename(tmp_path / "pytorch_lora_weights.safetensors")
    save_file({name: value.clone() for name, value in change(load_file(file)).items()}, file, header_of(file))
    unet = tiny_unet()
    pipe = SimpleNamespace(unet=unet, scheduler=DDIMScheduler())
    with pytest.raises(ConfigError, match=message):
        load_adapter(unet, file) if road == "load" else lora_dae.attach(pipe, tmp_path)
    assert unet.state_dict().keys() == tiny_unet().state_dict().keys()


def test_refused_adapter_leaves_the_pipeline_alone(tmp_path: Path) -> None:
    """Cut short, of another family, and without its file: attach() says so, and the pipeline draws as before."""
    pipe = StableDiffusionPipeline.from_pretrained(write_backbone(tmp_path / "sd15", "sd15"))
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    file = written("adapter", tmp_path).rename(tmp_path / "pytorch_lora_weights.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        lora_dae.attach(pipe, tmp_path)
    other = tiny_unet("sdxl")
    inject(other, AdapterConfig(["cross_attention"], rank=2))
    save_adapter(other, file)
    with pytest.raises(ConfigError, match="load the backbone that it was trained on"):
        lora_dae.attach(pipe, tmp_path)
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_config_of_other_widths_than_the_weights(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path / "sd15", "sd15")
    file = folder / "unet" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "block_out_channels": [16, 32]}))
    with pytest.raises(ConfigError, match=r"the weights in .*unet cannot be loaded"):
        load_backbone(BackboneConfig(name="folder", path=str(folder)))


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://example.invalid"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=answer(403)), "xl-base-1.0 is gated: accept its licence"),
        (RepositoryNotFoundError("none", response=answer(404)), "does not exist on the hub or is private"),
        (HfHubHTTPError("down", response=answer(503)), "is not in the cache and the hub cannot be reached"),
        (ConnectionError("no route"), "is not in the cache and the hub cannot be reached"),
        (HTTPError("peer closed connection"), "is not in the cache and the hub cannot be reached"),
        (RevisionNotFoundError("none", response=answer(404)), "has no revision 462165984030d82259a11f4367a4eed1"),
    ],
    ids=["gated", "unknown", "down", "offline", "lost", "revision"],
)
def test_hub(error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which id, which cache folder, and the way without the hub."""
    original = hub.snapshot_download

    def download(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return original(repo, **options)
        raise error

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=message) as caught:
        inspect_backbone(BackboneConfig(name="sdxl"))
    said = str(caught.value)
    assert "stabilityai/stable-diffusion-xl-base-1.0" in said and str(tmp_path) in said and "backbone.path" in said


def test_disk_full_while_a_model_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("none") if options.get("local_files_only") else OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="stable-diffusion-2-1 does not fit into the cache .*HF_HOME") as caught:
        inspect_backbone(BackboneConfig(name="sd21"))
    assert str(tmp_path) in str(caught.value)


def test_refused_upload_says_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise HfHubHTTPError("you may not write there", response=answer(403))

    monkeypatch.setattr("lora_dae.export.push.get_token", lambda: "a token")
    monkeypatch.setattr("lora_dae.export.push.HfApi", lambda: SimpleNamespace(create_repo=refuse))
    with pytest.raises(ConfigError, match=r"push=a/b did not work \(.*\); .* holds everything"):
        push_folder(tmp_path, "a/b", Console())


@pytest.mark.parametrize("offline", [False, True], ids=["unreachable", "offline"])
def test_upload_to_a_hub_that_cannot_be_reached(offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real request to a port where nobody listens, and one that HF_HUB_OFFLINE forbids: no file is touched."""
    monkeypatch.setattr("lora_dae.export.push.get_token", lambda: "hf_token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("lora_dae.export.push.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_token"))
    (tmp_path / "a.safetensors").write_bytes(b"whole")
    with pytest.raises(ConfigError, match=r"push=a/b did not work \(.+\); .* holds everything") as caught:
        push_folder(tmp_path, "a/b", Console())
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert (tmp_path / "a.safetensors").read_bytes() == b"whole"


def test_adapter_of_another_family_is_refused_when_a_run_is_drawn(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose backbone folder was exchanged for another family's."""
    monkeypatch.setattr(
        training, "evaluate_run", lambda *a, **k: (SimpleNamespace(methods={}, references={}, corrected=dict), None)
    )
    monkeypatch.setattr(training.tracking, "log_image", lambda *a: None)
    base = write_backbone(tmp_path / "base", "sd21")
    cfg = config(
        base, tmp_path / "run", tmp_path / "cache", "backbone=folder", "data=folder", f"data.root={tiny_folder}",
        "data.resolution=32", "trainer.max_steps=1", "adapter.rank=2", "enhancement=none", "data.val_fraction=0.25",
        "data.test_fraction=0.25",
    )  # fmt: skip
    training.run(cfg)
    from lora_dae.sampling.load import load_run

    shutil.rmtree(base)
    write_backbone(base, "sdxl")
    with pytest.raises(ConfigError, match="load the backbone that it was trained on"):
        load_run(tmp_path / "run")
