"""LoRA weights apart from any file layout and any model: what every converter reads and writes.

A layer's change of its weight is ``(alpha / rank) * up @ down``, whatever the tool calls the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_dae.config import ConfigError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoraWeights:
    """One adapted layer.

    ``down`` (rank, in) or (rank, in, k, k); ``up`` (out, rank) or (out, rank, 1, 1); ``alpha``: the numerator
    of the scale, with rsLoRA's square root already worked into it; ``magnitude`` (out,): DoRA's row norms.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution larger than 1x1."""
        return self.down.ndim == 4 and self.down.shape[-1] > 1

    def delta(self) -> Tensor:
        """What is added to the base weight, float32, (out, in) or (out, in, k, k); DoRA's rescaling aside."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(self.up.shape[0], *self.down.shape[1:])


def cast(layers: Mapping[str, LoraWeights], dtype: str) -> dict[str, LoraWeights]:
    """The same in ``fp32``, ``fp16`` or ``bf16``; alpha stays exact.

    Raises ConfigError for an unknown dtype, and for a layer that is not finite in it.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is unknown: use one of {', '.join(DTYPES)}.")
    out = {}
    for name, layer in layers.items():
        parts = {
            key: None if value is None else value.to(DTYPES[dtype])
            for key, value in (("down", layer.down), ("up", layer.up), ("magnitude", layer.magnitude))
        }
        if not all(value is None or bool(value.isfinite().all()) for value in parts.values()):
            raise ConfigError(
                f"the adapter's weights of {name} are not finite in {dtype}: export dtype=fp32, or retrain."
            )
        out[name] = replace(layer, **parts)  # type: ignore[arg-type]
    return out


def resize(layers: Mapping[str, LoraWeights], rank: int) -> tuple[dict[str, LoraWeights], float]:
    """The best approximation of each layer at ``rank`` (Eckart & Young 1936), and the share of energy kept.

    The energy is the sum of squares over all layers of the change of the weights. The product is at most of
    the old rank, so its SVD is that of a small core between two QR factors. Layers of lower rank stay as they
    are. The scale is worked into the factors (alpha = rank). Raises ConfigError for a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"resize_rank={rank} is below 1: give at least 1.")
    out: dict[str, LoraWeights] = {}
    kept = total = 0.0
    for name, layer in layers.items():
        up, down = layer.up.double().flatten(1) * layer.scale, layer.down.double().flatten(1)
        up_q, up_r = torch.linalg.qr(up)
        down_q, down_r = torch.linalg.qr(down.T)
        u, s, vh = torch.linalg.svd(up_r @ down_r.T)
        total += float(s.square().sum())
        kept += float(s[:rank].square().sum())
        if layer.rank <= rank:
            out[name] = layer
            continue
        root = s[:rank].sqrt()
        new_up, new_down = up_q @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ down_q.T
        out[name] = LoraWeights(
            down=new_down.to(layer.down.dtype).reshape(rank, *layer.down.shape[1:]).contiguous(),
            up=new_up.to(layer.up.dtype).reshape(layer.up.shape[0], rank, *layer.up.shape[2:]).contiguous(),
            alpha=float(rank),
            magnitude=layer.magnitude,
        )
    return out, 1.0 if total == 0 else kept / total


def check_finite(layers: Mapping[str, LoraWeights], where: str) -> None:
    """Raises ConfigError that names the first layer with a NaN or an infinity."""
    for name, layer in layers.items():
        parts = (layer.down, layer.up, layer.magnitude)
        if not all(part is None or bool(part.isfinite().all()) for part in parts):
            raise ConfigError(
                f"{where} holds weights of {name} that are not finite: it is damaged, or training diverged."
            )
