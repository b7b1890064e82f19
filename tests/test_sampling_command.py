"""sample.py without a network: how its files are called, and what a run is shown of a source photo."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import tiny_unet
from compose import config
from PIL import Image
from rich.console import Console

from lora_dae.adapter.source_input import attach_source_input, save_source_input
from lora_dae.data.decode import upright_rgb
from lora_dae.data.square import Framing, fit_square
from lora_dae.sampling import command
from lora_dae.sampling.command import SampleRequest, draw_samples

SIDE = 64


class Run:
    """Stands for a loaded run: its pictures are the source photo that it is shown, or gray."""

    backbone = SimpleNamespace(device=torch.device("cpu"))
    cfg: Any = None

    def drawer(self, bf16: bool) -> Run:
        return self

    def images(self, prompts: list[str], sources: np.ndarray | None, strength: float) -> np.ndarray:
        return np.full((len(prompts), SIDE, SIDE, 3), 128, np.uint8) if sources is None else sources


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder on pairs, as far as sample.py looks into it."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "pytorch_lora_weights.safetensors").touch()
    cfg = config(tmp_path / "backbone", folder, tmp_path / "cache", "conditioning=source", f"data.resolution={SIDE}")
    monkeypatch.setattr(command, "read_config", lambda run_dir: cfg)
    monkeypatch.setattr(command, "load_run", lambda *_, **__: Run())
    monkeypatch.setattr(command, "choose_precision", lambda *_: "32-true")
    return folder


def draw(run: Path, **asked: Any) -> Path:
    none = dict.fromkeys(SampleRequest.__dataclass_fields__)
    output = str(run.parent / "made")
    values = {**none, "run": str(run), "num_images": 1, "prompt": "a red dress", "output": output, **asked}
    return draw_samples(SampleRequest(**values), Console())


def test_no_command_writes_over_the_pictures_of_another(run: Path) -> None:
    photos = {color: run.parent / f"{color}.png" for color in ("red", "blue")}
    for color, path in photos.items():
        Image.new("RGB", (SIDE, SIDE), color).save(path)
    eight = "a woman wearing a red plaid shirt and"
    asked: list[dict[str, Any]] = [
        {}, {"source": str(photos["red"])}, {"source": str(photos["blue"])}, {"guidance_scale": 3.0},
        {"source_guidance_scale": 3.0}, {"num_inference_steps": 9}, {"scheduler": "ddim"}, {"seed": 5},
        {"sampling_method": "unsharp"}, {"strength": 0.5}, {"strengths": [0.0, 1.0]}, {"num_images": 2},
        {"vae": "taesd"}, {"prompt": f"{eight} jeans"}, {"prompt": f"{eight} shorts"}, {"prompt": "a red, dress"},
    ]  # fmt: skip
    made = [draw(run, **change) for change in asked]
    other = run.parent / "other"
    (other / "adapter").mkdir(parents=True)
    made.append(draw(other))
    trained = run / "adapter" / "pytorch_lora_weights.safetensors"
    before = trained.stat().st_mtime_ns
    os.utime(trained, ns=(0, 0))  # trained on
    made.append(draw(run))
    os.utime(trained, ns=(before, before))
    pictures = [len(change.get("strengths", [1.0])) * change.get("num_images", 1) for change in [*asked, {}, {}]]
    files = set((run.parent / "made").iterdir())
    assert len(set(made)) == len(made) and len(files) == sum(pictures) + len(made)  # each with its sheet
    assert draw(run) == made[0] and set((run.parent / "made").iterdir()) == files  # the same command, the same files


@pytest.mark.parametrize("prompt", ["red-dress," * 60, "红色格子衬衫" * 40], ids=["tags", "chinese"])
def test_a_long_word_is_no_name_that_a_file_system_refuses(prompt: str, run: Path) -> None:
    """Most take 255 bytes."""
    path = draw(run, prompt=prompt)
    assert path.is_file() and path.name.startswith(f"seed1234_{prompt[:6]}")
    assert max(len(file.name.encode()) for file in path.parent.iterdir()) < 128


def test_a_source_photo_is_shown_as_training_showed_most(run: Path) -> None:
    """A portrait, its upper part transparent: cropped to its middle, on the run's background."""
    unet = tiny_unet()
    attach_source_input(unet)
    save_source_input(unet, run / "adapter", Framing(whole=False, background="blue").header())
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 4), dtype=np.uint8)
    pixels[:20, :, 3] = 0
    Image.fromarray(pixels).save(run.parent / "garment.png")
    draw(run, source=str(run.parent / "garment.png"))
    (picture,) = (run.parent / "made").glob("*_s1_0.png")
    middle = upright_rgb(Image.fromarray(pixels[8:56]), "blue")
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), fit_square(middle, SIDE, whole=True))
