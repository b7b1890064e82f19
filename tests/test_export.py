"""A finished run in the formats of other programs: each draws what the run draws."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compose import config
from diffusers import StableDiffusionPipeline
from family_models import write_backbone, write_single_file
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from lora_dae.adapter.atomic import atomic, save_tensors
from lora_dae.adapter.files import FILE_NAME, save_merged
from lora_dae.adapter.kohya import KOHYA_FILE
from lora_dae.adapter.source_input import attach_source_input
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig, Config, ConfigError
from lora_dae.export.card import model_card
from lora_dae.export.command import ExportRequest, export_run
from lora_dae.sampling.load import load_run
from lora_dae.training import run as training

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run on a tiny SD 1.5: mixed ranks and scales, captions alone."""
    root = tmp_path_factory.mktemp("export")
    run_dir = root / "run"
    training.run(
        config(
            write_backbone(root / "sd15", "sd15"), run_dir, root / "cache", "backbone=folder", "data=folder",
            f"data.root={tiny_folder}", "data.resolution=32", "trainer.max_steps=3", "optimizer.learning_rate=0.1",
            "adapter.rank=4", "adapter.alpha=8", "adapter.conv_rank=3", "adapter.conv_alpha=1",
            "data.val_fraction=0.25", "data.test_fraction=0.25", "evaluation.frozen=false", "name=tiny",
        )
    )  # fmt: skip
    return run_dir


def request(run: Path, output: Path, **changes: object) -> ExportRequest:
    values = {"format": "all", "dtype": "fp32", "resize_rank": None, "push": None, **changes}
    return ExportRequest(run=str(run), output=str(output), **values)  # type: ignore[arg-type]


def draw(pipe: StableDiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe("a blue shirt", latents=noise, num_inference_steps=3, output_type="latent").images.numpy()


def base(finished: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(finished.parent / "sd15")


def test_every_format_draws_the_same(finished: Path, tmp_path: Path) -> None:
    """Largest difference of drawn latents 2e-5: diffusers file, kohya file, merged folder, merged checkpoint."""
    export_run(request(finished, tmp_path), Console())
    export_run(request(finished, tmp_path, format="merged_file"), Console())
    pipe = base(finished)
    plain = draw(pipe)
    pipe.load_lora_weights(finished / "adapter")
    expected = draw(pipe)
    assert np.abs(expected - plain).max() > 0.05
    for file in (FILE_NAME, KOHYA_FILE):
        pipe = base(finished)
        pipe.load_lora_weights(tmp_path / file)
        np.testing.assert_allclose(draw(pipe), expected, rtol=0, atol=2e-5)
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(draw(merged), expected, rtol=0, atol=2e-5)
    whole = load_backbone(
        BackboneConfig(name="file", path=str(tmp_path / "merged.safetensors"), configs=str(finished.parent / "sd15"))
    )
    pipe = base(finished)
    pipe.unet = whole.unet
    np.testing.assert_allclose(draw(pipe), expected, rtol=0, atol=2e-5)


def test_run_folder_holds_the_kohya_file_and_a_card(finished: Path) -> None:
    with safe_open(finished / "adapter" / KOHYA_FILE, framework="pt") as opened:
        header = opened.metadata()
    assert header["ss_output_name"] == "tiny"
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"
    card = (finished / "adapter" / "README.md").read_text()
    for part in (
        "base model | sd15 (SD 1.x)",
        "32 x 32 pixels",
        "license: other",
        "rank 4, convolutions 3",
        "fd_effnet",
        "lora_dae.attach",
        KOHYA_FILE,
    ):
        assert part in card, part
    assert (finished / "adapter" / "grid.png").is_file()


def test_smaller_and_half_precision(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_run(request(finished, tmp_path, format="kohya", dtype="fp16", resize_rank=2), Console())
    assert "keeps" in capsys.readouterr().out
    tensors = load_file(tmp_path / KOHYA_FILE)
    assert {v.shape[0] for k, v in tensors.items() if "lora_down" in k} == {2}
    assert {v.dtype for k, v in tensors.items() if "lora_" in k and "alpha" not in k} == {torch.float16}
    assert not (tmp_path / FILE_NAME).exists()
    assert (tmp_path / "enhancement.safetensors").is_file()


def test_push_without_a_token_lists_what_would_go(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_dae.export.push.get_token", lambda: None)
    export_run(request(finished, tmp_path, format="kohya", push="someone/fashion"), Console(width=200))
    said = capsys.readouterr().out
    assert "no hub token" in said and "someone/fashion" in said and KOHYA_FILE in said


def test_a_push_sends_what_this_export_writes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the whole model that an earlier export has left there, nor the grid of somebody's photos beside it."""
    sent: dict[str, Any] = {}
    hub = SimpleNamespace(
        create_repo=lambda repo, **options: sent.update(private=options["private"]),
        model_info=lambda repo: SimpleNamespace(private=True),
        upload_folder=lambda **options: sent.update(files=set(options["allow_patterns"])),
    )
    monkeypatch.setattr("lora_dae.export.push.get_token", lambda: "a token")
    monkeypatch.setattr("lora_dae.export.push.HfApi", lambda: hub)
    export_run(request(finished, tmp_path), Console())
    assert (tmp_path / "merged").is_dir() and (tmp_path / "grid.png").is_file()
    export_run(request(finished, tmp_path, format=None, push="someone/fashion"), Console())
    adapter = {"README.md", *(file.name for file in (finished / "adapter").glob("*.safetensors"))}
    assert {FILE_NAME, KOHYA_FILE, "enhancement.safetensors"} < adapter
    assert sent == {"private": True, "files": adapter}
    assert "uploading to someone/fashion, which is private: README.md, adapter_kohya" in capsys.readouterr().out
    card = (tmp_path / "README.md").read_text()
    assert "grid.png" not in card and "merged/" not in card and KOHYA_FILE in card
    export_run(request(finished, tmp_path, format="kohya", push="someone/fashion", grid=True), Console())
    assert sent["files"] == adapter - {FILE_NAME} | {"grid.png"}
    assert "grid.png" in (tmp_path / "README.md").read_text()
    export_run(request(finished, tmp_path, format="merged", push="someone/fashion"), Console())
    assert {"merged/model_index.json", "README.md"} < sent["files"] and FILE_NAME not in sent["files"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "onnx"}, "format=onnx is unknown"),
        ({"dtype": "int4"}, "dtype=int4 is unknown"),
        ({"resize_rank": 0}, "resize_rank=0 is below 1"),
        ({"format": "merged", "resize_rank": 2}, "writes none of"),
    ],
)
def test_bad_requests(changes: dict[str, object], message: str, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export_run(request(finished, tmp_path / "out", **changes), Console())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "format", "message"),
    [
        ("textual_inversion", "merged", "learned words"),
        ("loha", "kohya", "trained loha, which format=kohya cannot hold"),
        ("lokr", "all", "trained lokr, which format=all cannot hold"),
    ],
)
def test_adapters_that_a_format_has_no_place_for(kind: str, format: str, message: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "adapter").mkdir(parents=True)
    training.write_config(Config(run_dir=str(run_dir), adapter=AdapterConfig(kind=kind)))
    with pytest.raises(ConfigError, match=message):
        export_run(request(run_dir, tmp_path / "out", format=format), Console())
    assert not (tmp_path / "out").exists()


def test_the_cards_code_draws(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, in the folder where it lies; only the backbone's place is filled in."""
    card = (finished / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/sd15", str(finished.parent / "sd15"))
    monkeypatch.chdir(finished / "adapter")
    found: dict[str, Any] = {}
    exec(code.replace("guidance_scale=", "height=32, width=32, num_inference_steps=2, guidance_scale="), found)
    assert found["image"].size == (32, 32)
    assert found["pipe"]._lora_dae.module is not None


@pytest.mark.parametrize(
    ("backbone", "says", "says_not"),
    [
        (
            BackboneConfig(name="sdxl"),
            ['base_model: "stabilityai/stable-diffusion-xl-base-1.0"', "at 462165984030d82259a11f4367a4eed129e94a7b",
             'from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", revision="462165'],
            [],
        ),
        (
            BackboneConfig(name="file", path="/home/somebody/models/noob.safetensors", prediction_type="v_prediction",
                           zero_terminal_snr=True, vae_path="/home/somebody/taesdxl"),
            ["| noob.safetensors (SDXL, v_prediction, zero terminal SNR, VAE taesdxl) |",
             'from_single_file("path/to/noob.safetensors")', "prediction_type='v_prediction', rescale_betas"],
            ["somebody", "base_model:"],
        ),
        (BackboneConfig(), ["the one in lora_dae (SDXL)", "lora_dae.__path__[0]"], ["base_model:", "DDIMScheduler"]),
    ],
    ids=["hub", "file", "shipped"],
)  # fmt: skip
def test_the_card_names_the_base_model(backbone: BackboneConfig, says: list[str], says_not: list[str]) -> None:
    """The hub's head takes ids of the hub alone, and nobody learns where somebody keeps files."""
    card = model_card(Config(run_dir="run", backbone=backbone), "sdxl", [FILE_NAME], None, False)
    assert all(part in card for part in says), card
    assert not any(part in card for part in says_not), card


def test_the_card_tells_how_to_use_every_file() -> None:
    cfg = Config(run_dir="run")
    cfg.data.name, cfg.data.root, cfg.data.captions.trigger = "viton_hd", "/home/somebody/zalando", "sks"
    others = ["merged", "merged.safetensors", "unet", "learned_embeds.safetensors", "peft_adapter.safetensors"]
    card = model_card(cfg, "sd1", [FILE_NAME, *others], None, False)
    use = card.split("## Use")[1]
    assert all(f'"{name}"' in use or f"`{name}" in use for name in [FILE_NAME, *others])
    assert 'pipe("sks a woman' in use and 'pipe("<garment> sks a woman' in use
    assert "viton_hd, zalando, " in card and "CC BY-NC 4.0" in card and "somebody" not in card


def test_the_card_attaches_where_the_enhancement_was_trained() -> None:
    cfg = Config(run_dir="run")
    assert "placement" not in model_card(cfg, "sd1", [FILE_NAME], None, False)
    cfg.enhancement.placement = "direction"
    assert 'strength=1, placement="direction")' in model_card(cfg, "sd1", [FILE_NAME], None, False)


def test_damaged_adapter_is_named(finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "run"))
    file = copy / "adapter" / FILE_NAME
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        export_run(request(copy, tmp_path / "out"), Console())


def test_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stood there stays."""
    file = save_tensors({"x": torch.zeros(3)}, tmp_path / "a.safetensors", {})
    before = file.read_bytes()

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lora_dae.adapter.atomic.save_file", full)
    with pytest.raises(ConfigError, match=r"cannot write .*a.safetensors \(No space left on device\)"):
        save_tensors({"x": torch.ones(3)}, file, {})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ConfigError, match="No space left"), atomic(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "x").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == [file]


def test_command(finished: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "export.py"), f"run={finished}", "format=kohya", f"output={tmp_path / 'out'}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / KOHYA_FILE).is_file()


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_merged_folder_of_a_checkpoint_names_its_text_encoders_as_published(family: str, tmp_path: Path) -> None:
    """Stable Diffusion's own text_encoder/model.safetensors says text_model., and transformers 4 reads nothing else.

    Nor any other tokenizer than a vocab.json with a merges.txt, whose first line names its version.
    """
    folder = write_backbone(tmp_path / family, family)
    file, run_dir = write_single_file(tmp_path / "any.safetensors", folder), tmp_path / "run"
    options = ("backbone=file", f"backbone.configs={folder}", "conditioning=none", "enhancement=none")
    (run_dir / "adapter").mkdir(parents=True)
    training.write_config(config(file, run_dir, tmp_path / "cache", *options))
    export_run(request(run_dir, tmp_path / "out", format="merged"), Console())
    merged = tmp_path / "out" / "merged"
    assert {name.split(".")[0] for name in load_file(merged / "text_encoder" / "model.safetensors")} == {"text_model"}
    if family == "sdxl":
        second = load_file(merged / "text_encoder_2" / "model.safetensors")
        assert {name.split(".")[0] for name in second} == {"text_model", "text_projection"}
    for part in ("tokenizer", "tokenizer_2") if family == "sdxl" else ("tokenizer",):
        vocabularies = [json.loads((place / part / "vocab.json").read_text()) for place in (merged, folder)]
        merges = [(place / part / "merges.txt").read_text().splitlines()[1:] for place in (merged, folder)]
        assert vocabularies[0] == vocabularies[1] and merges[0] == merges[1] and len(merges[0]) > 0
    ours, published = (load_backbone(BackboneConfig(name="folder", path=str(path))) for path in (merged, folder))
    assert torch.equal(ours.encode_text(["a red dress"]), published.encode_text(["a red dress"]))


def test_merged_folder_of_a_paired_run_takes_the_source(tiny_backbone: Path, tmp_path: Path) -> None:
    """Its UNet equals the run's on [noisy latents, source], the source as the pipeline shows it: not scaled."""
    run_dir = tmp_path / "run"
    training.run(
        config(
            tiny_backbone, run_dir, tmp_path / "cache", "trainer.max_steps=2", "enhancement=none", "adapter.rank=2",
            "evaluation.frozen=false", "optimizer.learning_rate=0.05", "data.train_size=8",
        )
    )  # fmt: skip
    export_run(request(run_dir, tmp_path / "out", format="merged"), Console())
    index = json.loads((tmp_path / "out" / "merged" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    backbone = load_run(run_dir).backbone
    merged, scale = backbone.unet, float(backbone.vae.config.scaling_factor)
    assert scale != 1
    sample, text = torch.randn(1, 16, 16, 16), torch.randn(1, 16, 32)
    with torch.no_grad():
        expected = merged(sample, 500, text).sample
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        plain = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "merged" / "unet")
        shown = torch.cat([sample[:, :8], sample[:, 8:] / scale], dim=1)
        torch.testing.assert_close(plain(shown, 500, text).sample, expected, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="source photo's channels"):
        export_run(request(run_dir, tmp_path / "out", format="merged_file"), Console())


def test_merged_folder_of_a_paired_full_finetuning_takes_the_source(tiny_backbone: Path, tmp_path: Path) -> None:
    """Its UNet has the source's channels in itself, without a source input beside it."""
    run_dir = tmp_path / "run"
    options = ("adapter.full_finetune=true", "conditioning=source", "enhancement=none")
    cfg = config(tiny_backbone, run_dir, tmp_path / "cache", *options)
    unet = load_backbone(cfg.backbone).unet
    attach_source_input(unet)
    save_merged(unet, run_dir / "adapter" / "unet")
    training.write_config(cfg)
    export_run(request(run_dir, tmp_path / "out", format="merged"), Console())
    index = json.loads((tmp_path / "out" / "merged" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
