"""Captions: templates, gaps, trigger word, tags, and what is too long is said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPTokenizer

from lora_dae.config import CaptionConfig, ConfigError, DataConfig
from lora_dae.data.captions import long_captions, prepare_captions, token_counts
from lora_dae.data.entry import Entry, FileBlob


def entry(id: str = "a.jpg", caption: str = "", **more: Any) -> Entry:
    return Entry(id, id, (caption,) if caption else (), FileBlob(Path(id)), where=f"line of {id}", **more)


def prepared(entries: list[Entry], **options: Any) -> list[Entry]:
    return prepare_captions(entries, DataConfig(captions=CaptionConfig(**options)))


def captions(entries: list[Entry], **options: Any) -> list[tuple[str, ...]]:
    return [e.captions for e in prepared(entries, **options)]


def test_templates_name_what_is_known() -> None:
    template = "a {gender} model wearing a {color} {pattern} {category}, studio photo"
    known = {"gender": "female", "color": "red", "pattern": "plaid"}
    full = entry(category="shirt", attributes=known)
    part = entry("b.jpg", category="shirt", attributes={"color": "orange"})
    assert captions([full, part], template=template) == [
        ("a female model wearing a red plaid shirt, studio photo",),
        ("a model wearing an orange shirt, studio photo",),
    ]
    with pytest.raises(ConfigError, match="needs fabric, but line of a.jpg has none"):
        captions([full], template="made of {fabric}")
    with pytest.raises(ConfigError, match="is no template"):
        captions([full], template="a {color")


def test_gaps_are_filled_as_told() -> None:
    some = [entry(caption="a hat"), entry("photos/red_dress-03.jpg", category="dress")]
    assert captions(some, missing="file_name") == [("a hat",), ("red dress",)]
    assert captions(some, missing="category") == [("a hat",), ("dress",)]
    assert captions(some, missing="drop") == [("a hat",)]
    with pytest.raises(ConfigError, match="line of photos/red_dress-03.jpg has no caption"):
        captions(some)


def test_a_file_of_captions_fills_gaps_but_not_with_rejected_lines(tmp_path: Path) -> None:
    rows = [
        {"id": "a.jpg", "text": "ignored: it has one"},
        {"id": "b.jpg", "text": "a wrong one", "reject": True},
        {"id": "b.jpg", "text": "a coat"},
    ]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert captions([entry(caption="a hat"), entry("b.jpg")], file=str(file)) == [("a hat",), ("a coat",)]
    file.write_text('{"id": "a.jpg"}')
    with pytest.raises(ConfigError, match="line 1 must be an object"):
        captions([entry()], file=str(file))


def test_a_caption_of_another_photo_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row inserted upstream gives each photo the id of the next; lines that tell no photo are used as ever."""
    photos = []
    for number in range(4):
        photos.append(tmp_path / f"{number}.png")
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(photos[-1])

    def lines_of(first: int) -> list[Entry]:
        return [
            replace(entry(f"train/{row}", category="garment"), image=FileBlob(photo))
            for row, photo in enumerate(photos[first : first + 3])
        ]

    rows: list[dict[str, str]] = [{"id": f"train/{row}", "text": f"a coat, {row}"} for row in range(3)]
    for row in (0, 1):
        rows[row]["digest"] = hashlib.sha256(photos[row + 1].read_bytes()).hexdigest()
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = CaptionConfig(file=str(file), missing="category")
    cfg = DataConfig(cache_dir=str(tmp_path / "cache"), captions=options)
    assert [e.caption for e in prepare_captions(lines_of(1), cfg)] == ["a coat, 0", "a coat, 1", "a coat, 2"]
    assert "other photos" not in capsys.readouterr().err
    for _ in range(2):
        assert [e.caption for e in prepare_captions(lines_of(0), cfg)] == ["garment", "garment", "a coat, 2"]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("2 of 2 captions in") == 1 and "python -m lora_dae.data caption --to" in said


def test_the_trigger_word_comes_first_and_once() -> None:
    some = [entry(caption="a hat"), entry("b", caption="sks hat, blue"), entry("c", caption="risks")]
    assert captions(some, trigger="sks") == [("sks, a hat",), ("sks hat, blue",), ("sks, risks",)]


def test_tags_are_shuffled_behind_the_kept_ones_alike_in_every_run() -> None:
    tags = "a dress, red, plaid, long, studio, front"
    (found,) = captions([entry(caption=tags)], shuffles=6, keep_tags=2)
    assert found[0] == tags and len(set(found)) == len(found) > 3
    for text in found:
        assert text.startswith("a dress, red, ") and sorted(text.split(", ")) == sorted(tags.split(", "))
    assert captions([entry(caption=tags)], shuffles=6, keep_tags=2) == [found]
    (triggered,) = captions([entry(caption=tags)], shuffles=2, keep_tags=1, trigger="sks")
    assert all(text.startswith("sks, a dress, ") for text in triggered)
    assert captions([entry(caption="a sentence, with one comma")], shuffles=3) == [("a sentence, with one comma",)]


def test_captions_decide_what_is_not_mirrored() -> None:
    told = prepared([entry(caption="a shirt with a logo"), entry("b", caption="a logotype"), entry("c", caption="hat")])
    assert [e.mirror for e in told] == [False, True, True]


def test_what_a_template_leaves_out_still_decides_what_is_not_mirrored() -> None:
    said = [
        entry(caption="t-shirt with a NASA logo", category="shirt"),
        entry("b", category="shirt", attributes={"print": "a text in red"}),
        entry("c", caption="a plain shirt", category="shirt", attributes={"print": "none"}),
    ]
    told = prepared(said, template="a {category}")
    assert [(e.caption, e.mirror) for e in told] == [("a shirt", False), ("a shirt", False), ("a shirt", True)]


@pytest.mark.parametrize(
    ("caption", "mirrored"),
    [
        ("a cap with two logos", False),
        ("white letters on a hoodie", False),
        ("Lettering across the back", False),
        ("printed texts", False),
        ("a letterman jacket", True),
        ("a textile belt", True),
        ("brightly colored", True),
    ],
)
def test_plurals_and_lettering_are_writing_too(caption: str, mirrored: bool) -> None:
    assert prepared([entry(caption=caption)])[0].mirror == mirrored


def test_what_the_text_encoder_will_not_see_is_said(tiny_backbone: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(tiny_backbone / "tokenizer")
    limit = tokenizer.model_max_length
    short, long = "a red dress", " ".join(["dress"] * 40)
    counts = token_counts([short, long], tokenizer)
    assert counts[0] <= limit < counts[1]
    whole = tokenizer(long, truncation=True, max_length=limit).input_ids
    assert len(whole) == limit  # that is how much is left
    said = long_captions([short, long, long], tokenizer)
    assert said is not None and said.startswith(f"1 of 2 different captions have more than the {limit} tokens")
    assert f"the longest has {counts[1]}" in said and long_captions([short], tokenizer) is None
    assert said.endswith("backbone.text_chunks=2 takes more")
    two = long_captions([short, long], tokenizer, encoders=2)  # of SDXL, which is refused with further windows
    assert two is not None and f"the longest has {counts[1]}" in two and "text_chunks" not in two
