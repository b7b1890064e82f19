"""Textual inversion, for comparison: new words in front of every caption are all that is learned.

Gal et al. 2022 (arXiv 2208.01618). Their vectors live beside the text encoder's embedding table and take the place of
its rows; nothing of the encoder changes. The file is what diffusers' ``load_textual_inversion`` reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_dae.adapter.atomic import load_tensors, save_tensors
from lora_dae.backbone.load import Backbone
from lora_dae.config import ConfigError

FILE_NAME = "learned_embeds.safetensors"
TOKEN = "<garment>"


class LearnedWords(nn.Module):
    """``count`` trainable vectors, begun as copies of the embedding of ``initial``, a word of the vocabulary."""

    def __init__(self, backbone: Backbone, count: int, initial: str = "a") -> None:
        super().__init__()
        if backbone.text_encoder_2 is not None:
            raise ConfigError("adapter.kind=textual_inversion is for one text encoder, SDXL has two: use another kind.")
        table = _table(backbone)
        (first, *_) = backbone.tokenizer(initial, add_special_tokens=False).input_ids
        self.weight = nn.Parameter(table[first].detach().float().repeat(count, 1))

    @property
    def tokens(self) -> list[str]:
        """As diffusers names the vectors of one word."""
        return [TOKEN, *(f"{TOKEN}_{number}" for number in range(1, len(self.weight)))]

    def attach(self, backbone: Backbone) -> None:
        """From now on the backbone's tokenizer knows the words and its text encoder reads them."""
        backbone.tokenizer.add_tokens(self.tokens)
        self._ids = torch.tensor(backbone.tokenizer.convert_tokens_to_ids(self.tokens))
        embedding: Any = backbone.text_encoder.get_input_embeddings()
        embedding.register_forward_pre_hook(self._hide)
        embedding.register_forward_hook(self._put)

    def prompt(self, caption: str) -> str:
        """The caption with the words before it; the empty one, guidance's other side, stays empty."""
        return f"{' '.join(self.tokens)} {caption}" if caption else caption

    def _hide(self, embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        ids = args[0]
        self._places = ids[..., None] == self._ids.to(ids.device)  # (B, L, count)
        return (ids.masked_fill(self._places.any(-1), 0),)

    def _put(self, embedding: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        own = self._places.to(output.dtype) @ self.weight.to(output)
        return torch.where(self._places.any(-1, keepdim=True), own, output)


def _table(backbone: Backbone) -> Tensor:
    embedding: Any = backbone.text_encoder.get_input_embeddings()
    return embedding.weight  # type: ignore[no-any-return]


def encode_with_words(backbone: Backbone, words: LearnedWords, captions: list[str]) -> Tensor:
    """Backbone.encode_text of the captions with the words, with gradient into them."""
    encode: Any = type(backbone).encode_text
    return encode.__wrapped__(backbone, [words.prompt(caption) for caption in captions])  # type: ignore[no-any-return]


def save_words(words: LearnedWords, folder: Path) -> Path:
    """Write FILE_NAME in ``folder``; returns the file."""
    return save_tensors({TOKEN: words.weight}, folder / FILE_NAME, {"format": "pt"})


def load_words(backbone: Backbone, folder: Path) -> LearnedWords:
    """The words of a finished run, attached and frozen: from now on every caption is encoded with them.

    Raises ConfigError if they are damaged or of another text encoder.
    """
    tensors, _ = load_tensors(folder / FILE_NAME, "it is damaged, train it anew")
    weight = tensors.get(TOKEN)
    if weight is None or weight.shape[1] != _table(backbone).shape[1]:
        raise ConfigError(f"{folder / FILE_NAME} was learned on another text encoder: load the run's own backbone.")
    words = LearnedWords(backbone, len(weight))
    words.weight.data.copy_(weight)
    words.requires_grad_(False).to(backbone.device)
    words.attach(backbone)
    plain = backbone.encode_text
    backbone.encode_text = lambda captions: plain([words.prompt(caption) for caption in captions])  # type: ignore[method-assign]
    return words
