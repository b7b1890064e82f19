"""A tiny study on disk, its server, and a rater's requests, for the tests of the study room."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.console import Console

from lora_dae.evaluation.pictures import Item, write_pictures
from lora_dae.study.create import CreateRequest, create_study

ROOT = Path(__file__).parent.parent
METHODS = ("alpha-method", "beta-method")


def photo(number: int, side: int = 32) -> np.ndarray:
    """A smooth picture, uint8 (side, side, 3)."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(40, 216, (4, 4, 3)).astype(float)
    return np.clip(
        coarse.repeat(side // 4, 0).repeat(side // 4, 1) + rng.normal(0, 12, (side, side, 3)), 0, 255
    ).astype(np.uint8)


def make_study(
    root: Path, prompts: int = 4, methods: tuple[str, ...] = METHODS, side: int = 32, **options: Any
) -> Path:
    """A study of pictures of ``methods`` with sources and real photos; ``options`` as in CreateRequest."""
    items = [Item(f"{i:02d}", f"a red shirt {i}", None, photo(i, side), photo(50 + i, side), 3) for i in range(prompts)]
    for k, method in enumerate(methods):
        write_pictures(root / method, items, [photo(100 * (k + 1) + i, side) for i in range(prompts)])
    values: dict[str, Any] = {"raters": 3, "pairs": 6, "opinions": 2, **options}
    request = CreateRequest(runs=[str(root / m) for m in methods], output=str(root / "study"), **values)
    return create_study(request, Console(quiet=True))


def links(study: Path) -> list[str]:
    """Tokens of the raters; the first one is the admin's."""
    return [line.split("/")[-1] for line in (study / "links.txt").read_text().split("\n") if line]


@contextmanager
def serving(study: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The real command in a process of its own; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "lora_dae.study", "serve", f"study={study}", f"port={port}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address + "/static/study.css", timeout=5).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None, process.stdout and process.stdout.read()
                time.sleep(0.1)
        yield address, process
    finally:
        process.kill()
        process.wait()


@contextmanager
def proxied(address: str, prefix: str, hands_host_on: bool = True) -> Iterator[str]:
    """A proxy that shows a server under a path, as nginx does by `location /rate/ { proxy_pass http://.../; }`."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 (the library's name)
            if not self.path.startswith(prefix + "/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {k: v for k, v in self.headers.items() if hands_host_on or k.lower() != "host"}
            connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
            connection.request(self.command, self.path.removeprefix(prefix), body or None, headers)
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            self.send_response(answer.status)
            for name in ("content-type", "content-security-policy"):
                if value := answer.getheader(name):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815 (the library's name)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()


def ask(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or bytes, headers); a ``body`` is posted as the page posts it."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = (
        {"Content-Type": "application/json", "X-Study": "1", **(headers or {})} if data is not None else headers or {}
    )
    request = urllib.request.Request(url, data, {k: v for k, v in sent.items() if v})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, raw, got = answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        status, raw, got = error.code, error.read(), dict(error.headers)
    got = {k.lower(): v for k, v in got.items()}
    return status, json.loads(raw) if "json" in got.get("content-type", "") else raw, got
