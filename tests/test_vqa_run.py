"""From pictures to table: pairs in both orders, controls, the command."""

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
from test_vqa_score import _answer, _q

from lora_dae.config import ConfigError, conf_dir
from lora_dae.evaluation.attributes.classifier import load_embedded
from lora_dae.evaluation.pictures import Item, write_pictures
from lora_dae.evaluation.report.sheets import judges_sheets
from lora_dae.vqa import run as vqa
from lora_dae.vqa.ask import Task, ask_all
from lora_dae.vqa.bank import PAIR_OPTIONS, Question
from lora_dae.vqa.cache import AnswerCache, image_hash
from lora_dae.vqa.judges import ClassifierJudge, Judge, JudgeConfig, Reply
from lora_dae.vqa.pairwise import outcome, pair_tasks

ROOT = Path(__file__).parent.parent


class Scripted:
    """A judge whose answers are a function of pictures and question."""

    concurrency = 1
    cost = 0.0

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
    assert saved["schema"] == 3 and saved["methods"] == ["flat", "sharp"] and saved["protocol"]["bank"].startswith("2-")
    sheets = {sheet.title: sheet for sheet in judges_sheets(tmp_path / "out", ["flat", "sharp"])}
    titles = ["Judge seeing", "Judge seeing: pairs", "Judge blind", "Judge blind: pairs"]
    assert list(sheets) == [*titles, "Agreement between judges (Krippendorff's alpha)"]
    assert "position bias 100.0%" in sheets["Judge blind: pairs"].notes[0]
    assert ["texture: flat over sharp", "0", "6", "0"] in [row[:4] for row in sheets["Judge seeing: pairs"].rows]
    assert any("Warning: it does not see texture" in note for note in sheets["Judge blind"].notes)


def test_few_prompts_prove_no_blindness_and_controls_that_are_left_out_are_told(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four prompts of one mind are 2 of 16 sign patterns, whatever the judge sees."""
    judge = Scripted("seeing", _contrast)
    result = _ask(folders, tmp_path / "few", [judge], monkeypatch, "num_samples=4")
    seen = result["judges"]["seeing"]["sees_texture"]
    assert seen["difference"] > 0 and seen["p"] == 2 / 16
    text = (tmp_path / "few" / "vqa.md").read_text()
    assert "Whether it sees texture could not be shown (4 prompts, difference +" in text
    assert "does not see texture" not in text and "no controls" not in text
    silent = Scripted("silent", lambda i, q: "hm" if q.about == "texture" else _contrast(i, q))
    _ask(folders, tmp_path / "silent", [silent], monkeypatch)
    assert "could not be shown (0 prompts)" in (tmp_path / "silent" / "vqa.md").read_text()
    for folder in folders:  # one line of each
        lines = (Path(folder) / "metadata.jsonl").read_text().splitlines()
        row = json.loads(lines[2])
        del row["real"]
        lines[2] = json.dumps(row)
        (Path(folder) / "metadata.jsonl").write_text("\n".join(lines))
    result = _ask(folders, tmp_path / "without", [judge], monkeypatch)
    assert list(result["judges"]["seeing"]["scores"]) == ["flat", "sharp"]
    text = (tmp_path / "without" / "vqa.md").read_text()
    assert "**Warning: no controls, as 1 of 6 prompts have no real photo" in text
    (scores, pairs) = judges_sheets(tmp_path / "without", ["flat", "sharp"])
    assert any("Warning: no controls, as 1 of 6 prompts" in note for note in scores.notes)
    assert any("one judge alone" in note for note in scores.notes) and "pairs" in pairs.title


def test_judges_that_agree_on_the_controls_alone_do_not_agree() -> None:
    """Everybody tells sharp photos from blurred ones; on the methods these two say the opposite."""
    question = _q("texture", None, kind="graded")
    said = {"a": ("2", "4"), "b": ("4", "2"), vqa.REAL: ("5", "5"), vqa.BLURRED: ("1", "1")}
    answers = {
        judge: [_answer(i, question, both[k], (row,)) for i in range(10) for row, both in said.items()]
        for k, judge in enumerate(("one", "two"))
    }
    result = vqa.summarize(answers, {}, list(said), ["a", "b"], 10, 20)
    assert result["agreement"]["texture (graded)"] < 0
    assert result["judges"]["one"]["sees_texture"]["verdict"] == "better"


def test_judges_are_loaded_when_runs_are_there_and_local_ones_when_pictures_are(
    folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    gather = vqa.gather

    def gathered(*given: Any) -> Any:
        order.append("pictures")
        return gather(*given)

    def built(name: str, cfg: JudgeConfig) -> Judge:
        order.append(name)
        return Scripted(name, _contrast)

    monkeypatch.setattr(vqa, "gather", gathered)
    monkeypatch.setattr(vqa, "build_judge", built)
    judges = {"local": {"kind": "transformers", "model": "m"}, "remote": {"kind": "endpoint", "model": "m"}}
    request = _request([str(tmp_path / "absent")], tmp_path / "out", "num_samples=2")
    request.judges = judges
    with pytest.raises(ConfigError, match="absent does not exist"):
        vqa.ask_judges(request, Console(quiet=True))
    assert order == [] and not (tmp_path / "out").exists()
    request = _request(folders, tmp_path / "out", "num_samples=2")
    request.judges = judges
    assert list(vqa.ask_judges(request, Console(quiet=True))["judges"]) == ["local", "remote"]
    assert order == ["remote", "pictures", "local"]


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


def test_the_command(folders: list[str], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "lora_dae.vqa", f"runs=[{','.join(folders)}]", "bootstrap=20"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert "Judge classifier" in done.stdout and (tmp_path / "vqa" / "vqa.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "sharp", "vqa"]
