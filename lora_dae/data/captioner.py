"""``python -m lora_dae.data caption``: a vision model writes the captions that are missing, a person reads them.

The result is a jsonl file, a line a photo: ``{"id": ..., "text": ..., "model": ..., "digest": sha-256 of the photo}``.
What is in it already is not asked again unless the id has another photo since, so a run that was stopped goes on.
Training reads it by ``data.captions.file``; lines of other photos, or with ``"reject": true``, are left out there.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from rich import get_console
from rich.progress import track

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data.decode import BadImageError, decode
from lora_dae.data.formats.files import read_jsonl
from lora_dae.data.sources import list_entries

PROMPT = (
    "Describe the garment in this photo in one line of at most 40 words: kind, color, pattern, material, cut, and who "
    "wears it how. No introduction."
)
LONGEST_SIDE = 768  # pixels that are sent
LONGEST_ANSWER = 120  # tokens
LONGEST_THOUGHT = 4000  # tokens more where what a model thinks before it answers counts, too
RETRIES = 5
REFUSALS = (400, 403, 413, 422)  # of one request, as content filters do
GIVE_UP_AFTER = 5  # photos refused and none described yet: the request itself is wrong
OPENAI = "https://api.openai.com/v1"
INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": "its own temperature"}  # for reasoning models
Describe = Callable[[Image.Image], str]


class PhotoRefusedError(Exception):
    """The server is there and refuses this very photo, as content filters do."""


def fill_captions(cfg: DataConfig, to: Path, describe: Describe, model: str) -> int:
    """Appends a line for each entry without caption; returns how many photos the file has lines of then.

    A photo that cannot be read is left out, and one that is refused or to which the model says nothing, which is told
    at the end. Raises ConfigError if the model cannot be reached, or refuses the first 5 photos and has described none
    in the file either; what was written until then stays.
    """
    gaps = replace(cfg, captions=CaptionConfig(missing="drop"))  # a gap is no error here: it is what we look for
    bare = {entry.id: entry for entry in list_entries(gaps) if not entry.captions}
    rows = [row for _, row in read_jsonl(to)] if to.is_file() else []
    done: dict[str, set[str | None]] = {}  # id -> digests of its photos; None: a line that does not tell counts for any
    for row in rows:
        done.setdefault(str(row.get("id")), set()).add(row.get("digest"))
    answers = any(row.get("model") == model for row in rows)  # it takes what we send: refusals are about their photos
    left_out: dict[str, str] = {}  # photo -> why
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("a", encoding="utf-8") as file:
        for id in track([id for id in bare if None not in done.get(id, ())], description="Captioning"):
            try:
                data = bare[id].image.read()
                digest = hashlib.sha256(data).hexdigest()
                if digest in done.get(id, ()):
                    continue
                photo = decode(data, draft=LONGEST_SIDE, background=cfg.background)
            except (BadImageError, OSError):
                continue  # data.max_bad_fraction tells about it when it comes to training
            photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            try:
                text = " ".join(describe(photo).split()).strip('"')
            except PhotoRefusedError as error:
                left_out[id] = str(error)
                if not answers and len(left_out) >= GIVE_UP_AFTER:
                    raise ConfigError(
                        f"--model {model} was refused for the first {GIVE_UP_AFTER} photos ({error}): check that it "
                        "takes pictures, and your --prompt."
                    ) from error
                continue
            answers = True
            if text:
                line = {"id": id, "text": text, "model": model, "digest": digest}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                done.setdefault(id, set()).add(digest)
            else:
                left_out[id] = "the model said nothing"
    if left_out:
        some = "; ".join(f"{id}: {why}" for id, why in list(left_out.items())[:3])
        _tell(f"photos left without a caption: {len(left_out)} ({some}); the same command asks about them again")
    return len(done)


def endpoint_captioner(endpoint: str, model: str, prompt: str, per_minute: float) -> Describe:
    """Asks ``endpoint``/chat/completions; OPENAI_API_KEY goes to OpenAI's, and to the one that OPENAI_BASE_URL names.

    At most ``per_minute`` requests; a busy server (429, 5xx) is asked again, later and later. Where the model refuses
    one of INSTEAD's parameters it is asked in the other way from then on. Raises PhotoRefusedError for one photo.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--endpoint {endpoint} is no address: give one such as http://localhost:8000/v1.")
    if per_minute <= 0:
        raise ConfigError(f"--per-minute {per_minute} must be above 0.")
    headers = {"Content-Type": "application/json"}
    secret = os.environ.get("OPENAI_API_KEY", "")
    if secret and endpoint.rstrip("/") in (OPENAI, os.environ.get("OPENAI_BASE_URL", "").rstrip("/")):
        headers["Authorization"] = f"Bearer {secret}"  # it is nobody else's
    last = -1e9
    changed: set[str] = set()  # of INSTEAD, by an answer

    def describe(photo: Image.Image) -> str:
        nonlocal last
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=90)
        picture = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": picture}}]
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": LONGEST_ANSWER,
            "temperature": 0,
        }
        instead = set(changed)
        for attempt in range(RETRIES):
            time.sleep(max(0.0, last + 60 / per_minute - time.monotonic()))
            last = time.monotonic()
            data = json.dumps(_reworded(body, instead)).encode()
            request = urllib.request.Request(f"{endpoint.rstrip('/')}/chat/completions", data, headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    text = str(json.load(answer)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                said = _said(error, secret)
                named = {name for name in INSTEAD if name in said} - instead
                if error.code == 400 and named and attempt < RETRIES - 1:
                    instead |= named
                    continue
                reason = f"{error.code} {error.reason}: {said[:200]}".rstrip(": ")
                if error.code in REFUSALS:
                    raise PhotoRefusedError(reason) from error
                if error.code != 429 and error.code < 500 or attempt == RETRIES - 1:
                    advice = ""
                    if error.code == 401 and "Authorization" not in headers:
                        advice = f": if it needs a key, export OPENAI_BASE_URL={endpoint} beside OPENAI_API_KEY"
                    raise ConfigError(f"{endpoint} refuses to caption ({reason}){advice}.") from error
                wait = error.headers.get("Retry-After", "")
                time.sleep(float(wait) if wait.replace(".", "").isdigit() else 2.0**attempt)
            except (OSError, http.client.HTTPException) as error:  # dropped connections are no URLError
                raise ConfigError(f"{endpoint} cannot be reached ({error}): is the server running?") from error
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise ConfigError(f"{endpoint} does not answer as an OpenAI-compatible server does.") from error
            else:
                if news := instead - changed:
                    told = ", ".join(f"{INSTEAD[name]} instead of {name}={body[name]}" for name in sorted(news))
                    _tell(f"{model} is asked with {told}, which it refuses")
                    changed.update(news)
                return text
        raise AssertionError("the last attempt returns or raises")

    return describe


def _reworded(body: dict[str, Any], instead: Set[str]) -> dict[str, Any]:
    """A request without the parameters that the model refuses, and with what it takes in their place."""
    kept = {name: value for name, value in body.items() if name not in instead}
    return kept | ({"max_completion_tokens": LONGEST_ANSWER + LONGEST_THOUGHT} if "max_tokens" in instead else {})


def _said(error: urllib.error.HTTPError, secret: str) -> str:
    """The server's explanation, on one line and without the key, which some servers quote."""
    try:
        text = " ".join(error.read(10_000).decode("utf-8", "replace").split())
    except (OSError, http.client.HTTPException):
        return ""
    return text.replace(secret, "***") if secret else text


def _tell(sentence: str) -> None:
    get_console().print(sentence, soft_wrap=True, highlight=False, markup=False)


def transformers_captioner(model: str, prompt: str) -> Describe:
    """A local image-text-to-text model of transformers (folder or hub id), safetensors only, no remote code."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(model)
        network: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", use_safetensors=True).eval()
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--model {model} cannot be loaded as an image-text-to-text model ({reason}).") from error
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    chats = getattr(processor, "chat_template", None) is not None  # BLIP and its like only describe
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    asked = {}
    if chats:
        messages = [{"role": "user", "content": content}]
        asked["text"] = processor.apply_chat_template(messages, add_generation_prompt=True)

    def describe(photo: Image.Image) -> str:
        inputs = processor(images=photo, return_tensors="pt", **asked).to(network.device, network.dtype)
        tokens = network.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)[0]
        given = inputs["input_ids"].shape[1] if chats else 0
        return processor.decode(tokens[given:], skip_special_tokens=True)

    return describe
