"""From pictures to table: pairs in both orders, controls, the command; a tiny real VLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from test_adapter_atomic import full_disk
from test_vqa_score import _q
from tokenizers import Tokenizer, decoders, models
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lora_dae.config import ConfigError, conf_dir
from lora_dae.evaluation.attributes.classifier import load_embedded
from lora_dae.evaluation.pictures import Item, write_pictures
from lora_dae.vqa import run as vqa
from lora_dae.vqa.__main__ import main
from lora_dae.vqa.ask import Task, ask_all
from lora_dae.vqa.bank import PAIR_OPTIONS, Question
from lora_dae.vqa.cache import AnswerCache, image_hash
from lora_dae.vqa.judges import ClassifierJudge, Judge, JudgeConfig, Reply, build_judge, enlarged, judge_config
from lora_dae.vqa.pairwise import outcome, pair_tasks
from lora_dae.vqa.score import per_item, reading

ROOT = Path(__file__).parent.parent


class Scripted:
    """A judge whose answers are a function of pictures and question."""

    concurrency = 1

    def __init__(self, name: str, say: Any) -> None:
        self.name, self.key, self.say, self.asked = name, name, say, 0

    def takes(self, question: Question) -> bool:
        return question.kind != "score"

    def ask(self, images: Sequence[np.ndarray], question: Question) -> Reply:
        self.asked += 1
        return Reply(self.say(images, question))


def _pictures(values: Sequence[int]) -> list[np.ndarray]:
    return [np.full((8, 8, 3), v, np.uint8) for v in values]


def _pair_outcome(say: Any, tmp_path: Path) -> Any:
    question = Question("realism", "realism", "pair", "?", PAIR_OPTIONS)
    pictures = {"dark": _pictures(range(20)), "light": _pictures(range(100, 120))}
    tasks = pair_tasks([[question]] * 20, pictures, list(pictures))
    return outcome(ask_all(tasks, Scripted("s", say), AnswerCache(tmp_path / "c.sqlite")), "s")


def test_a_consistent_judge_wins_and_a_biased_one_only_ties(tmp_path: Path) -> None:
    lighter = _pair_outcome(lambda i, q: "first" if i[0].mean() > i[1].mean() else "second", tmp_path / "a")
    assert {v.winner for v in lighter.votes["realism"]} == {"light"} and len(lighter.votes["realism"]) == 20
    assert (lighter.position_bias, lighter.first_share, lighter.inconsistent, lighter.missing) == (0, 0.5, 0, 0)
    always = _pair_outcome(lambda i, q: "first", tmp_path / "b")
    assert {v.winner for v in always.votes["realism"]} == {None}
    assert (always.position_bias, always.first_share, always.inconsistent) == (1, 1, 1)
    unsure = _pair_outcome(lambda i, q: "tie" if i[0].mean() < i[1].mean() else "first", tmp_path / "c")
    assert (
        {v.winner for v in unsure.votes["realism"]} == {None} and unsure.position_bias == 0 and unsure.inconsistent == 1
    )
    silent = _pair_outcome(lambda i, q: "hm" if i[0].mean() == 3 else "tie", tmp_path / "d")
    assert silent.missing == 1 and len(silent.votes["realism"]) == 19


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two methods on six prompts: the real photos' noise, and half of it blurred away."""
    rng = np.random.default_rng(0)
    real = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
    items = [
        Item(f"{i:02d}", f"a red shirt {i}", {"garment": "shirt", "color": "red"}, None, real[i], 1) for i in range(6)
    ]
    smooth = [(r // 2 + 64).astype(np.uint8) for r in real]
    for name, images in (("sharp", real), ("flat", smooth)):
        write_pictures(tmp_path / name, items, images)
    return [str(tmp_path / "flat"), str(tmp_path / "sharp")]


def _request(folders: list[str], output: Path, *overrides: str) -> vqa.VqaRequest:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("vqa", [f"runs=[{','.join(folders)}]", f"output={output}", "bootstrap=50", *overrides])
    return vqa.VqaRequest(**OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def _contrast(images: Sequence[np.ndarray], question: Question) -> str:
    """Grades by contrast, prefers it, sees everything that it is asked for."""
    spread = [float(i.std()) for i in images]
    if question.kind == "pair":
        return json.dumps({"answer": "first" if spread[0] > spread[1] else "second"})
    if question.kind == "graded":
        return json.dumps({"answer": str(1 + min(4, int(spread[0] / 16)))})
    return json.dumps({"answer": question.right})


def _ask(
    folders: list[str], output: Path, judges: list[Judge], monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> Any:
    by_name = {j.name: j for j in judges}
    monkeypatch.setattr(vqa, "build_judge", lambda name, cfg: by_name[name])
    request = _request(folders, output, *overrides)
    request.judges = {name: {"kind": "classifier"} for name in by_name}
    return vqa.ask_judges(request, Console(quiet=True))


def test_two_judges_a_table_and_controls(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeing = Scripted("seeing", _contrast)
    blind = Scripted("blind", lambda i, q: "no idea" if q.id == "color" else json.dumps({"answer": q.options[0]}))
    result = _ask(folders, tmp_path / "out", [seeing, blind], monkeypatch)
    entry = result["judges"]["seeing"]
    assert list(entry["scores"]) == ["flat", "sharp", vqa.REAL, vqa.BLURRED]
    assert entry["scores"]["sharp"]["texture"]["value"] > entry["scores"]["flat"]["texture"]["value"]
    assert entry["scores"]["sharp"]["color"]["value"] == 1
    assert entry["against_first"]["sharp | color"]["verdict"] == "cannot tell"
    assert entry["sees_texture"]["difference"] > 0
    row = entry["pairs"]["questions"]["texture"]["win_rates"][0]
    assert (row["a"], row["wins"], row["losses"], row["ties"]) == ("flat", 0, 6, 0)
    # Six prompts of one mind are 2 of 64 sign patterns; three questions make that 6 of 64.
    assert row["p_holm"] == pytest.approx(6 / 64) and row["verdict"] == "cannot tell"
    other = result["judges"]["blind"]
    assert other["sees_texture"]["verdict"] == "cannot tell" and other["pairs"]["position_bias"] == 1
    assert other["reading"]["parse_failures"] == pytest.approx(1 / len({a for a in _ids(tmp_path / "out")}))
    assert result["agreement"]["texture (graded)"] < 0.5
    text = (tmp_path / "out" / "vqa.md").read_text()
    assert "one judge alone" not in text
    assert "Warning: it does not see texture" in text and "parse failures" in text and "position bias 100.0%" in text
    saved = json.loads((tmp_path / "out" / "vqa.json").read_text())
    assert saved["schema"] == 2 and saved["protocol"]["bank"].startswith("2-")


def _ids(output: Path) -> list[str]:
    rows = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    return [row["question"] for row in rows if len(row["methods"]) == 1]


def test_a_killed_run_goes_on_where_it_stopped(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def dies(images: Sequence[np.ndarray], question: Question) -> str:
        if judge.asked > 30:
            raise KilledError
        return _contrast(images, question)

    judge = Scripted("j", dies)
    with pytest.raises(KilledError):
        _ask(folders, tmp_path / "out", [judge], monkeypatch)
    judge.asked, judge.say = 0, _contrast
    straight = Scripted("j", _contrast)
    resumed = _ask(folders, tmp_path / "out", [judge], monkeypatch)
    assert _ask(folders, tmp_path / "other", [straight], monkeypatch) == resumed
    assert judge.asked == straight.asked - 30


def test_options_of_the_command_do_something(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Scripted("j", _contrast)
    result = _ask(folders, tmp_path / "a", [judge], monkeypatch, "pairs=false", "controls=false", "num_samples=2")
    assert "pairs" not in result["judges"]["j"] and list(result["judges"]["j"]["scores"]) == ["flat", "sharp"]
    assert result["protocol"]["prompts"] == 2
    assert "Warning: one judge alone" in (tmp_path / "a" / "vqa.md").read_text()
    bank = tmp_path / "bank.yaml"
    bank.write_text("version: mine\nquestions: [{id: a, about: look, kind: graded, text: 'Nice?'}]\n")
    result = _ask(folders, tmp_path / "b", [judge], monkeypatch, f"bank={bank}", "bootstrap=20")
    assert set(result["judges"]["j"]["scores"]["flat"]) == {"look", "all"}
    with pytest.raises(ConfigError, match="bootstrap=1"):
        _ask(folders, tmp_path / "c", [judge], monkeypatch, "bootstrap=1")


def test_the_embedded_classifier_answers_what_it_knows() -> None:
    judge = ClassifierJudge("classifier", load_embedded())
    colors = tuple(judge.classifier.attributes["color"])
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    question = Question("color", "color", "choice", "?", colors, "red", "color")
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = colors[int(judge.classifier.predict(pixels)["color"].indices)]
    assert json.loads(judge.ask([image], question).raw) == {"answer": expected}
    assert judge.takes(question)
    assert not judge.takes(Question("c", "closure", "choice", "?", ("zip", "none"), "zip", "closure"))
    assert not judge.takes(_q("realism", None, kind="graded"))


def test_every_judge_of_conf_composes_and_is_checked() -> None:
    names = sorted(path.stem for path in (conf_dir() / "judge").glob("*.yaml"))
    request = _request(["a"], Path("out"), f"judge=[{','.join(names)}]")
    assert sorted(request.judges) == names
    for name, values in request.judges.items():
        if "model" in values:
            with pytest.raises(ConfigError, match=f"judges.{name}.model is missing"):
                judge_config(name, values)
            values["model"] = "m"
        assert judge_config(name, values).kind in ("endpoint", "transformers", "classifier")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "oracle"}, "kind=oracle"),
        ({"kind": "endpoint", "model": "m", "api_key": "sk"}, "do not belong into configs"),
        ({"kind": "endpoint", "model": "m", "base_url": "http://me:pw@host/v1"}, "password or a query"),
        ({"kind": "endpoint", "model": "m", "base_url": "http://host/v1?key=pw"}, "password or a query"),
        ({"kind": "endpoint", "model": "m", "modle": 1}, "modle is unknown"),
        ({"kind": "endpoint", "model": "m", "timeout": 0}, "timeout=0"),
        ({"kind": "endpoint", "model": "m", "max_cost": 1.0}, "needs price_in"),
        ({"kind": "endpoint", "model": "m", "requests_per_minute": -1}, "requests_per_minute=-1"),
        ("classifier", "must be a mapping"),
    ],
)
def test_wrong_judges_are_one_sentence(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        judge_config("x", values)
    assert "sk" not in str(error.value).split() and "pw" not in str(error.value).split()


def test_a_full_disk_stops_in_one_sentence_and_earlier_answers_stay(tmp_path: Path) -> None:
    """SQLite's own error, by its own limit on the size of a file."""
    cache = AnswerCache(tmp_path / "c.sqlite")
    question = _q("a")
    cache.put(["p"], "q", "j", "1", "kept")
    pages = cache._db.execute("PRAGMA page_count").fetchone()[0]
    cache._db.execute(f"PRAGMA max_page_count={pages}")
    long = Scripted("s", lambda images, question: "x" * 20_000)
    with pytest.raises(
        ConfigError, match=r"c.sqlite takes no more answers \(.*full\): make room.*earlier answers stay"
    ):
        ask_all([Task(0, ("m",), tuple(_pictures([1])), question)], long, cache)
    assert len(cache) == 1 and cache.get(["p"], "q", "j", "1") == "kept"


def test_a_disk_that_is_full_at_the_table_keeps_the_answers(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, write = Scripted("seeing", _contrast), vqa._write

    def on_full_disk(*args: Any) -> None:
        with full_disk():
            write(*args)

    with monkeypatch.context() as patch, pytest.raises(
        ConfigError, match=r"cannot write .*vqa.json .*all answers stay in .*answers.sqlite"
    ):  # fmt: skip
        patch.setattr(vqa, "_write", on_full_disk)
        _ask(folders, tmp_path / "out", [judge], monkeypatch)
    assert not [f for f in (tmp_path / "out").iterdir() if not f.name.startswith("answers.sqlite")]
    asked = judge.asked
    assert _ask(folders, tmp_path / "out", [judge], monkeypatch)["judges"] and judge.asked == asked > 0


def test_a_cache_of_another_kind_is_refused_and_pixels_are_the_key(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("not a database at all, only a longer line of text " * 20)
    with pytest.raises(ConfigError, match="no answer cache"):
        AnswerCache(tmp_path / "note.txt")
    cache = AnswerCache(tmp_path / "c.sqlite")
    cache._db.execute("PRAGMA user_version=9")
    cache.close()
    with pytest.raises(ConfigError, match="version 9"):
        AnswerCache(tmp_path / "c.sqlite")
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert image_hash(image) == image_hash(image.copy()) != image_hash(image.reshape(2, 8, 3))
    assert image_hash(image.transpose(1, 0, 2)) == image_hash(np.ascontiguousarray(image.transpose(1, 0, 2)))


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llava: letters as tokens, 28-pixel pictures of four patches."""
    folder = tmp_path_factory.mktemp("vlm")
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<image>", *letters])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    bpe.decoder = decoders.Fuse()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=["<image>"], **special)
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}\n"
    )
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=template,
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    small = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **small).to_dict()
    text = LlamaConfig(vocab_size=len(vocab), bos_token_id=1, eos_token_id=2, pad_token_id=2, **small).to_dict()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=3))
    for p in model.model.multi_modal_projector.parameters():
        p.data *= 1e3  # a freshly initialized one hardly looks at its input
    for p in model.model.language_model.parameters():
        p.data *= 3
    model.save_pretrained(folder)
    return folder


def test_a_random_vision_language_model_is_deterministic_sees_pictures_and_is_never_scored(
    tiny_vlm: Path, tmp_path: Path
) -> None:
    judge = build_judge("tiny", JudgeConfig("transformers", model=str(tiny_vlm), max_tokens=8))
    questions = [_q("a"), _q("g", None, kind="graded")]
    images = _pictures([0, 90, 255])
    tasks = [Task(k, ("m",), (image,), q) for k, image in enumerate(images) for q in questions]
    tasks.append(Task(0, ("m", "n"), tuple(images[:2]), Question("p", "p", "pair", "?", PAIR_OPTIONS)))
    answers, again = (ask_all(tasks, judge, AnswerCache(tmp_path / f"{i}.sqlite")) for i in range(2))
    assert [a.raw for a in answers] == [a.raw for a in again]
    assert len({a.raw for a in answers if a.task.question.id == "a"}) > 1  # other pictures, other words
    single = [a for a in answers if len(a.task.methods) == 1]
    assert reading(single).parse_failures == 1
    assert all(np.isnan(v).all() for v in per_item(single, "m", 3).values())


def test_vqascore_of_a_local_model_is_its_softmax(tiny_vlm: Path) -> None:
    """The probability of the tokens that spell yes, after the very input that a question would have."""
    judge: Any = build_judge("tiny", JudgeConfig("transformers", model=str(tiny_vlm)))
    question = Question("s", "vqascore", "score", "Is it red?", ("yes", "no"))
    assert not judge.takes(question)  # letters are its tokens: none of them is an answer
    tokenizer = judge.processor.tokenizer
    numbers = {word: tokenizer.convert_tokens_to_ids(letter) for word, letter in (("yes", "Y"), ("no", "n"))}
    judge._answers = {number: word for word, number in numbers.items()}  # as if these letters were the words
    picture = np.full((28, 28, 3), 90, np.uint8)
    inputs = judge.processor(images=[enlarged(picture)], text="<image>Is it red?", return_tensors="pt")
    with torch.no_grad():
        probabilities = judge.model(**inputs).logits[0, -1].softmax(0)
    told = {word: probabilities[number].item() for word, number in numbers.items()}
    assert judge.takes(question)
    assert json.loads(judge.ask([picture], question).raw) == pytest.approx(told, rel=1e-4)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path: Path, tiny_vlm: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_judge("x", JudgeConfig("transformers", model=str(tmp_path)))


def test_the_command(folders: list[str], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "lora_dae.vqa", f"runs=[{','.join(folders)}]", "bootstrap=20"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert "Judge classifier" in done.stdout and (tmp_path / "vqa" / "vqa.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "sharp", "vqa"]


def test_a_command_without_runs_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vqa"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: runs is missing")
