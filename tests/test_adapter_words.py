"""Textual inversion: diffusers reads the words as we do, only they learn, and plain captions stay plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lora_dae.adapter.words import TOKEN, LearnedWords, encode_with_words, load_words, save_words
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig, Config, ConfigError
from lora_dae.rules import check


@pytest.fixture
def words(tiny_backbone: Path):  # noqa: ANN201
    """(backbone, two words with values of their own)."""
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    found = LearnedWords(backbone, 2)
    found.weight.data.copy_(torch.randn(found.weight.shape, generator=torch.Generator().manual_seed(0)))
    found.attach(backbone)
    return backbone, found


def test_diffusers_reads_the_file_and_encodes_the_same(words, tiny_backbone: Path, tmp_path: Path) -> None:  # noqa: ANN001
    backbone, ours = words
    file = save_words(ours, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_backbone)
    pipe.load_textual_inversion(file)
    theirs, _ = pipe.encode_prompt(f"{TOKEN} a red dress", "cpu", 1, False)
    torch.testing.assert_close(encode_with_words(backbone, ours, ["a red dress"]), theirs)


def test_it_begins_as_a_word_of_the_vocabulary(tiny_backbone: Path) -> None:
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    plain = backbone.encode_text(["a a dress", "a dress", ""])
    fresh = LearnedWords(backbone, 1)
    fresh.attach(backbone)
    torch.testing.assert_close(encode_with_words(backbone, fresh, ["a dress"])[0], plain[0])
    assert torch.equal(backbone.encode_text(["a dress", ""]), plain[1:])  # captions without the word are as before
    assert torch.equal(encode_with_words(backbone, fresh, [""])[0], plain[2])


def test_gradients_reach_the_words_alone(words) -> None:  # noqa: ANN001
    backbone, ours = words
    encode_with_words(backbone, ours, ["a red dress"]).square().sum().backward()
    assert ours.weight.grad is not None and (ours.weight.grad.abs().sum(1) > 0).all()
    assert all(p.grad is None for p in backbone.text_encoder.parameters())


def test_a_loaded_run_puts_its_words_before_every_caption(words, tiny_backbone: Path, tmp_path: Path) -> None:  # noqa: ANN001
    backbone, ours = words
    save_words(ours, tmp_path)
    fresh = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    load_words(fresh, tmp_path)
    found = fresh.encode_text(["a red dress", ""])
    torch.testing.assert_close(found, encode_with_words(backbone, ours, ["a red dress", ""]))
    assert not found.requires_grad


def test_what_does_not_go_together_is_refused(words, tmp_path: Path) -> None:  # noqa: ANN001
    backbone, ours = words
    with pytest.raises(ConfigError, match="enhancement=none"):
        check(Config(run_dir="x", adapter=AdapterConfig(kind="textual_inversion")))
    ours.weight.data = torch.zeros(2, 7)
    save_words(ours, tmp_path)
    with pytest.raises(ConfigError, match="another text encoder"):
        load_words(backbone, tmp_path)
    backbone.text_encoder_2 = backbone.text_encoder
    with pytest.raises(ConfigError, match="SDXL"):
        LearnedWords(backbone, 1)
