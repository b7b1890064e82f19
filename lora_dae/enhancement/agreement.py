"""Does the source photo show what the caption says? Where it does not, its texture is not let in.

    trust = sigmoid( <A text, f(source)> / sqrt(width) + bias )

Gates compare the source with the picture that is being drawn, and a network that is steered by a wrong photo draws
that photo's garment: the two agree, and the gates open. The caption is the one witness that the photo cannot have
bribed. ``text`` is the mean of the frozen text encoder's tokens, ``source`` the photo's latents by what a caption can
say of them: color (means) and pattern (spreads and energies of bands), of the whole photo and of its middle. At most
35,000 numbers (6,200 on the embedded backbone), trained in seconds on right and swapped pairs (as CLIP is, Radford et
al. 2021, but with a yes or no for each pair). A caption that says nothing of the garment is trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_dae.enhancement.bands import split_bands

LEVELS = 3
_FLOOR = 1e-4


class Agreement(nn.Module):
    """Trust in source photos, from captions' embeddings of ``text_channels`` and latents of ``channels``.

    ``tokens``: the text encoder's window. What may follow in an embedding, pooled text or further windows, is not read:
    programs differ in what they hand over.
    """

    def __init__(self, text_channels: int, channels: int, tokens: int = 77, hidden: int = 32, width: int = 16) -> None:
        super().__init__()
        self.width, self.tokens = width, tokens
        self.text = nn.Linear(text_channels, width)
        self.input = nn.Linear((4 + LEVELS) * channels, hidden)
        self.output = nn.Linear(hidden, width)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, text: Tensor, source: Tensor) -> Tensor:
        """Trust (B,) in (0, 1): ``text`` (B, L, D) embeddings of captions, ``source`` (B, C, h, w) latents."""
        with torch.autocast(source.device.type, enabled=False):
            said, seen = self.read(words(text, self.tokens)), self.look(facts(source))
            return ((said * seen).sum(1) / self.width**0.5 + self.bias).sigmoid()

    def read(self, words: Tensor) -> Tensor:
        """(N, width) of what captions say, from ``words``."""
        return self.text(words)

    def look(self, facts: Tensor) -> Tensor:
        """(N, width) of what photos show, from ``facts``."""
        return self.output(functional.silu(self.input(facts)))

    def logits(self, words: Tensor, facts: Tensor) -> Tensor:
        """Of every caption (N, D) with every photo (M, F): (N, M), before the sigmoid."""
        return self.read(words) @ self.look(facts).T / self.width**0.5 + self.bias


def words(text: Tensor, tokens: int) -> Tensor:
    """Embeddings of captions (B, L, D) as one vector each, (B, D): the mean of the first ``tokens``, with padding."""
    return text[:, :tokens].float().mean(1)


def facts(source: Tensor) -> Tensor:
    """What latents (B, C, h, w) show, (B, 7 C): mean and spread, of the middle too, and there log energies of bands."""
    source = source.float()
    height, width = source.shape[2:]
    middle = (..., slice(height // 4, height - height // 4), slice(width // 4, width - width // 4))
    bands = split_bands(source, LEVELS)[0][middle]
    energies = (bands.square().mean((3, 4)) + _FLOOR).log().transpose(0, 1).flatten(1)
    moments = [f(x, (2, 3)) for x in (source, source[middle]) for f in (torch.mean, torch.std)]
    return torch.cat([*moments, energies], dim=1)
