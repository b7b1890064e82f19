"""The question bank: what it asks about which prompt, and what it refuses; answers out of a judge's text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lora_dae.config import ConfigError
from lora_dae.data.studio import attributes as studio
from lora_dae.data.studio.captions import caption as studio_caption
from lora_dae.vqa.bank import GRADES, PAIR_OPTIONS, SHIPPED, load_bank
from lora_dae.vqa.parse import parse_answer


def test_every_studio_attribute_can_be_asked_about() -> None:
    bank = load_bank()
    for i in range(40):
        look = studio.draw_look(0, i, "target")
        words = look.words()
        questions = {q.id: q for q in bank.questions("a woman", words)}
        assert questions["category"].right == words["garment"] and questions["pattern"].right == words["pattern"]
        assert questions["color_named"].text == f"Is the garment mainly {words['color']}?"
        assert ("length" in questions) == (words["length"] != "hip")
        assert ("patterned" in questions) == (words["pattern"] != "solid")


def test_attributes_are_read_off_captions_without_hair_and_background() -> None:
    """What the studio's captions say is what its looks are; nothing is made up."""
    bank = load_bank()
    for i in range(60):
        look = studio.draw_look(1, i, "target")
        words = look.words()
        found = bank.read_caption(studio_caption(look, np.random.default_rng(i)))
        assert {"garment", "color", "pattern"} - set(found) <= {"pattern"}  # "solid" is never said
        assert all(words[name] == value for name, value in found.items()), (found, words)


def test_ambiguous_captions_name_nothing() -> None:
    found = load_bank().read_caption("a red dress and a blue shirt, T-shirts nearby, in a longhouse")
    assert "color" not in found and "garment" not in found and "sleeve" not in found
    assert load_bank().read_caption("A grey V-neck sweater")["color"] == "gray"
    assert load_bank().read_caption("a t-shirt")["garment"] == "t-shirt"  # and no shirt


def test_questions_without_their_attribute_are_not_asked_nor_their_children_orphaned() -> None:
    asked = {q.id: q for q in load_bank().questions("something", {})}
    assert "color" not in asked and "category" not in asked and "anatomy" not in asked
    assert asked["texture"].parents == ("garment_there",) and asked["texture"].options == GRADES
    with_person = {q.id: q for q in load_bank().questions("a woman wearing a skirt", {"sleeve": "short"})}
    assert with_person["sleeve"].parents == ()  # its parent "category" was not asked
    assert with_person["anatomy"].parents == ("one_person",)
    assert with_person["caption"].text == 'Does this figure show "a woman wearing a skirt"? Please answer yes or no.'


def test_an_edited_bank_is_another_version(tmp_path: Path) -> None:
    copy = tmp_path / "bank.yaml"
    copy.write_text(SHIPPED.read_text() + "\n# a word more\n")
    assert load_bank(copy).version != load_bank().version
    assert load_bank(copy).templates == load_bank().templates


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("{id: a, about: x, kind: essay, text: t}", "kind essay"),
        ("{id: a, about: x, kind: choice, text: t}", "choice without attribute"),
        ("{id: a, about: x, kind: choice, attribute: size, text: t}", "asks about size"),
        ("{id: a, about: x, kind: yes_no, text: t}", "needs answer"),
        ("{id: a, about: x, kind: graded, text: t, parents: [b]}", "parent b"),
        ("{id: a, about: x, kind: graded, text: 'is it {color}?'}", "fills in {color}"),
        ("{id: a, about: x, kind: graded, text: t, answre: 1}", "unknown key answre"),
        ("{id: ok, about: x, kind: graded, text: t}", "id of an earlier"),
        ("{about: x}", "needs id, about"),
    ],
)
def test_a_wrong_question_is_named(question: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.yaml"
    first = "{id: ok, about: x, kind: graded, text: t}"
    path.write_text(f"version: 1\nattributes: {{color: [red]}}\nquestions:\n  - {first}\n  - {question}\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_bank(path)
    assert "question 2" in str(error.value)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("{id: q}", "needs id and text"),
        ("q", "needs id and text"),
        ("{id: p, text: t}", "id of an earlier"),
        ("{id: q, text: 'which is {color}?'}", "fills in {color}"),
    ],
)
def test_a_wrong_question_about_two_pictures_is_named(pair: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.yaml"
    question = "{id: ok, about: x, kind: graded, text: t}"
    path.write_text(f"version: 1\nquestions: [{question}]\npairs:\n  - {{id: p, text: t}}\n  - {pair}\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_bank(path)
    assert "pair 2" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_bank_is_told(tmp_path: Path) -> None:
    path = tmp_path / "bank.yaml"
    for text, message in (("a: [", "no YAML"), ("questions: [1]", "needs `version`"), ("- 1", "needs `version`")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_bank(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_bank(tmp_path / "absent.yaml")


COLORS = ("red", "blue", "light blue")


@pytest.mark.parametrize(
    ("text", "options", "answer", "how"),
    [
        ('{"answer": "yes"}', ("yes", "no"), "yes", "strict"),
        (' {"answer":"4"}\n', GRADES, "4", "strict"),
        ('```json\n{"answer": "Yes."}\n```', ("yes", "no"), "yes", "tolerant"),
        ('{"answer": 4, "reason": "crisp"}', GRADES, "4", "tolerant"),
        ("<think>no, wait: is it no?</think> Yes.", ("yes", "no"), "yes", "tolerant"),
        ("<think>it could be red or", COLORS, None, "missing"),
        ("Answer: **no**, because yes would be wrong", ("yes", "no"), "no", "tolerant"),
        ("I would give it 4/5.", GRADES, "4", "tolerant"),
        ("4 out of 5", GRADES, "4", "tolerant"),
        ("Score: 3", GRADES, "3", "tolerant"),
        ("The color is Light Blue", COLORS, "light blue", "tolerant"),
        ("a t-shirt", ("shirt", "t-shirt"), "t-shirt", "tolerant"),
        ("yes and no", ("yes", "no"), None, "missing"),
        ('{"answer": "yes"} {"answer": "no"}', ("yes", "no"), None, "missing"),
        ("4.5", GRADES, None, "missing"),
        ("nothing", ("yes", "no"), None, "missing"),
        ("", GRADES, None, "missing"),
        ("7", GRADES, None, "missing"),
        ("[" * 100_000, GRADES, None, "missing"),
        ("between 3 and 4", GRADES, None, "missing"),
        ("I have no idea.", ("yes", "no"), None, "missing"),
        ("No idea.", ("yes", "no"), None, "missing"),
        ("At first glance both look alike", PAIR_OPTIONS, None, "missing"),
        ("I see 1 garment", GRADES, None, "missing"),
        ("4/10", GRADES, None, "missing"),
        ("2 out of 3 buttons are there", GRADES, None, "missing"),
        ("**Yes**, it is.", ("yes", "no"), "yes", "tolerant"),
        ("Second\nIts cloth is sharper.", PAIR_OPTIONS, "second", "tolerant"),
    ],
)
def test_answers_are_read_or_missing_never_guessed(text: str, options: tuple[str, ...], answer: str, how: str) -> None:
    parsed = parse_answer(text, options)
    assert (parsed.answer, parsed.how) == (answer, how)
