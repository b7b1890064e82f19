"""The captioner fills gaps, goes on where it stopped, and waits when a server is busy."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data.__main__ import main
from lora_dae.data.captioner import endpoint_captioner, fill_captions
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


def test_servers_that_do_not_caption_are_named(server: tuple[str, list[int]]) -> None:
    photo = Image.new("RGB", (8, 8))
    with pytest.raises(ConfigError, match="404"):
        endpoint_captioner(server[0], "another", "describe", 1e6)(photo)
    with pytest.raises(ConfigError, match="cannot be reached"):
        endpoint_captioner("http://127.0.0.1:9/v1", "tiny", "describe", 1e6)(photo)
    with pytest.raises(ConfigError, match="no address"):
        endpoint_captioner("localhost", "tiny", "describe", 1e6)
