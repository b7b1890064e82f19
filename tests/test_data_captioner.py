"""The captioner fills gaps, goes on where it stopped, and waits when a server is busy."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from lora_dae.data.captioner import (
    LONGEST_ANSWER,
    PhotoRefusedError,
    endpoint_captioner,
    fill_captions,
    transformers_captioner,
)
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


Behavior = Callable[[dict[str, Any], int], tuple[int, str] | None]


@contextmanager
def answering(behavior: Behavior, missing: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server and its requests; ``behavior`` maps (request, its number) to a status and a caption, or an error's body.

    None: it hangs up. ``missing``: bytes that it promises and never sends.
    """
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            found = behavior(requests[-1], len(requests))
            if found is None:
                return
            status, text = found
            data = (json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else text).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) + missing))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", requests
    finally:
        httpd.shutdown()
        httpd.server_close()


def test_gaps_are_filled_and_then_trained_on(photos: Path, tmp_path: Path, server: tuple[str, list[int]]) -> None:
    endpoint, answers = server
    to = tmp_path / "out" / "captions.jsonl"
    command = ["caption", "--to", str(to), "--endpoint", endpoint, "--model", "tiny", "--per-minute", "100000"]
    main([*command, "data=folder", f"data.root={photos}"])
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    digests = [hashlib.sha256((photos / name).read_bytes()).hexdigest() for name in ("b.png", "c.png")]
    assert rows == [
        {"id": "b.png", "text": "a green dress", "model": "tiny", "digest": digests[0]},
        {"id": "c.png", "text": "a blue dress", "model": "tiny", "digest": digests[1]},
    ]
    assert answers == [429, 200, 200]
    main([*command, "data=folder", f"data.root={photos}"])  # all is known: nothing is asked
    assert len(answers) == 3
    (photos / "d.png").unlink()
    captions, cache = CaptionConfig(file=str(to)), str(tmp_path / "cache")
    cfg = DataConfig(name="folder", root=str(photos), cache_dir=cache, captions=captions)
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


def test_a_photo_that_takes_anothers_place_is_asked_about_again(photos: Path, tmp_path: Path) -> None:
    """And trained with its own caption alone."""
    cfg, to, asked = DataConfig(name="folder", root=str(photos)), tmp_path / "captions.jsonl", []

    def describe(photo: Image.Image) -> str:
        asked.append(photo.getpixel((0, 0)))
        return f"a dress, number {len(asked)}"

    assert fill_captions(cfg, to, describe, "x") == 2
    Image.new("RGB", (32, 32), (90, 90, 90)).save(photos / "b.png")
    assert fill_captions(cfg, to, describe, "x") == 2
    assert fill_captions(cfg, to, describe, "x") == 2
    assert asked == [(0, 250, 0), (0, 0, 250), (90, 90, 90)]
    (photos / "d.png").unlink()
    captions, cache = CaptionConfig(file=str(to)), str(tmp_path / "cache")
    found = read_entries(DataConfig(name="folder", root=str(photos), cache_dir=cache, captions=captions))
    assert [entry.captions for entry in found[1:]] == [("a dress, number 3",), ("a dress, number 2",)]


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


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_photo_that_the_server_refuses_stops_nothing(
    status: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As content filters do; what the server says of it is told, without the key, and it is asked about again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    message = f"filtered for sk-very-secret, {'x' * 500}"
    error = json.dumps({"error": {"code": "content_filter", "message": message}})

    def filtered(request: dict[str, Any], number: int) -> tuple[int, str]:
        return (status, error) if number == 1 else (200, "a dress")

    to = tmp_path / "captions.jsonl"
    with answering(filtered) as (endpoint, requests):
        command = ["caption", "--to", str(to), "--endpoint", endpoint, "--model", "tiny", "--per-minute", "100000"]
        main([*command, "data=folder", f"data.root={photos}"])
        assert [json.loads(line)["id"] for line in to.read_text().splitlines()] == ["c.png"]
        said = capsys.readouterr().out
        assert f"without a caption: 1 (b.png: {status} " in said
        assert "filtered for ***" in said and "x" * 200 not in said
        main([*command, "data=folder", f"data.root={photos}"])
    assert [json.loads(line)["id"] for line in to.read_text().splitlines()] == ["c.png", "b.png"]
    assert len(requests) == 3 and "without a caption" not in capsys.readouterr().out


def test_a_model_that_describes_some_photos_is_never_given_up(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight refusals in a row, and the same eight, alone, when the command runs again."""
    for k in range(7):
        Image.new("RGB", (32, 32), (k, k, k)).save(photos / f"e{k}.png")
    cfg, to, asked = DataConfig(name="folder", root=str(photos)), tmp_path / "captions.jsonl", []

    def describe(photo: Image.Image) -> str:
        asked.append(photo.getpixel((0, 0)))
        if asked[-1] != (0, 250, 0):
            raise PhotoRefusedError("400 Bad Request: unsafe")
        return "a green dress"

    assert fill_captions(cfg, to, describe, "x") == 1 and len(asked) == 9
    assert fill_captions(cfg, to, describe, "x") == 1 and len(asked) == 17
    assert capsys.readouterr().out.count("without a caption: 8 (c.png: 400 Bad Request: unsafe; ") == 2


def test_a_model_that_refuses_the_first_photos_is_asked_no_more(photos: Path, tmp_path: Path) -> None:
    for k in range(7):
        Image.new("RGB", (32, 32), (k, k, k)).save(photos / f"e{k}.png")
    cfg, to, asked = DataConfig(name="folder", root=str(photos)), tmp_path / "captions.jsonl", []
    to.write_text('{"id": "b.png", "text": "a green dress", "model": "another"}\n')

    def refuses(photo: Image.Image) -> str:
        asked.append(photo)
        raise PhotoRefusedError("400 Bad Request: no image input")

    with pytest.raises(ConfigError, match="first 5 photos .400 Bad Request: no image input.: check"):
        fill_captions(cfg, to, refuses, "x")
    assert len(asked) == 5


def test_a_photo_without_an_answer_is_told(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = DataConfig(name="folder", root=str(photos))
    assert fill_captions(cfg, tmp_path / "captions.jsonl", lambda photo: ' "" ', "x") == 0
    assert "without a caption: 2 (b.png: the model said nothing; c.png: " in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "missing"), [(None, 0), ((200, "a dress"), 50)])
def test_a_connection_that_breaks_off_is_one_sentence(answer: tuple[int, str] | None, missing: int) -> None:
    """Neither is an URLError: nothing came at all, or half an answer."""
    with answering(lambda request, number: answer, missing) as (endpoint, _):
        with pytest.raises(ConfigError, match="cannot be reached"):
            endpoint_captioner(endpoint, "tiny", "describe", 1e6)(Image.new("RGB", (8, 8)))


def test_a_reasoning_model_is_asked_as_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of OpenAI's, which names one parameter at a time; found out once, and not by a photo's refusal."""

    def reasoning(request: dict[str, Any], number: int) -> tuple[int, str]:
        told = ""
        if "max_tokens" in request:
            told = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        elif "temperature" in request:
            told = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is."
        elif number == 3:
            told = "content_filter"
        return (400, json.dumps({"error": {"message": told}})) if told else (200, "a dress")

    photo = Image.new("RGB", (8, 8))
    with answering(reasoning) as (endpoint, requests):
        describe = endpoint_captioner(endpoint, "tiny", "describe", 1e6)
        with pytest.raises(PhotoRefusedError, match="content_filter"):
            describe(photo)
        assert capsys.readouterr().out == ""  # a refusal proves nothing
        assert [describe(photo), describe(photo)] == ["a dress", "a dress"]
    first = [{"max_tokens", "temperature"}, {"max_completion_tokens", "temperature"}, {"max_completion_tokens"}]
    assert [set(r) - {"model", "messages"} for r in requests] == [*first, *first, {"max_completion_tokens"}]
    assert requests[-1]["max_completion_tokens"] > LONGEST_ANSWER  # thoughts count in it, and come first
    said = capsys.readouterr().out
    assert "max_completion_tokens instead of max_tokens=120" in said and "temperature=0" in said
    assert said.count("\n") == 1


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
