"""sample.py without a network: how its files are called, and what a run is shown of a source photo."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import tiny_unet
from compose import config
from hydra import compose, initialize_config_dir
from PIL import Image
from rich.console import Console

from lora_dae.adapter.source_input import attach_source_input, save_source_input
from lora_dae.config import ConfigError, conf_dir
from lora_dae.data.decode import upright_rgb
from lora_dae.data.square import Framing, fit_square
from lora_dae.sampling import command, sheet
from lora_dae.sampling.command import SampleRequest, draw_samples, request_of

SIDE = 64


class Run:
    """Stands for a loaded run: its pictures are the source photo that it is shown, or gray."""

    backbone = SimpleNamespace(device=torch.device("cpu"), rest=lambda device: None)
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
        {"vae": "taesd"}, {"weights": "bf16"}, {"batch_size": 1},
        {"prompt": f"{eight} jeans"}, {"prompt": f"{eight} shorts"}, {"prompt": "a red, dress"},
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


def test_memory_is_saved_as_asked_and_what_does_not_draw_leaves_the_gpu(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[torch.device, str, None]] = []
    resting: list[torch.device] = []
    one = Run()
    one.backbone = SimpleNamespace(device=torch.device("cpu"), rest=resting.append)

    def load(_: Path, device: torch.device, weights: str, vae: None) -> Run:
        loaded.append((device, weights, vae))
        return one

    monkeypatch.setattr(command, "load_run", load)
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(command, "best_device", lambda name=name: torch.device(name))
        draw(run, weights="int8", batch_size=2)
    assert loaded == [(torch.device("cpu"), "int8", None), (torch.device("cuda"), "int8", None)]
    assert one.cfg.sampling.batch_size == 2 and resting == [torch.device("cuda")]
    with pytest.raises(ConfigError, match="backbone.weights=int4 is unknown"):
        draw(run, weights="int4")
    with pytest.raises(ConfigError, match="sampling.batch_size=0 is below 1"):
        draw(run, batch_size=0)
    assert len(loaded) == 2


def test_pictures_are_drawn_in_the_precision_that_the_run_trained_in(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine where bfloat16 is the faster one."""
    cfg, drawn = command.read_config(run), list[bool]()
    monkeypatch.setattr("lora_dae.backbone.precision._cpu_gains", lambda: True)
    monkeypatch.setattr(Run, "drawer", lambda self, bf16: drawn.append(bf16) or self)
    for precision in ("32-true", "bf16-mixed", "auto"):
        trainer = {**cfg.trainer, "precision": precision}
        monkeypatch.setattr(command, "read_config", lambda _, trainer=trainer: replace(cfg, trainer=trainer))
        draw(run)
    assert drawn == [False, True, True]


def test_a_run_is_drawn_without_a_file_that_only_its_evaluation_needed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = command.read_config(run)
    gone = replace(cfg, evaluation=replace(cfg.evaluation, lpips=str(run / "gone.safetensors")))
    monkeypatch.setattr(command, "read_config", lambda _: gone)
    assert draw(run).is_file()


def test_an_empty_caption_is_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the example's, whose source photo is drawn with."""
    pairs = [SimpleNamespace(caption="a red dress", source=np.full((SIDE, SIDE, 3), k, np.uint8)) for k in range(4)]
    drawn: list[tuple[list[str], int]] = []

    def images(self: Run, prompts: list[str], sources: np.ndarray, strength: float) -> np.ndarray:
        drawn.append((prompts, int(sources[0, 0, 0, 0])))
        return sources

    monkeypatch.setattr(command, "load_split", lambda *_: pairs)
    monkeypatch.setattr(Run, "images", images)
    for prompt in ("", None):
        draw(run, prompt=prompt, example=3)
    assert drawn == [([""], 3), (["a red dress"], 3)]


def asked(*words: str) -> SampleRequest:
    """As the command reads its words."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return request_of(compose("sample", list(words)))


@pytest.mark.parametrize("word", ["num_images=2.5", "strengths=0.5", "seed=first", "prompt=[a,b]"])
def test_values_of_another_type_are_refused_in_one_sentence(word: str) -> None:
    key = word.split("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}=[^\n]* is of a type that it does not take[^\n]*$"):
        asked("run=x", word)


def test_values_are_those_of_the_words(run: Path) -> None:
    """A number is a caption too, and whole numbers are strengths."""
    request = asked("run=x", "prompt=501", "strengths=[0,1]", "num_images=2")
    assert (request.prompt, request.strengths, request.num_images, request.seed) == ("501", [0.0, 1.0], 2, None)
    with pytest.raises(ConfigError, match="run is missing"):
        asked("prompt=501")
    with pytest.raises(ConfigError, match=r"strengths=\[\] names none"):
        draw(run, strengths=[])


def test_a_word_wider_than_the_sheet_is_broken() -> None:
    """Languages without spaces write captions of one word. Nothing is lost, and no line leaves the sheet."""
    font = sheet._font(13, "")
    for text in ("red-dress," * 60, "a " + "x" * 200 + " b c", "i"):
        lines = sheet._wrap(text, font, 256)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "") and max(map(font.getlength, lines)) <= 256
    assert sheet._wrap("a red dress", font, 256) == ["a red dress"]
    assert sheet._wrap("xy", font, 1) == ["x", "y"]  # narrower than any letter


def test_captions_in_chinese_get_a_font_that_has_their_letters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where matplotlib finds one; the others keep theirs, and where there is none, that is said."""
    own = sheet._font(13, "a red dress").path
    other = own.replace("DejaVuSans.ttf", "DejaVuSansMono.ttf")
    monkeypatch.setattr(sheet, "_cjk_font", sheet._cjk_font.__wrapped__)
    found = [SimpleNamespace(name="Noto Sans CJK JP", fname=other, index=0)]
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", found)
    assert sheet._font(13, "红色格子衬衫").path == other and sheet._font(13, "a red dress").path == own != other
    monkeypatch.setattr("matplotlib.font_manager.fontManager.ttflist", [])
    sheet.say_once.cache_clear()
    assert sheet._font(13, "红色格子衬衫").path == own and "install one" in capsys.readouterr().err
