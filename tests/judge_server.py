"""A server of chat completions that does as a test says, and questions to it: for the tests of judges behind HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from lora_dae.vqa.ask import Answer, Task, ask_all
from lora_dae.vqa.bank import Question
from lora_dae.vqa.cache import AnswerCache
from lora_dae.vqa.judges import JudgeConfig, build_judge

Behavior = Callable[[dict[str, Any], int], tuple[int, Any]]


class Server:
    """Speaks chat completions; ``behavior`` maps (request, its number) to (status, answer text, or a whole body)."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.behavior: Behavior = lambda request, number: (200, '{"answer": "yes"}')
        self.headers: dict[str, str] = {}
        self.seen_keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802 (the library's name)
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(request)
                    number = len(server.requests)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    server.seen_keys.add(self.headers["Authorization"])
                status, body = server.behavior(request, number)
                with lock:
                    server.at_once -= 1
                if isinstance(body, list):
                    self._stream(body)
                    return
                if status == 200 and isinstance(body, str):
                    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": body}}
                    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
                    body |= {"choices": [choice], "usage": usage}
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **server.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _stream(self, pieces: list[str | None]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for piece in pieces:  # None: the end of the answer
                    delta = {} if piece is None else {"content": piece}
                    choice = {"index": 0, "delta": delta, "finish_reason": "stop" if piece is None else None}
                    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
                    self.wfile.write(f"data: {json.dumps({**chunk, 'choices': [choice]})}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@contextmanager
def serving() -> Iterator[Server]:
    """A server until the block ends."""
    server = Server()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def some_tasks(n: int = 1, pictures: int = 1) -> list[Task]:
    question = Question("q", "about", "yes_no", "Is it?", ("yes", "no"), "yes")
    images = [np.full((8, 8, 3), k, np.uint8) for k in range(n + pictures)]
    return [Task(k, ("m",) * pictures, tuple(images[k : k + pictures]), question) for k in range(n)]


def ask(server: Server, cache: AnswerCache, tasks: list[Task], **options: Any) -> list[Answer]:
    values: dict[str, Any] = {"kind": "endpoint", "model": "m", "base_url": server.url, "retries": 0, **options}
    return ask_all(tasks, build_judge("judge", JudgeConfig(**values)), cache)
