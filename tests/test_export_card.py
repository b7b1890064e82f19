"""The card beside exported files says what is so, its code draws, and an export leaves alone what others wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from adapter_models import randomize
from compose import config
from family_models import write_backbone
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from test_export import request

from lora_dae.adapter.files import FILE_NAME, save_adapter, trained_megabytes
from lora_dae.adapter.inject import inject
from lora_dae.adapter.kohya import KOHYA_FILE
from lora_dae.adapter.source_input import attach_source_input, save_source_input
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, Config, ConfigError
from lora_dae.export.card import model_card
from lora_dae.export.command import export_run, write_card
from lora_dae.sampling.finished import ENHANCEMENT_FILE, read_config
from lora_dae.training import run as training


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("card") / "sd15", "sd15")


def write_run(backbone: Path, run_dir: Path, *options: str) -> Path:
    """A run's folder as training leaves it: an adapter of random weights of rank 4, no enhancement, no pictures."""
    cfg = config(
        backbone, run_dir, run_dir.parent / "cache", "backbone=folder", "enhancement=none", "data.resolution=32",
        "adapter.rank=4", *options,
    )  # fmt: skip
    unet = load_backbone(cfg.backbone).unet
    if cfg.conditioning == "source":
        attach_source_input(unet)
    inject(unet, cfg.adapter)
    randomize(unet)
    (run_dir / "adapter").mkdir(parents=True)
    save_adapter(unet, run_dir / "adapter")
    if cfg.conditioning == "source":
        save_source_input(unet, run_dir / "adapter")
    training.write_config(cfg)
    return run_dir


@pytest.fixture(scope="module")
def text_run(sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing here writes into it."""
    return write_run(sd15, tmp_path_factory.mktemp("text") / "run", "conditioning=none")


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


def test_the_merged_code_of_a_paired_run_draws(sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in the card, in the folder where it lies."""
    options = ("conditioning=source", "sampling.guidance_scale=3", "sampling.source_guidance_scale=1.5")
    run = write_run(sd15, tmp_path / "run", *options)
    out = export_run(request(run, tmp_path / "out", format="merged"), Console())
    code = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ", guidance_scale=3, " in code and ", image_guidance_scale=1.5)" in code
    Image.new("RGB", (32, 32), "red").save(out / "mannequin.jpg")
    monkeypatch.chdir(out)
    found: dict[str, Any] = {}
    exec(code.replace("image=Image", "num_inference_steps=2, image=Image"), found)
    assert type(found["pipe"]).__name__ == "StableDiffusionInstructPix2PixPipeline"
    assert found["image"].size == (32, 32)


def test_the_card_says_what_has_no_effect_elsewhere() -> None:
    """The enhancement on a merged model, the source photo in kohya's file."""
    files = ["enhancement.safetensors", "merged", KOHYA_FILE]
    paired = model_card(Config(run_dir="run"), "sd1", files, None, False)
    assert "`enhancement.safetensors` changes nothing in a merged model" in paired
    assert "The file draws from text alone" in paired and "--include 'merged/*'" in paired
    alone = model_card(Config(run_dir="run", conditioning="none"), "sd1", files[1:], None, False)
    assert not any(part in alone for part in ("text alone", "image_guidance_scale", "enhancement.safetensors"))


def test_the_card_names_both_scales_where_attach_has_one() -> None:
    cfg = Config(run_dir="run")
    assert "by one scale" not in model_card(cfg, "sd1", [FILE_NAME], None, False)
    cfg.sampling.guidance_scale, cfg.sampling.source_guidance_scale = 3.0, 1.5
    card = model_card(cfg, "sd1", [FILE_NAME], None, False)
    assert "by one scale; this run was drawn with 3 for the caption and 1.5 for the source photo" in card


@pytest.mark.parametrize("conditioning", ["none", "source"])
def test_the_card_calls_a_dora_exact_in_lycoris_alone(conditioning: str) -> None:
    """A checkpoint, which has no place for the source photo, is the way into the other programs."""
    cfg = Config(run_dir="run", conditioning=conditioning, adapter=AdapterConfig(use_dora=True))
    card = model_card(cfg, "sd1", [KOHYA_FILE], None, False)
    assert "LyCORIS applies it exactly; ComfyUI and Forge scale each row by |W + dW| / |W|" in card
    assert ("format=merged_file" in card) == (conditioning == "none")


def test_the_card_of_an_adapter_that_was_made_smaller(sd15: Path, tmp_path: Path) -> None:
    """The rank in the files and what it keeps; the metrics are those of the whole adapter, and are said to be."""
    run = write_run(sd15, tmp_path / "run", "conditioning=none")
    (run / "metrics.json").write_text(json.dumps({"methods": {"LoRA": {"fd": {"value": 1.5}}}}))
    small = export_run(request(run, tmp_path / "small", format="kohya", resize_rank=2), Console())
    whole = export_run(request(run, tmp_path / "whole", format="kohya"), Console())
    assert [header_of(folder / KOHYA_FILE)["ss_network_dim"] for folder in (small, whole)] == ["2", "4"]
    card, other = ((folder / "README.md").read_text() for folder in (small, whole))
    assert "; rank 4, convolutions 4; in these files at most 2, with " in card
    assert "| fd | 1.5 |" in card and "as it was trained, before its rank was made smaller" in card
    assert "; rank 4, convolutions 4 |" in other and "made smaller" not in other


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        ({}, "300 steps of 16"),
        ({"devices": 2, "num_nodes": 3, "accumulate_grad_batches": 4}, "300 steps of 384"),
        ({"devices": [0, 3], "accumulate_grad_batches": 4}, "300 steps of 128"),
        ({"devices": "auto", "early_stop_patience": 3}, "up to 300 steps of 16 per device"),
        ({"devices": 1, "early_stop_patience": None}, "300 steps of 16"),
    ],
)
def test_the_card_counts_steps_and_samples_as_they_were(trainer: dict[str, Any], told: str) -> None:
    cfg = Config(run_dir="run", trainer={"max_steps": 300, **trainer})
    assert f"| training | {told}, seed 0 |" in model_card(cfg, "sd1", [FILE_NAME], None, False)


def test_kohyas_header_counts_them_too(sd15: Path, text_run: Path, tmp_path: Path) -> None:
    """Steps that early stopping may have cut are in the most that there could be alone."""
    options = ("trainer.devices=2", "trainer.accumulate_grad_batches=3", "trainer.early_stop_patience=2")
    run = write_run(sd15, tmp_path / "run", "conditioning=none", "data.batch_size=4", *options)
    headers = [
        header_of(export_run(request(one, tmp_path / f"out{number}", format="kohya"), Console()) / KOHYA_FILE)
        for number, one in enumerate((run, text_run))
    ]
    assert [header["ss_total_batch_size"] for header in headers] == ["24", "4"]
    assert [header["ss_max_train_steps"] for header in headers] == ["4", "4"]
    assert "ss_steps" not in headers[0] and headers[1]["ss_steps"] == "4"


def test_merging_times_no_attention(text_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_dae.sampling.load.choose_attention", lambda *a, **options: pytest.fail("it was timed"))
    out = export_run(request(text_run, tmp_path, format="merged"), Console())
    assert (out / "merged" / "model_index.json").is_file()


def test_the_card_tells_of_what_was_written_alone(text_run: Path, tmp_path: Path) -> None:
    (tmp_path / "somebody.safetensors").write_bytes(b"x")
    for name in (KOHYA_FILE, FILE_NAME):  # its own card is written anew
        file_format = "kohya" if name == KOHYA_FILE else "diffusers"
        export_run(request(text_run, tmp_path, format=file_format), Console())
        assert f"| files | {name} |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["README.md", "grid.png", "merged", "merged.safetensors", FILE_NAME, KOHYA_FILE])
def test_what_others_wrote_is_not_written_over(name: str, text_run: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(ConfigError, match=f"has a {name} that no export wrote"):
        export_run(request(text_run, tmp_path, format="kohya"), Console())
    assert list(tmp_path.iterdir()) == [tmp_path / name] and (tmp_path / name).read_text() == "somebody's"


def test_a_part_of_the_run_is_not_copied_over_what_others_wrote(text_run: Path, tmp_path: Path) -> None:
    run, out = shutil.copytree(text_run, tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    for folder in (run / "adapter", out):
        (folder / ENHANCEMENT_FILE).write_text("somebody's")
    with pytest.raises(ConfigError, match=f"has a {ENHANCEMENT_FILE} that no export wrote"):
        export_run(request(run, out, format="kohya"), Console())
    assert list(out.iterdir()) == [out / ENHANCEMENT_FILE]


def test_what_a_killed_write_has_left_is_no_part_of_an_adapter(sd15: Path, tmp_path: Path) -> None:
    """Half a file, and half a UNet's folder, under the names that they have until they are whole."""
    run = write_run(sd15, tmp_path / "run", "conditioning=none")
    size = trained_megabytes(run / "adapter")
    for name in (".source_input.safetensors.partial7.safetensors", ".unet.partial7/diffusion.safetensors"):
        (run / "adapter" / name).parent.mkdir(exist_ok=True)
        (run / "adapter" / name).write_bytes(b"half")
    assert trained_megabytes(run / "adapter") == size > 0
    out = export_run(request(run, tmp_path / "out", format="kohya"), Console())
    assert {file.name for file in out.iterdir()} == {KOHYA_FILE, "README.md"}
    write_card(run, read_config(run), "sd1", run / "adapter")
    assert f"| files | {FILE_NAME} |" in (run / "adapter" / "README.md").read_text()
