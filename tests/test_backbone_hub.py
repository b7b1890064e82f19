"""A cache that holds a part of a hub model: the rest is fetched, and where it cannot be, that is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from family_models import write_backbone
from huggingface_hub.utils import filter_repo_objects

from lora_dae.backbone import hub
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.config import BackboneConfig, ConfigError

SD15 = BackboneConfig(name="sd15")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model."""
    return write_backbone(tmp_path_factory.mktemp("hub") / "sd15", "sd15")


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache, which is empty, has SD 1.5's pinned revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo, revision = hub.REPOSITORIES["sd15"]
    return tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / str(revision)


def other_file(snapshot: Path) -> None:
    """What hf_hub_download of a checkpoint leaves."""
    shutil.rmtree(snapshot)
    snapshot.mkdir()
    (snapshot / "v1-5-pruned-emaonly.safetensors").write_bytes(b"")


def no_unet(snapshot: Path) -> None:
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def no_scheduler(snapshot: Path) -> None:
    (snapshot / "scheduler" / "scheduler_config.json").unlink()


def one_shard_of_two(snapshot: Path) -> None:
    stem = "diffusion_pytorch_model"
    names = [f"{stem}-0000{k}-of-00002.safetensors" for k in (1, 2)]
    (snapshot / "unet" / f"{stem}.safetensors").rename(snapshot / "unet" / names[0])
    index = {"metadata": {}, "weight_map": {"conv_in.weight": names[0], "conv_out.weight": names[1]}}
    (snapshot / "unet" / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


PARTS = {
    other_file: "model_index.json",
    no_unet: "unet/diffusion_pytorch_model.safetensors",
    no_scheduler: "scheduler/scheduler_config.json",
    one_shard_of_two: "unet/diffusion_pytorch_model.safetensors",
}


@pytest.mark.parametrize("take_away", PARTS)
def test_a_part_in_the_cache_is_completed_from_the_hub(
    take_away: Callable[[Path], None], folder: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, snapshot)
    take_away(snapshot)
    original, fetched = hub.snapshot_download, list[str]()

    def download(repo: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return original(repo, **options)
        fetched.append(repo)
        return str(shutil.copytree(folder, snapshot, dirs_exist_ok=True))

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert inspect_backbone(SD15).path == snapshot
    assert fetched == ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert inspect_backbone(SD15).path == snapshot and len(fetched) == 1  # now it is there


@pytest.mark.parametrize("take_away", PARTS)
def test_a_part_in_the_cache_is_told_without_a_connection(
    take_away: Callable[[Path], None], folder: Path, snapshot: Path
) -> None:
    """By the client itself, offline: it gives the folder back as if it were whole."""
    shutil.copytree(folder, snapshot)
    take_away(snapshot)
    said = f"stable-diffusion-v1-5 is in the cache without {PARTS[take_away]}, and the hub .*backbone.path"
    with pytest.raises(ConfigError, match=said) as caught:
        inspect_backbone(SD15)
    assert "\n" not in str(caught.value)


def test_what_is_not_asked_for_may_be_missing(folder: Path, snapshot: Path, tmp_path: Path) -> None:
    """Half precision is enough, and the own VAE's weights are not needed where another one is named."""
    shutil.copytree(folder, snapshot)
    stem = "diffusion_pytorch_model"
    (snapshot / "unet" / f"{stem}.safetensors").rename(snapshot / "unet" / f"{stem}.fp16.safetensors")
    assert inspect_backbone(SD15).variants["unet"] == "fp16"
    shutil.copytree(folder / "vae", tmp_path / "vae")
    (snapshot / "vae" / f"{stem}.safetensors").unlink()
    assert inspect_backbone(BackboneConfig(name="sd15", vae_path=str(tmp_path / "vae"))).path == snapshot


def test_half_precision_is_not_fetched_beside_the_whole() -> None:
    """By the hub client's own filter; in one file and, as diffusers and transformers write it, in several."""
    stem = "unet/diffusion_pytorch_model"
    wanted = [f"{stem}.safetensors", f"{stem}-00001-of-00002.safetensors", f"{stem}.safetensors.index.json"]
    other = [f"{stem}.fp16.safetensors", *(f"{one}.fp16-00001-of-00002.safetensors" for one in (stem, "vae/model"))]
    kept = filter_repo_objects([*wanted, *other], allow_patterns=hub._WANTED, ignore_patterns=hub._UNWANTED)
    assert list(kept) == wanted
