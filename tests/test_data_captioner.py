"""The captioner fills gaps, goes on where it stopped, and waits when a server is busy."""

from __future__ import annotations

import base64
import io
import json
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor
from vision_models import letters, write_vlm

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data import captioner
from lora_dae.data.__main__ import main
from lora_dae.data.captioner import LONGEST_ANSWER, endpoint_captioner, fill_captions, transformers_captioner
from lora_dae.data.sources import read_entries


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photos of one color each; one has a caption, one file is broken."""
    root = tmp_path / "photos"
    root.mkdir()
    for name, color in (("a", (250, 0, 0)), ("b", (0, 250, 0)), ("c", (0, 0, 250))):
        Image.new("RGB", (32, 32), color).save(root / f"{name}.png")
    (root / "a.txt").write_text("a red dress")
    (root / "d.png").write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture
def server() -> Iterator[tuple[str, list[int]]]:
    """Answers like a chat-completions server: names the brightest channel; busy at the first request."""
    answers: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions" or body["model"] != "tiny":
                self.send_error(404)
                return
            answers.append(429 if not answers else 200)
            self.send_response(answers[-1])
            self.send_header("Retry-After", "0")
            self.end_headers()
            url = body["messages"][0]["content"][1]["image_url"]["url"]
            pixel = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).getpixel((3, 3))
            word = ("red", "green", "blue")[pixel.index(max(pixel))]
            answer = {"choices": [{"message": {"content": f' "a {word}\n dress" '}}]}
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", answers
    httpd.shutdown()
    httpd.server_close()


def test_gaps_are_filled_and_then_trained_on(photos: Path, tmp_path: Path, server: tuple[str, list[int]]) -> None:
    endpoint, answers = server
    to = tmp_path / "out" / "captions.jsonl"
    command = ["caption", "--to", str(to), "--endpoint", endpoint, "--model", "tiny", "--per-minute", "100000"]
    main([*command, "data=folder", f"data.root={photos}"])
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert rows == [
        {"id": "b.png", "text": "a green dress", "model": "tiny"},
        {"id": "c.png", "text": "a blue dress", "model": "tiny"},
    ]
    assert answers == [429, 200, 200]
    main([*command, "data=folder", f"data.root={photos}"])  # all is known: nothing is asked
    assert len(answers) == 3
    (photos / "d.png").unlink()
    cfg = DataConfig(name="folder", root=str(photos), captions=CaptionConfig(file=str(to)))
    assert [entry.caption for entry in read_entries(cfg)] == ["a red dress", "a green dress", "a blue dress"]


def test_a_run_that_stops_goes_on(photos: Path, tmp_path: Path) -> None:
    cfg, to, asked = DataConfig(name="folder", root=str(photos)), tmp_path / "captions.jsonl", []

    def dies(photo: Image.Image) -> str:
        asked.append(photo.getpixel((0, 0)))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return "a dress"

    with pytest.raises(KeyboardInterrupt):
        fill_captions(cfg, to, dies, "x")
    assert fill_captions(cfg, to, dies, "x") == 2
    assert asked == [(0, 250, 0), (0, 0, 250), (0, 0, 250)]


def test_no_more_requests_than_allowed(server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty a minute are two seconds apart, by a clock that only sleeping moves; the busy answer counts as one."""
    now, requests = [1000.0], list[float]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    urlopen = urllib.request.urlopen

    def noted(*args: Any, **options: Any) -> Any:
        requests.append(now[0])
        return urlopen(*args, **options)

    monkeypatch.setattr(captioner, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    monkeypatch.setattr(urllib.request, "urlopen", noted)
    describe = endpoint_captioner(server[0], "tiny", "describe", per_minute=30)
    for _ in range(3):
        describe(Image.new("RGB", (8, 8)))
    assert requests == [1000, 1002, 1004, 1006]


def test_servers_that_do_not_caption_are_named(server: tuple[str, list[int]]) -> None:
    photo = Image.new("RGB", (8, 8))
    with pytest.raises(ConfigError, match="404"):
        endpoint_captioner(server[0], "another", "describe", 1e6)(photo)
    with pytest.raises(ConfigError, match="cannot be reached"):
        endpoint_captioner("http://127.0.0.1:9/v1", "tiny", "describe", 1e6)(photo)
    with pytest.raises(ConfigError, match="no address"):
        endpoint_captioner("localhost", "tiny", "describe", 1e6)


def test_a_vision_language_model_in_this_process(tiny_vlm: Path, photos: Path, tmp_path: Path) -> None:
    """A random one: greedy, so always the same; it sees the photo; what was asked is not part of the answer."""
    describe = transformers_captioner(str(tiny_vlm), "Describe it.")
    pictures = [Image.new("RGB", (40, 40), color) for color in ((250, 0, 0), (0, 0, 250))]
    said = [describe(picture) for picture in pictures]
    assert said == [describe(picture) for picture in pictures] and said[0] != said[1]
    assert all(text and "Describe it." not in text for text in said)
    to = tmp_path / "captions.jsonl"
    main(["caption", "--to", str(to), "--model", str(tiny_vlm), "data=folder", f"data.root={photos}"])
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["b.png", "c.png"] and all(row["text"] for row in rows)


def test_a_model_that_only_describes(tmp_path: Path) -> None:
    """BLIP takes no question: its whole output is the caption, the same as its own generate gives."""
    tokenizer = letters("[PAD]", "[CLS]", "[SEP]", "[DEC]", "[ENC]", "[UNK]")
    size = {"height": 28, "width": 28}
    processor = BlipProcessor(BlipImageProcessor(size=size), tokenizer)
    small = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    text = {**small, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "bos_token_id": 3, "sep_token_id": 2,
            "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={**small, "image_size": 28, "patch_size": 14}, projection_dim=16)
    ).eval()
    model.save_pretrained(tmp_path / "blip")
    processor.save_pretrained(tmp_path / "blip")
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    inputs = processor(images=photo, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)[0]
    described = transformers_captioner(str(tmp_path / "blip"), "unused")(photo)
    assert described == processor.decode(expected, skip_special_tokens=True)


def test_pickled_weights_and_what_is_no_model_are_refused(tiny_vlm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_vlm, tmp_path / "pickled")
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    for folder in (tmp_path / "pickled", tmp_path):
        with pytest.raises(ConfigError, match="cannot be loaded as an image-text-to-text model"):
            transformers_captioner(str(folder), "")
