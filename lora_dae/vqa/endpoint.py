"""A judge behind any OpenAI-compatible endpoint: hosted, vLLM, Ollama, LM Studio."""

from __future__ import annotations

import base64
import io
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from lora_dae.config import ConfigError
from lora_dae.data.captioner import INSTEAD
from lora_dae.vqa.bank import Question
from lora_dae.vqa.judges import (
    JudgeConfig,
    JudgeFailedError,
    JudgeRefusedError,
    Reply,
    enlarged,
    prompt,
    refuse_thoughts,
    score_reply,
)
from lora_dae.vqa.parse import answer_schema

TOP_LOGPROBS = 20  # the most that the protocol gives


class EndpointJudge:
    """Asks by chat completions at temperature 0, pictures as PNG data URLs, answers by JSON schema.

    A model that refuses one of INSTEAD's parameters is asked in the other way.
    """

    def __init__(self, name: str, cfg: JudgeConfig) -> None:
        """Raises ConfigError without the ``openai`` package, or without a key where the hosted API needs one."""
        try:
            import openai
        except ImportError as error:
            raise ConfigError(f"judges.{name} needs the openai package: pip install 'lora-dae[judge]'.") from error
        where = cfg.base_url or os.environ.get("OPENAI_BASE_URL") or None  # as the SDK does; None: the hosted API
        if where is not None and ("@" in where or "?" in where):
            raise ConfigError("OPENAI_BASE_URL holds a password or a query: export the key alone, as OPENAI_API_KEY.")
        # A key goes nowhere but to the hosted API, its stand-in of OPENAI_BASE_URL, and servers that it is named for.
        self._variable = cfg.api_key_env or ("OPENAI_API_KEY" if cfg.base_url is None else None)
        self._secret = os.environ.get(self._variable, "") if self._variable else ""
        if not self._secret and where is None:
            raise ConfigError(f"judges.{name} needs a key: export {self._variable}=..., or give base_url of a server.")
        self._openai = openai
        self._client: Any = openai.OpenAI(
            api_key=self._secret or "none",  # local servers want a header, not a secret
            base_url=where,
            max_retries=cfg.retries,
            timeout=cfg.timeout,
        )
        self.name = name
        self.cfg = cfg
        self.concurrency = cfg.concurrency
        self._which = f"{where or 'hosted'}, {cfg.model}"
        self.key = f"endpoint {where or 'hosted'} {cfg.model} schema={cfg.json_schema} max={cfg.max_tokens}"
        self.cost = 0.0
        self._spending = threading.Condition()
        self._held: list[float] = []  # what requests on their way may cost
        self._dearest: dict[int, float] = {}  # the most that a request cost so far, by its number of pictures
        self._lock = threading.Lock()
        self._next = 0.0
        self._instead: set[str] = set()  # of INSTEAD, by an answer
        self._plain = False  # an answer was had without any

    def takes(self, question: Question) -> bool:
        return question.kind != "score" or self.cfg.logprobs

    def ask(self, images: Sequence[np.ndarray], question: Question) -> Reply:
        self._wait()
        with self._paid(len(images)) as pay:
            reply = self._reply(images, question)
            pay(reply)
        refuse_thoughts(self.name, self._which, self.cfg.max_tokens, reply)
        return reply

    def _reply(self, images: Sequence[np.ndarray], question: Question) -> Reply:
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(i)}} for i in images]
        content.append({"type": "text", "text": prompt(question)})
        request: dict[str, Any] = {
            "model": self.cfg.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.cfg.max_tokens,
        }
        score = question.kind == "score"
        if score:
            request |= {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
        elif self.cfg.json_schema:
            schema = {"name": "answer", "strict": True, "schema": answer_schema(question.options)}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        errors = self._openai
        try:
            return self._asked(request)
        except errors.AuthenticationError as error:
            advice = f"check {self._variable}" if self._variable else f"name its key in judges.{self.name}.api_key_env"
            raise ConfigError(self._say("refuses the key", error, advice)) from None
        except errors.NotFoundError as error:
            raise ConfigError(self._say("does not know the model", error, "check model and base_url")) from None
        except (errors.BadRequestError, errors.UnprocessableEntityError, errors.PermissionDeniedError) as error:
            # 400, 422 and 403: what cannot be served at all looks like what a content filter stops.
            raise JudgeRefusedError(self._say("refuses the request", error, "json_schema=false may help")) from None
        except errors.RateLimitError as error:
            advice = f"lower judges.{self.name}.requests_per_minute, or run the same command again later"
            raise JudgeFailedError(self._say("was asked too often", error, advice)) from None
        except ConfigError:
            raise
        except (errors.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            raise JudgeFailedError(self._say("gave no answer", error, "is it running?")) from None

    def _asked(self, request: dict[str, Any]) -> Reply:
        """The reply to a request, in which what the model refuses is replaced: see INSTEAD.

        Never once it has answered a plain one, so that all answers are to one form. That follows from server and model,
        which ``key`` names.
        """
        instead = set(self._instead)
        while True:
            sent = {name: value for name, value in request.items() if name not in instead}
            if "max_tokens" in instead:
                sent["max_completion_tokens"] = request["max_tokens"]
            try:
                reply = self._streamed(sent) if self.cfg.stream and "logprobs" not in sent else self._whole(sent)
            except self._openai.BadRequestError as error:
                named = {name for name in INSTEAD if name in sent and name in f"{error} {error.body}"}
                if self._plain or not named:
                    raise
                instead |= named
            else:
                break
        with self._lock:
            news = instead - self._instead
            self._instead = self._instead | instead
            self._plain = not self._instead
        if news:
            told = ", ".join(f"{INSTEAD[name]} instead of {name}={request[name]}" for name in sorted(news))
            print(f"judge {self.name} is asked with {told}, which its model refuses", file=sys.stderr)
        return reply

    def _whole(self, request: dict[str, Any]) -> Reply:
        done = self._client.chat.completions.create(**request)
        choices = getattr(done, "choices", None)
        first = choices[0] if choices else None
        message = getattr(first, "message", None)
        if message is None:
            raise JudgeFailedError(f"{self.name}: the endpoint's answer is no chat completion.")
        if "logprobs" in request:
            return Reply(score_reply(self._first_token(first)), *_tokens(done))
        return Reply(message.content or "", *_tokens(done), cut=getattr(first, "finish_reason", None) == "length")

    def _first_token(self, choice: Any) -> dict[str, float]:
        """Probabilities of the most probable first tokens. ConfigError when the server tells none."""
        told = getattr(getattr(choice, "logprobs", None), "content", None)
        if not told or not told[0].top_logprobs:
            raise ConfigError(
                f"judge {self.name} ({self._which}) tells no probabilities: set judges.{self.name}.logprobs=false, "
                "VQAScore is then left out."
            )
        return {one.token: math.exp(one.logprob) for one in told[0].top_logprobs}

    def _streamed(self, request: dict[str, Any]) -> Reply:
        text, tokens = "", (0, 0)
        end: str | None = None
        options = {"stream": True, "stream_options": {"include_usage": True}}
        for chunk in self._client.chat.completions.create(**request, **options):
            if chunk.choices:
                text += chunk.choices[0].delta.content or ""
                end = end or chunk.choices[0].finish_reason
            if chunk.usage:
                tokens = _tokens(chunk)
        if end is None:  # half an answer must not be read as a whole one
            raise JudgeFailedError(f"{self.name}: the stream broke off before the answer's end.")
        return Reply(text, *tokens, cut=end == "length")

    def _wait(self) -> None:
        """Requests start at least 60 / requests_per_minute seconds apart."""
        if self.cfg.requests_per_minute is None:
            return
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + 60 / self.cfg.requests_per_minute
        time.sleep(max(0.0, start - time.monotonic()))

    @contextmanager
    def _paid(self, pictures: int) -> Iterator[Callable[[Reply], None]]:
        """Holds back what a request may cost until it is paid for, so that requests at once do not pass the limit.

        As much as the dearest one so far with as many pictures; all that is left where there was none yet, which is
        why the first is sent alone. ConfigError when the next would pass the limit and none is on its way, or when
        nothing is told of what it cost.
        """
        limit = math.inf if self.cfg.max_cost is None else self.cfg.max_cost
        with self._spending:
            while True:
                left = limit - self.cost
                expected = self._dearest.get(pictures, left) if limit < math.inf else 0.0
                if left > 0 and sum(self._held) + expected <= left:
                    break
                if not self._held:
                    raise ConfigError(
                        f"judge {self.name} stopped at max_cost={self.cfg.max_cost:g} ({self.cost:.4g} spent, by all "
                        "commands into this output): its answers are kept, raise the limit and run the same command "
                        "to go on."
                    )
                self._spending.wait()
            self._held.append(expected)

        def pay(reply: Reply) -> None:
            if limit < math.inf and not reply.prompt_tokens:
                raise ConfigError(
                    f"judge {self.name} ({self._which}) does not tell how many tokens it used, so that max_cost cannot "
                    f"be kept: set judges.{self.name}.max_cost=null, and limit it by num_samples."
                )
            tokens = reply.prompt_tokens * self.cfg.price_in + reply.completion_tokens * self.cfg.price_out
            with self._spending:
                self.cost += tokens / 1e6
                self._dearest[pictures] = max(self._dearest.get(pictures, 0.0), tokens / 1e6)

        try:
            yield pay
        finally:
            with self._spending:
                self._held.remove(expected)
                self._spending.notify_all()

    def _say(self, what: str, error: Exception, advice: str) -> str:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if self._secret:
            reason = reason.replace(self._secret, "***")  # some servers quote the key that they refuse
        return f"judge {self.name} ({self._which}) {what} ({reason}): {advice}."


def _tokens(done: Any) -> tuple[int, int]:
    usage = getattr(done, "usage", None)
    return (usage.prompt_tokens or 0, usage.completion_tokens or 0) if usage else (0, 0)


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    enlarged(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
