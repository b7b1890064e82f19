"""Uploading through huggingface_hub's own client to a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.export.push import push_folder


class Hub(BaseHTTPRequestHandler):
    """Repositories to create and commits of files sent in the request, as the hub takes small files."""

    created: list[str]
    visibility: list[str]  # that new ones were asked to have
    private: bool  # what they have
    arrived: dict[str, dict[str, bytes]]
    tokens: set[str | None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        address = self.path.split("?")[0]
        if address == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(f"{asked['organization']}/{asked['name']}")
            self.visibility.append(asked.get("visibility", "public"))
            return self.answer({"url": f"http://{self.headers['Host']}/{self.created[-1]}"})
        if address == "/api/validate-yaml":  # the head of the card
            return self.answer({"errors": [], "warnings": []})
        repository = "/".join(address.split("/")[3:5])
        if "/preupload/" in address:
            files = [f["path"] for f in json.loads(body)["files"]]
            kept = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]
            return self.answer({"files": kept})
        assert "/commit/main" in address
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                assert value["encoding"] == "base64"
                self.arrived.setdefault(repository, {})[value["path"]] = base64.b64decode(value["content"])
        return self.answer(
            {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"http://{self.headers['Host']}/{repository}/commit/1",
            }
        )

    def do_GET(self) -> None:
        model = {"id": "someone/fashion", "private": self.private, "siblings": [], "sha": "0" * 40}
        self.answer({"name": "someone", "type": "user"} if "whoami" in self.path else model)

    def do_HEAD(self) -> None:
        self.send_response(404)  # no .gitignore yet
        self.end_headers()

    def answer(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    handler = type("OneHub", (Hub,), {"created": [], "visibility": [], "private": True, "arrived": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_every_file_arrives_as_it_is(
    hub: tuple[str, type[Hub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address, seen = hub
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # as it is in the other tests
    monkeypatch.setattr("lora_dae.export.push.get_token", lambda: "hf_secret")
    monkeypatch.setattr("lora_dae.export.push.HfApi", lambda: HfApi(endpoint=address, token="hf_secret"))
    files = {
        "README.md": b"---\nlicense: mit\n---\n",
        "adapter.safetensors": bytes(range(256)) * 40,
        "sub/a.png": b"\x89",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert push_folder(tmp_path, "someone/fashion", Console())
    assert seen.created == ["someone/fashion"]
    assert seen.arrived == {"someone/fashion": files}
    assert seen.tokens == {"Bearer hf_secret"}
    said = capsys.readouterr().out
    assert "pushed to someone/fashion" in said and "hf_secret" not in said


@pytest.fixture
def logged_in(hub: tuple[str, type[Hub]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """The hub, for somebody with a token and three files in ``tmp_path``."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lora_dae.export.push.get_token", lambda: "hf_secret")
    monkeypatch.setattr("lora_dae.export.push.HfApi", lambda: HfApi(endpoint=hub[0], token="hf_secret"))
    for name in ("README.md", "left.safetensors", "merged/unet/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return hub[1]


def test_what_was_not_chosen_stays_here_and_a_new_repository_is_private(logged_in: type[Hub], tmp_path: Path) -> None:
    assert push_folder(tmp_path, "someone/fashion", Console(), only=[tmp_path / "README.md", tmp_path / "merged"])
    assert logged_in.visibility == ["private"]
    assert logged_in.arrived == {"someone/fashion": {"README.md": b"x", "merged/unet/config.json": b"x"}}


def test_a_repository_that_is_public_gets_nothing_until_that_is_asked_for(
    logged_in: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub ignores the visibility that is asked for where the repository is there."""
    logged_in.private = False
    with pytest.raises(ConfigError, match=r"push=someone/fashion is there already, and public: .* private=false"):
        push_folder(tmp_path, "someone/fashion", Console())
    assert logged_in.arrived == {} and "uploading" not in capsys.readouterr().out
    assert push_folder(tmp_path, "someone/fashion", Console(), private=False)
    assert logged_in.visibility == ["private", "public"]
    assert len(logged_in.arrived["someone/fashion"]) == 3
    assert "someone/fashion, which is public: README.md, left.safetensors, merged (" in capsys.readouterr().out
