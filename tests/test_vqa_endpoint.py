"""A judge behind HTTP, against a real local server: slow, failing, malformed, rate-limiting, streaming."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from judge_server import Server, serving
from judge_server import ask as _ask
from judge_server import some_tasks as _tasks
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from lora_dae.config import ConfigError, conf_dir
from lora_dae.data.captioner import endpoint_captioner
from lora_dae.evaluation.pictures import Item, write_pictures
from lora_dae.vqa.ask import Task
from lora_dae.vqa.bank import Question
from lora_dae.vqa.cache import AnswerCache
from lora_dae.vqa.judges import JudgeConfig, build_judge
from lora_dae.vqa.run import VqaRequest, ask_judges
from lora_dae.vqa.score import per_item, reading

pytest.importorskip("openai", reason="openai is not installed: pip install 'lora-dae[judge]'")

KEY, SECRET = "OPENAI_API_KEY", "sk-very-secret"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with serving() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> AnswerCache:
    return AnswerCache(tmp_path / "answers.sqlite")


def test_the_request_is_what_the_protocol_says(server: Server, cache: AnswerCache) -> None:
    (answer,) = _ask(server, cache, _tasks(pictures=2))
    assert answer.parsed.answer == "yes" and answer.parsed.how == "strict"
    (request,) = server.requests
    assert request["temperature"] == 0 and request["model"] == "m"
    schema = request["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["answer"]["enum"] == ["yes", "no"] and schema["required"] == ["answer"]
    *pictures, text = request["messages"][0]["content"]
    assert "Is it?" in text["text"] and len(pictures) == 2
    prefix, data = pictures[1]["image_url"]["url"].split(",")
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert prefix == "data:image/png;base64" and image.shape == (336, 336, 3) and (image == 1).all()
    assert server.seen_keys == {"Bearer none"}  # OPENAI_API_KEY is set, and not this server's
    _ask(server, cache, _tasks(pictures=1), json_schema=False, api_key_env=KEY)
    assert "response_format" not in server.requests[-1]
    assert server.seen_keys == {"Bearer none", f"Bearer {SECRET}"}


def test_openais_key_goes_to_no_other_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the captioner send it, but to OpenAI's own, and where its SDK would: to OPENAI_BASE_URL."""
    photo = Image.new("RGB", (8, 8))
    server.behavior = lambda request, number: (200, "a red dress")
    assert endpoint_captioner(server.url, "m", "describe", 1e6)(photo) == "a red dress"
    assert server.seen_keys == {None}
    server.behavior = lambda request, number: (401, {"error": {"message": "who are you?"}})
    with pytest.raises(ConfigError, match=f"who are you.*export OPENAI_BASE_URL={server.url} beside OPENAI_API_KEY"):
        endpoint_captioner(server.url, "m", "describe", 1e6)(photo)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
    server.behavior = lambda request, number: (200, "a red dress")
    endpoint_captioner(server.url, "m", "describe", 1e6)(photo)
    assert server.seen_keys == {None, f"Bearer {SECRET}"}


def test_the_sdks_own_address_is_asked_told_and_part_of_the_key(
    server: Server, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPENAI_BASE_URL stands for the hosted API; another server there is another judge."""
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    _ask(server, cache, _tasks(), base_url=None)
    assert len(server.requests) == 1 and server.seen_keys == {f"Bearer {SECRET}"}
    server.behavior = lambda request, number: (404, {"error": {"message": "no such model"}})
    with pytest.raises(ConfigError, match=f"{server.url}, other.*does not know the model"):
        _ask(server, cache, _tasks(), base_url=None, model="other")
    here = build_judge("j", JudgeConfig(kind="endpoint", model="m"))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1")
    monkeypatch.delenv(KEY)  # a server of one's own may want none
    there = build_judge("j", JudgeConfig(kind="endpoint", model="m"))
    assert server.url in here.key and "localhost:1" in there.key


def test_nothing_is_asked_twice_and_the_key_is_stored_nowhere(
    server: Server, cache: AnswerCache, tmp_path: Path
) -> None:
    first = _ask(server, cache, _tasks(3), api_key_env=KEY)
    again = _ask(server, cache, _tasks(3), api_key_env=KEY)
    assert len(server.requests) == 3 and [a.raw for a in first] == [a.raw for a in again]
    _ask(server, cache, _tasks(3), model="another")
    assert len(server.requests) == 6 and f"Bearer {SECRET}" in server.seen_keys
    cache.close()
    assert not any(SECRET.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_failures_and_limits_of_the_server_are_waited_out(server: Server, cache: AnswerCache) -> None:
    server.headers = {"retry-after-ms": "10"}
    codes = {1: 429, 2: 500, 3: 503}
    server.behavior = lambda request, number: (codes.get(number, 200), '{"answer": "no"}')
    (answer,) = _ask(server, cache, _tasks(), retries=3)
    assert answer.parsed.answer == "no" and len(server.requests) == 4


def test_a_server_that_wants_a_long_rest_is_told_by_its_name(server: Server, cache: AnswerCache) -> None:
    """The SDK waits for no more than two minutes; the server is running, and asks for fewer requests."""
    server.headers = {"Retry-After": "300"}
    server.behavior = lambda request, number: (429, {"error": {"message": "slow down"}})
    with pytest.raises(ConfigError, match="too often.*slow down.*judges.judge.requests_per_minute") as error:
        _ask(server, cache, _tasks(), retries=2)
    assert "is it running" not in str(error.value)


def test_a_malformed_answer_is_missing_and_a_failed_request_is_unanswered(server: Server, cache: AnswerCache) -> None:
    bodies: dict[int, tuple[int, Any]] = {
        1: (200, "hard to say"), 2: (500, {}), 3: (200, b"<html>gateway</html>"), 4: (200, {"choices": []}),
        5: (200, '{"answer": "maybe"}'), 6: (200, '{"answer": "yes"}'),
    }  # fmt: skip
    server.behavior = lambda request, number: bodies[number]
    answers = _ask(server, cache, _tasks(6), concurrency=1)
    assert [a.raw is None for a in answers] == [False, True, True, True, False, False]
    assert [a.parsed.answer for a in answers] == [None] * 5 + ["yes"]
    server.behavior = lambda request, number: (200, '{"answer": "no"}')
    again = _ask(server, cache, _tasks(6), concurrency=1)  # only what has no answer is asked again
    assert [a.parsed.answer for a in again] == [None, "no", "no", "no", None, "yes"] and len(server.requests) == 9


def test_a_server_that_is_down_is_one_sentence_and_answers_stay(server: Server, cache: AnswerCache) -> None:
    server.behavior = lambda request, number: (200, "yes") if number <= 3 else (500, {})
    with pytest.raises(ConfigError, match="is it running.*5 questions in a row; earlier answers are kept"):
        _ask(server, cache, _tasks(20), concurrency=1)
    assert len(cache) == 3 and len(server.requests) == 8
    with pytest.raises(ConfigError, match="None of its 2 questions"):
        _ask(server, cache, _tasks(2), model="x")
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ConfigError, match="Connection error"):
        _ask(server, cache, _tasks(1), model="y")


def test_a_slow_server_runs_into_the_time_limit(server: Server, cache: AnswerCache) -> None:
    def slow(request: dict[str, Any], number: int) -> tuple[int, str]:
        time.sleep(1.5 if number == 1 else 0)
        return 200, "yes"

    server.behavior = slow
    answers = _ask(server, cache, _tasks(2), timeout=1, concurrency=1)
    assert [a.raw for a in answers] == [None, "yes"]


def test_requests_run_at_once_but_no_more_than_allowed(server: Server, cache: AnswerCache) -> None:
    barrier = threading.Barrier(3, timeout=20)

    def together(request: dict[str, Any], number: int) -> tuple[int, str]:
        barrier.wait()  # passes only when three requests are there at the same time
        return 200, "yes"

    server.behavior = together
    assert len(_ask(server, cache, _tasks(6), concurrency=3)) == 6
    assert server.most_at_once == 3


def test_streams_are_put_together_and_broken_ones_are_no_answer(server: Server, cache: AnswerCache) -> None:
    server.behavior = lambda request, number: (200, ['{"ans', 'wer": ', '"no"}', None])
    (answer,) = _ask(server, cache, _tasks(), stream=True)
    assert answer.parsed.answer == "no" and server.requests[0]["stream"] is True
    server.behavior = lambda request, number: (200, ['{"answer": "no"}'])  # the end never came
    with pytest.raises(ConfigError, match="broke off"):
        _ask(server, cache, _tasks(), stream=True, model="b")


@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_refused_request_is_missing_and_the_rest_is_asked(status: int, server: Server, cache: AnswerCache) -> None:
    """Also eight in a row, of eight prompts: whoever answers some questions is not down."""
    refused = (status, {"error": {"code": "content_filter", "message": f"unsafe picture {SECRET}"}})
    server.behavior = lambda request, number: refused if 2 <= number <= 9 else (200, '{"answer": "yes"}')
    answers = _ask(server, cache, _tasks(12), concurrency=1, api_key_env=KEY)
    assert [a.parsed.answer for a in answers] == ["yes", *[None] * 8, *["yes"] * 3] and len(server.requests) == 12
    assert "unsafe picture ***" in str(answers[1].why) and answers[0].why is None
    found = reading(answers)
    assert (found.unanswered, found.strict, found.parse_failures) == (8 / 12, 4 / 12, 0)
    assert np.isnan(per_item(answers, "m", 12)["about"][1:9]).all()
    server.behavior = lambda request, number: (200, '{"answer": "no"}')
    again = _ask(server, cache, _tasks(12), concurrency=1)  # what was refused is asked again
    assert [a.parsed.answer for a in again[:3]] == ["yes", "no", "no"] and len(server.requests) == 20


def test_a_picture_whose_every_question_is_refused_stops_nothing(server: Server, cache: AnswerCache) -> None:
    """The very first picture: twenty refusals, then answers."""
    questions = [Question(f"q{k}", "about", "yes_no", f"Is it {k}?", ("yes", "no"), "yes") for k in range(20)]
    tasks = [replace(task, question=question) for task in _tasks(2) for question in questions]
    server.behavior = lambda request, number: (400, {}) if number <= 20 else (200, "yes")
    answers = _ask(server, cache, tasks, concurrency=1)
    assert [a.parsed.answer for a in answers] == [None] * 20 + ["yes"] * 20


def test_a_judge_that_refuses_everything_says_so(server: Server, cache: AnswerCache) -> None:
    server.behavior = lambda request, number: (400, {"error": {"message": "response_format is not supported"}})
    with pytest.raises(ConfigError, match="not supported.*json_schema=false.*5 prompts, and answered none"):
        _ask(server, cache, _tasks(9), concurrency=1)
    assert len(server.requests) == 5
    with pytest.raises(ConfigError, match="not supported.*None of its 2 questions was answered"):
        _ask(server, cache, _tasks(2), concurrency=1)


def test_a_refusal_within_an_answer_is_missing_whatever_its_words(server: Server, cache: AnswerCache) -> None:
    """The protocol's own field: "No, ..." in it is no answer to the question."""
    message = {"role": "assistant", "content": None, "refusal": "No, I cannot help with that."}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    body |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
    server.behavior = lambda request, number: (200, body)
    (answer,) = _ask(server, cache, _tasks())
    assert answer.parsed.answer is None and reading([answer]).parse_failures == 1


@pytest.mark.parametrize(("status", "message"), [(401, "refuses the key"), (404, "does not know the model")])
def test_refusals_stop_at_once_and_never_show_the_key(
    status: int, message: str, server: Server, cache: AnswerCache
) -> None:
    server.behavior = lambda request, number: (status, {"error": {"message": f"bad key {SECRET}"}})
    with pytest.raises(ConfigError, match=message) as error:
        _ask(server, cache, _tasks(9), concurrency=1, api_key_env=KEY)
    assert SECRET not in str(error.value) and "***" in str(error.value)
    assert len(server.requests) == 1


def test_the_hosted_api_needs_a_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="export OPENAI_API_KEY"):
        build_judge("hosted", JudgeConfig(kind="endpoint", model="m"))


def test_the_shipped_config_reaches_a_server(server: Server, tmp_path: Path) -> None:
    """``judge=[classifier,vllm]`` as the README has it, from folders of pictures to the table."""
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in ("a", "b"):
        images = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(2)]
        items = [Item(str(i), "a red shirt", {"color": "red"}, None, real, 1) for i in range(2)]
        write_pictures(tmp_path / name, items, images)

    def first_option(request: dict[str, Any], number: int) -> tuple[int, Any]:
        if "logprobs" in request:  # conf/judge/vllm.yaml asks for VQAScore as well
            return _told(Yes=0.5, No=0.25)
        schema = request["response_format"]["json_schema"]["schema"]
        return 200, json.dumps({"answer": schema["properties"]["answer"]["enum"][0]})

    server.behavior = first_option
    overrides = [
        f"runs=[{tmp_path}/a,{tmp_path}/b]", "judge=[classifier,vllm]", "judges.vllm.model=m", "bootstrap=20",
        f"judges.vllm.base_url={server.url}", f"output={tmp_path}/out",
    ]  # fmt: skip
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        request = VqaRequest(**OmegaConf.to_container(compose("vqa", overrides), resolve=True))  # type: ignore[arg-type]
    result = ask_judges(request, Console(quiet=True))
    vllm = result["judges"]["vllm"]
    assert vllm["reading"]["strict"] == 1 and vllm["scores"]["a"]["category"]["value"] == 1
    assert vllm["scores"]["a"]["vqascore"]["value"] == pytest.approx(0.5)
    assert vllm["pairs"]["position_bias"] == 1
    assert "color" in result["judges"]["classifier"]["scores"]["b"]
    assert not any(SECRET in path.read_text() for path in (tmp_path / "out").glob("*.[jm]*"))


def _told(**probabilities: float) -> tuple[int, dict[str, Any]]:
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in probabilities.items()]
    content = [{"token": next(iter(probabilities)), "logprob": -0.1, "bytes": None, "top_logprobs": top}]
    choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "Yes"}}
    choice |= {"logprobs": {"content": content, "refusal": None}}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def _score_tasks() -> list[Task]:
    question = Question("vqascore", "vqascore", "score", 'Does this figure show "a red dress"?', ("yes", "no"))
    return [replace(task, question=question) for task in _tasks(4)]


def test_vqascore_is_the_probability_of_yes_or_missing_and_never_a_made_up_zero(
    server: Server, cache: AnswerCache
) -> None:
    told = [
        _told(Yes=0.5, **{" yes": 0.25, "No": 0.125, "Maybe": 0.1}),
        _told(No=0.9, Perhaps=0.05),  # yes is not among the tokens told: below 0.05, to their precision 0
        _told(The=0.9, A=0.1),  # neither: nothing is known
        _told(yes=0.75, no=0.25),
    ]
    server.behavior = lambda request, number: told[number - 1]
    answers = _ask(server, cache, _score_tasks(), logprobs=True, concurrency=1, stream=True)
    assert [a.parsed.answer for a in answers] == ["0.75", "0", None, "0.75"]
    assert [a.parsed.how for a in answers] == ["strict", "strict", "missing", "strict"]
    request = server.requests[0]
    assert (request["logprobs"], request["top_logprobs"], request["max_tokens"]) == (True, 20, 1)
    assert "response_format" not in request and request["messages"][0]["content"][-1]["text"].endswith('"a red dress"?')
    scores = per_item(answers, "m", 4)
    assert scores["vqascore"].tolist() == pytest.approx([0.75, 0, math.nan, 0.75], nan_ok=True)
    assert np.isnan(scores["all"]).all()  # a probability is in no mean of right answers
    again = _ask(server, cache, _score_tasks(), logprobs=True)
    assert [a.parsed for a in again] == [a.parsed for a in answers] and len(server.requests) == 4  # from the cache


def test_a_judge_without_probabilities_is_not_asked_for_scores_or_says_so(server: Server, cache: AnswerCache) -> None:
    assert _ask(server, cache, _score_tasks()) == [] and server.requests == []
    with pytest.raises(ConfigError, match="tells no probabilities: set judges.judge.logprobs=false"):
        _ask(server, cache, _score_tasks(), logprobs=True, concurrency=1)
