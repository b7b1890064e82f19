"""Token numbers as rows of the text store: what is kept of a caption while the text encoder trains.

The store keeps half precision, in which numbers above 2048 are not exact; two digits of base 256 are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 256


def pack_tokens(tokens: Tensor) -> Tensor:
    """int64 (N, E, L) below 65536 to float32 (N, E, L, 2): high and low digit."""
    return torch.stack([tokens // _BASE, tokens % _BASE], dim=-1).float()


def unpack_tokens(packed: Tensor) -> Tensor:
    """float (N, E, L, 2) to int64 (N, E, L)."""
    return packed[..., 0].round().long() * _BASE + packed[..., 1].round().long()
