"""What a judge is: something that answers a question about one or two pictures, in text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from lora_dae.config import ConfigError
from lora_dae.evaluation.attributes.classifier import AttributeClassifier, load_embedded
from lora_dae.vqa.bank import Question
from lora_dae.vqa.parse import without_thoughts

PROMPT_VERSION = "1"  # of ``prompt``: raise it with every change, answers are cached by it
MIN_SIDE = 336  # pixels: smaller pictures are enlarged by a whole factor, or a judge would see a thumbnail
KINDS = ("endpoint", "transformers", "classifier")


@dataclass(frozen=True)
class JudgeConfig:
    """One file of conf/judge/; which fields count depends on ``kind``."""

    kind: str
    model: str | None = None  # endpoint: the served name; transformers: a folder or hub name
    base_url: str | None = None  # endpoint; None: the hosted API, or what OPENAI_BASE_URL names
    api_key_env: str | None = None  # name of the variable, never the key; None: OPENAI_API_KEY, and none for a base_url
    json_schema: bool = True  # endpoint: ask for constrained decoding
    logprobs: bool = False  # endpoint: it tells the probabilities of tokens, so VQAScore can be had
    stream: bool = False  # endpoint: for servers that cut long silent connections
    concurrency: int = 4  # endpoint: requests at once
    timeout: float = 120.0  # seconds a request
    retries: int = 5  # with exponential back-off, or as Retry-After says, up to two minutes
    requests_per_minute: float | None = None
    # Of all commands into one output, in the currency of the prices. What may pass it: the first request of a command,
    # and one dearer than all before it.
    max_cost: float | None = None
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million completion tokens
    max_tokens: int = 256  # of an answer, what is thought before it included


@dataclass(frozen=True)
class Reply:
    """A judge's raw text and what it cost in tokens."""

    raw: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False  # ended by its limit of tokens


class JudgeFailedError(Exception):
    """One question got no answer, after all retries; others may."""


class JudgeRefusedError(JudgeFailedError):
    """The judge is there and refuses this very request, as content filters do."""


class Judge(Protocol):
    """``key`` identifies in the cache whatever changes answers; ``ask`` is called from ``concurrency`` threads.

    ``cost`` is what it was paid so far, in the currency of its prices; who keeps it between commands may set it before.
    ``ask`` raises JudgeFailedError for this question (JudgeRefusedError where the judge itself is well), ConfigError
    when no question can be answered.
    """

    name: str
    key: str
    concurrency: int
    cost: float

    def takes(self, question: Question) -> bool: ...

    def ask(self, images: Sequence[np.ndarray], question: Question) -> Reply: ...


def prompt(question: Question) -> str:
    """The text that goes with the pictures; of a score, the question alone: what comes first is the answer."""
    if question.kind == "score":
        return question.text
    if question.kind == "pair":
        head = 'You see two pictures, the "first" and the "second". '
    else:
        head = "Look at the picture. "
    options = ", ".join(f'"{option}"' for option in question.options)
    return f'{head}{question.text}\nReply with JSON only: {{"answer": X}}, X being one of {options}.'


def score_reply(probabilities: Mapping[str, float]) -> str:
    """The raw text of a score from the probabilities of an answer's first token.

    "yes" and "no" in any case, with or without a space before, each summed. What is not among the tokens that the judge
    told is null, not zero: it is only known to be less probable than they are.
    """
    found: dict[str, float | None] = {"yes": None, "no": None}
    for token, probability in probabilities.items():
        word = token.strip().lstrip("\u0120\u2581").lower()  # marks of a space in vocabularies
        if word in found:
            found[word] = (found[word] or 0.0) + probability
    return json.dumps(found)


def judge_config(name: str, values: Any) -> JudgeConfig:
    """A checked JudgeConfig; ConfigError names what is wrong. A key in the config itself is refused."""
    where = f"judges.{name}"
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping with at least `kind`: one of {', '.join(KINDS)}.")
    if "api_key" in values:
        raise ConfigError(f"{where}.api_key: keys do not belong into configs; export it and name it in api_key_env.")
    known = [f.name for f in fields(JudgeConfig)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}.{key} is unknown: use {', '.join(known)}.")
    try:
        typed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JudgeConfig), {"kind": "", **values}))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}.{error.full_key} is of the wrong type ({str(error).splitlines()[0]}).") from error
    cfg: JudgeConfig = typed
    if cfg.kind not in KINDS:
        raise ConfigError(f"{where}.kind={cfg.kind} is unknown: use one of {', '.join(KINDS)}.")
    if cfg.kind != "classifier" and not cfg.model:
        raise ConfigError(f"{where}.model is missing: name the model that {cfg.kind} should use.")
    if cfg.base_url is not None and ("@" in cfg.base_url or "?" in cfg.base_url):
        raise ConfigError(f"{where}.base_url holds a password or a query: keys come from the environment only.")
    for field_name in ("concurrency", "timeout", "max_tokens"):
        if getattr(cfg, field_name) <= 0:
            raise ConfigError(f"{where}.{field_name}={getattr(cfg, field_name)} must be above 0.")
    if cfg.retries < 0:
        raise ConfigError(f"{where}.retries={cfg.retries} must be 0 or more.")
    if cfg.requests_per_minute is not None and cfg.requests_per_minute <= 0:
        raise ConfigError(f"{where}.requests_per_minute={cfg.requests_per_minute} must be above 0, or null.")
    if cfg.max_cost is not None and cfg.price_in == 0 and cfg.price_out == 0:
        raise ConfigError(f"{where}.max_cost needs price_in and price_out (per million tokens) to count with.")
    return cfg


def build_judge(name: str, cfg: JudgeConfig) -> Judge:
    """The judge that a config describes; imports what its kind needs."""
    if cfg.kind == "endpoint":
        from lora_dae.vqa.endpoint import EndpointJudge

        return EndpointJudge(name, cfg)
    if cfg.kind == "transformers":
        from lora_dae.vqa.local import TransformersJudge

        return TransformersJudge(name, cfg)
    return ClassifierJudge(name, load_embedded())


def refuse_thoughts(name: str, which: str, max_tokens: int, reply: Reply) -> None:
    """Raises JudgeFailedError for a reply that was cut before an answer began; ``which``: server and model."""
    if reply.cut and not without_thoughts(reply.raw).strip():
        raise JudgeFailedError(
            f"judge {name} ({which}) came to no answer within max_tokens={max_tokens}, in which its thoughts count: "
            f"raise judges.{name}.max_tokens."
        )


def enlarged(image: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3) as a picture of at least 336 pixels: a whole factor, pixels repeated, nothing smoothed."""
    factor = -(-MIN_SIDE // min(image.shape[:2]))
    return Image.fromarray(image.repeat(factor, 0).repeat(factor, 1) if factor > 1 else image)


class ClassifierJudge:
    """The embedded attribute classifier: answers what it was trained on (studio photos), and nothing else."""

    concurrency = 1
    cost = 0.0

    def __init__(self, name: str, classifier: AttributeClassifier) -> None:
        self.name = name
        self.classifier = classifier
        parameters = torch.cat([p.detach().flatten() for p in classifier.parameters()])
        self.key = f"classifier {parameters.double().sum().item():.6f}"

    def takes(self, question: Question) -> bool:
        """Choices among the classes that it knows."""
        classes = self.classifier.attributes.get(question.attribute or "", [])
        return question.kind == "choice" and set(classes) >= {question.right} and set(question.options) >= set(classes)

    def ask(self, images: Sequence[np.ndarray], question: Question) -> Reply:
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        name = question.attribute or ""
        best = int(self.classifier.predict(pixels)[name].indices[0])
        return Reply(json.dumps({"answer": self.classifier.attributes[name][best]}))
