"""The preview page: what it draws is what the run draws, and a headless browser can use it."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compose import config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_dae.config import Config, ConfigError
from lora_dae.data.catalog import say_once
from lora_dae.data.square import Framing, fit_square
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.sampling.finished import read_config
from lora_dae.sampling.load import load_run
from lora_dae.studio_app import __main__ as command
from lora_dae.studio_app.preview import Preview, newest_run, told
from lora_dae.training import run as training

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
# Screenshots land here when the variable is set, to be looked at.
SCREENSHOTS = os.environ.get("LORA_DAE_SCREENSHOTS")


@pytest.fixture(scope="module")
def finished(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs, with an enhancement that visibly does something."""
    root = tmp_path_factory.mktemp("preview")
    training.run(
        config(
            tiny_backbone, root / "runs" / "one", root / "cache", "trainer.max_steps=2", "adapter.rank=2",
            "evaluation.frozen=false", "evaluation.num_samples=2", "data.train_size=8",
        )
    )  # fmt: skip
    module = EnhancementModule()
    torch.manual_seed(0)
    torch.nn.init.normal_(module.gain.output.weight)
    torch.nn.init.normal_(module.gain.output.bias)
    save_enhancement(module, root / "runs" / "one" / "adapter" / "enhancement.safetensors")
    return root / "runs" / "one"


@pytest.fixture(scope="module")
def preview(finished: Path) -> Preview:
    return Preview.load(finished)


def test_draws_what_the_run_draws(preview: Preview, finished: Path) -> None:
    pair = preview.example(1)
    plain, chosen = preview.draw("a red dress", pair.source, 3, 2, 2.0, 1.5, 0.5)
    run = load_run(finished)
    run.cfg.sampling.seed, run.cfg.sampling.num_inference_steps = 3, 2
    run.cfg.sampling.guidance_scale, run.cfg.sampling.source_guidance_scale = 2.0, 1.5
    drawer = run.drawer(preview.bf16)
    assert np.array_equal(plain, drawer.images(["a red dress"], pair.source[None], 0.0)[0])
    assert np.array_equal(chosen, drawer.images(["a red dress"], pair.source[None], 0.5)[0])
    assert not np.array_equal(plain, chosen)
    assert np.array_equal(preview.draw("a red dress", pair.source, 3, 2, 2.0, 1.5, 0.0)[1], plain)
    wide = np.full((40, 90, 3), 128, np.uint8)  # a photo of any size
    assert preview.draw("a red dress", wide, 3, 2, 2.0, 1.5, 0.0)[0].shape == (64, 64, 3)


def test_a_source_photo_is_framed_as_training_framed_most(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "source_input.safetensors"
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    save_file(tensors, file, {**header, **Framing(whole=False).header()})
    portrait = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    preview = Preview.load(tmp_path / "run")
    shown = SimpleNamespace(images=lambda prompts, sources, strength: sources)
    monkeypatch.setattr(preview.run, "drawer", lambda bf16: shown)
    picture = preview.draw("a red dress", portrait, 3, 2, 2.0, 1.5, 0.0)[0]
    np.testing.assert_array_equal(picture, fit_square(portrait[5:45], 64, whole=True))  # its middle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "write a caption"),
        ({"steps": 0}, "steps go from 1"),
        ({"strength": 3.0}, "the strength from 0"),
        ({"guidance": -1.0}, "guidance_scale=-1.0 is below 0"),
        ({"seed": None}, "give a seed"),
    ],
)
def test_values_outside_the_page_are_refused(change: dict[str, Any], message: str, preview: Preview) -> None:
    values = {"prompt": "a dress", "source": None, "seed": 0, "steps": 2, "guidance": 1.0, "source_guidance": 1.0,
              "strength": 0.0, **change}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        preview.draw(**values)


def test_what_sample_py_refuses_is_refused_here(preview: Preview, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that changes what guidance adds, where the sliders leave no guidance."""
    monkeypatch.setattr(preview.run.cfg.sampling, "method", "apg")
    with pytest.raises(ConfigError, match="sampling.method=apg changes what guidance adds"):
        preview.draw("a dress", None, 0, 2, 1.0, 1.0, 0.0)


def test_a_drawing_tells_every_digit_of_its_seed() -> None:
    assert told(0.5, 2**31 - 1) == "Strength 0.5, seed 2147483647"


def test_newest_finished_run_is_taken(tmp_path: Path) -> None:
    """Not one that stopped while its enhancement was judged, which cannot be drawn with."""
    assert newest_run(tmp_path / "nowhere") is None
    for age, name in enumerate(("stopped", "new", "old")):
        adapter = tmp_path / name / "adapter"
        adapter.mkdir(parents=True)
        training.write_config(Config(run_dir=str(tmp_path / name)))
        if name != "stopped":
            (adapter / "enhancement.safetensors").touch()
        os.utime(adapter, (1000 - age, 1000 - age))
    (tmp_path / "unfinished").mkdir()
    training.write_config(Config(run_dir=str(tmp_path / "unfinished")))
    assert newest_run(tmp_path) == tmp_path / "new"


def test_a_run_whose_photos_are_gone_still_draws(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    cfg = read_config(run_dir)
    cfg.run_dir, cfg.data.name, cfg.data.root = str(run_dir), "folder", str(tmp_path / "moved")
    training.write_config(cfg)
    preview = Preview.load(run_dir)
    assert len(preview.examples) == 0
    said = capsys.readouterr().err
    assert f"no held-out examples are shown: data.root={tmp_path / 'moved'} is not a folder" in said
    assert preview.draw("a dress", None, 0, 2, 1.0, 1.0, 0.0)[0].shape == (64, 64, 3)


def test_an_empty_test_split_is_said(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say_once.cache_clear()  # what was said once is not said again
    monkeypatch.setattr("lora_dae.studio_app.preview.load_split", lambda data, name: [])
    assert len(Preview.load(finished).examples) == 0
    assert "no held-out examples are shown: the test split is empty" in capsys.readouterr().err


def test_shipped_backbone_alone(tmp_path: Path) -> None:
    """No run at all: it draws, and there is no strength to choose."""
    preview = Preview.load(None, str(tmp_path))
    assert not preview.has_strength and not preview.has_source and len(preview.examples) == 16
    plain, chosen = preview.draw(preview.example(0).caption, None, 0, 1, 1.0, 1.0, 0.0)
    assert plain.shape == (128, 128, 3) and np.array_equal(plain, chosen)


@pytest.mark.parametrize(("words", "message"), [(["runs/x"], "no key=value"), (["prt=1"], "prt"), (["port=x"], "port")])
def test_mistakes_on_the_command_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit):
        command.main([])
    assert "pip install 'lora-dae[app]'" in capsys.readouterr().err


def test_serves_this_machine_alone_unless_told_otherwise(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio = pytest.importorskip("gradio", reason="gradio (extra app) is not installed: the page was NOT tested")
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: seen.append(options))
    command.main([f"run={finished}"])
    command.main([f"run={finished}", "host=0.0.0.0", "port=7999"])
    assert [(o["server_name"], o["server_port"], o["share"]) for o in seen] == [
        ("127.0.0.1", 7860, False), ("0.0.0.0", 7999, False),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def address(preview: Preview, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("gradio", reason="gradio (extra app) is not installed: the page was NOT tested")
    from lora_dae.studio_app.page import build_page, serve_page

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = build_page(preview)
    serve_page(page, "127.0.0.1", port, wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: the preview page was NOT tested")
def test_page_in_a_browser(address: str, preview: Preview, tmp_path: Path) -> None:
    """An example comes up by itself; drawing fills three pictures and the gallery; the download is a real picture."""
    reason = "playwright is not installed: the preview page was NOT tested"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True).new_page()
        page.set_default_timeout(60_000)
        foreign: list[str] = []
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else foreign.append(r.url))
        page.goto(address)
        box = page.locator("#prompt textarea")
        page.wait_for_function("document.querySelector('#prompt textarea')?.value.length > 0")
        assert box.input_value() == preview.example(0).caption
        page.wait_for_selector("#real img")
        box.fill("a red dress")
        steps = page.locator("#steps input[type=number]")
        steps.fill("2")
        steps.blur()
        page.click("#draw")
        page.wait_for_selector("#plain img")
        page.wait_for_selector("#chosen img")
        page.wait_for_selector("#gallery img")
        sources = [page.locator(f"#{name} img").first.get_attribute("src") for name in ("plain", "chosen", "real")]
        assert len(set(sources)) == 3
        if SCREENSHOTS:
            page.screenshot(path=f"{SCREENSHOTS}/preview.png", full_page=True)
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width > 3 * 64
        box.fill("")
        page.click("#draw")
        page.get_by_text("write a caption").first.wait_for()
        assert foreign == [], "the page asked other hosts"
        browser.close()
