"""``python -m lora_dae.data caption``: a vision model writes the captions that are missing, a person reads them.

The result is a jsonl file, a line a photo: ``{"id": ..., "text": ..., "model": ...}``. What is in it already is not
asked again, so a run that was stopped goes on. Training reads it by ``data.captions.file``; lines with
``"reject": true`` are left out there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
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
RETRIES = 5
Describe = Callable[[Image.Image], str]


def fill_captions(cfg: DataConfig, to: Path, describe: Describe, model: str) -> int:
    """Appends a line for each entry without caption; returns how many lines the file has then.

    A photo that cannot be read, or to which the model says nothing, is left out. Raises ConfigError if the model
    cannot be reached; what was written until then stays.
    """
    gaps = replace(cfg, captions=CaptionConfig(missing="drop"))  # a gap is no error here: it is what we look for
    bare = {entry.id: entry for entry in list_entries(gaps) if not entry.captions}
    done = {str(row.get("id")) for _, row in read_jsonl(to)} if to.is_file() else set()
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("a", encoding="utf-8") as file:
        for id in track([id for id in bare if id not in done], description="Captioning"):
            try:
                photo = decode(bare[id].image.read(), draft=LONGEST_SIDE, background=cfg.background)
            except (BadImageError, OSError):
                continue  # data.max_bad_fraction tells about it when it comes to training
            photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            text = " ".join(describe(photo).split()).strip('"')
            if text:
                file.write(json.dumps({"id": id, "text": text, "model": model}, ensure_ascii=False) + "\n")
                file.flush()
                done.add(id)
    return len(done)


def endpoint_captioner(endpoint: str, model: str, prompt: str, per_minute: float) -> Describe:
    """Asks ``endpoint``/chat/completions; the key, if one is needed, is taken from OPENAI_API_KEY.

    At most ``per_minute`` requests; a busy server (429, 5xx) is asked again, later and later.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--endpoint {endpoint} is no address: give one such as http://localhost:8000/v1.")
    if per_minute <= 0:
        raise ConfigError(f"--per-minute {per_minute} must be above 0.")
    headers = {"Content-Type": "application/json"}
    if os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
    last = -1e9

    def describe(photo: Image.Image) -> str:
        nonlocal last
        file = io.BytesIO()
        photo.save(file, "JPEG", quality=90)
        picture = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": picture}}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": LONGEST_ANSWER,
            "temperature": 0,
        }
        request = urllib.request.Request(
            f"{endpoint.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        for attempt in range(RETRIES):
            time.sleep(max(0.0, last + 60 / per_minute - time.monotonic()))
            last = time.monotonic()
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                if error.code != 429 and error.code < 500 or attempt == RETRIES - 1:
                    raise ConfigError(f"{endpoint} refuses to caption ({error.code} {error.reason}).") from error
                wait = error.headers.get("Retry-After", "")
                time.sleep(float(wait) if wait.replace(".", "").isdigit() else 2.0**attempt)
            except (urllib.error.URLError, TimeoutError) as error:
                raise ConfigError(f"{endpoint} cannot be reached ({error}): is the server running?") from error
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise ConfigError(f"{endpoint} does not answer as an OpenAI-compatible server does.") from error
        raise AssertionError("the last attempt returns or raises")

    return describe


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
