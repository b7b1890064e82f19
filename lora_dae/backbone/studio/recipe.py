"""What the recipe's steps share: pictures, optimizer, wall-clock schedules, EMA, resumable state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_dae.config import DataConfig
from lora_dae.data.sources import load_photos
from lora_dae.data.studio.dataset import StudioDataset

RESOLUTION = 128
BASE_TRAIN, BASE_VAL, TARGET_TRAIN, TARGET_VAL = 24_000, 512, 4_000, 512
console = Console()


def base_data(cache: Path) -> tuple[StudioDataset, StudioDataset]:
    """BASE photos to train the backbone on, and to validate it with."""
    return StudioDataset(cache, "base", "train", BASE_TRAIN), StudioDataset(cache, "base", "val", BASE_VAL)


def target_data(cache: Path) -> tuple[StudioDataset, StudioDataset]:
    """TARGET pairs: for the autoencoder and the attribute classifier only, never for the denoiser."""
    return StudioDataset(cache, "target", "train", TARGET_TRAIN), StudioDataset(cache, "target", "val", TARGET_VAL)


def photos(root: Path | None) -> tuple[np.ndarray, list[str]]:
    """Real photos, uint8 (N, 128, 128, 3), and their captions; none without ``root``."""
    if root is None:
        return np.empty((0, RESOLUTION, RESOLUTION, 3), np.uint8), []
    splits = load_photos(DataConfig(name="folder", root=str(root), resolution=RESOLUTION))
    pairs = [splits["train"][i] for i in range(len(splits["train"]))]
    return np.stack([p.image for p in pairs]), [p.caption for p in pairs]


class Schedule:
    """Warm-up and cosine over wall-clock minutes: a recipe promises hours, not steps."""

    def __init__(self, minutes: float, warmup: int = 200, floor: float = 0.02):
        self.seconds, self.warmup, self.floor = 60 * minutes, warmup, floor
        self.spent, self.step, self._last = 0.0, 0, time.monotonic()

    def tick(self) -> float:
        """Count one step; return its share of the peak learning rate. A pause (a stopped process) is not counted."""
        now = time.monotonic()
        self.spent += min(now - self._last, 5.0)
        self._last = now
        self.step += 1
        done = min(self.spent / self.seconds, 1.0)
        cosine = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
        return min(self.step / self.warmup, 1.0) * cosine

    @property
    def finished(self) -> bool:
        return self.spent >= self.seconds


class Optimizer:
    """Muon for matrices and convolution kernels, AdamW for biases, norms and embeddings.

    Muon (orthogonalized momentum, 2502.16982) is torch's own and knows matrices only, so it is handed each
    kernel as an (out, in x height x width) matrix on the same memory. Measured on the autoencoder's decoder, 3
    minutes each from the same start: 28.8 dB with AdamW, 31.7 dB with Muon (at its better rate 32.4).
    """

    def __init__(self, named: dict[str, nn.Parameter], muon_lr: float, adam_lr: float, weight_decay: float):
        self.named = named
        self.matrices = {
            k: nn.Parameter(_matrix(p, p)) for k, p in named.items() if p.ndim in (2, 4) and "embedding" not in k
        }
        rest = [p for k, p in named.items() if k not in self.matrices]
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        self.muon = torch.optim.Muon(
            self.matrices.values(), lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.peaks = [(self.muon, muon_lr), (self.adam, adam_lr)]

    def step(self, share: float, clip: float) -> None:
        """Update all parameters at ``share`` of the peak learning rates, and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.named.values(), clip)
        for k, matrix in self.matrices.items():
            matrix.grad = _matrix(self.named[k].grad, self.named[k])  # type: ignore[arg-type]
        for optimizer, peak in self.peaks:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
        for p in (*self.named.values(), *self.matrices.values()):
            p.grad = None

    def _holders(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for k, p in self.named.items():
            yield k, (self.muon.state[self.matrices[k]] if k in self.matrices else self.adam.state[p])

    def state(self) -> dict[str, Tensor]:
        return {f"{key}.{k}": torch.as_tensor(v) for k, held in self._holders() for key, v in held.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        for k, held in self._holders():
            for key in ("momentum_buffer",) if k in self.matrices else ("step", "exp_avg", "exp_avg_sq"):
                held[key] = tensors[f"{key}.{k}"]


def _matrix(x: Tensor, like: Tensor) -> Tensor:
    """``x`` as one row per output; columns in the order in which ``like`` lies in memory."""
    x = x.detach()
    return x if x.ndim == 2 else (x if like.is_contiguous() else x.permute(0, 2, 3, 1)).flatten(1)


class Averaged:
    """EMA of all parameters of some modules, in float32."""

    def __init__(self, modules: dict[str, nn.Module], decay: float):
        self.live = {f"{m}.{k}": p for m, mod in modules.items() for k, p in mod.named_parameters()}
        self.mean = {k: p.detach().clone() for k, p in self.live.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        means = list(self.mean.values())
        torch._foreach_lerp_(means, [p.detach() for p in self.live.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and the means."""
        for k, p in self.live.items():
            kept = p.detach().clone()
            p.copy_(self.mean[k])
            self.mean[k].copy_(kept)


def warm_start(averaged: Averaged, files: dict[str, Path]) -> bool:
    """Begin from shipped weights (module name -> safetensors) where all of them fit; says whether it did."""
    if not all(f.is_file() for f in files.values()):
        return False
    tensors = {f"{name}.{k}": v for name, f in files.items() for k, v in load_file(f).items()}
    if any(k not in tensors or tensors[k].shape != p.shape for k, p in averaged.live.items()):
        return False
    with torch.no_grad():
        for k, p in averaged.live.items():
            p.copy_(tensors[k])
            averaged.mean[k].copy_(tensors[k])
    console.print("beginning from the shipped weights")
    return True


def save_state(path: Path, averaged: Averaged, optimizer: Optimizer, schedule: Schedule) -> None:
    """Write everything that resuming needs as one safetensors file, atomically."""
    tensors: dict[str, Tensor] = {f"live.{k}": p.detach() for k, p in averaged.live.items()}
    tensors |= {f"mean.{k}": v for k, v in averaged.mean.items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.state().items()}
    tensors["clock"] = torch.tensor([schedule.spent, schedule.step], dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial)
    partial.rename(path)


def load_state(path: Path, averaged: Averaged, optimizer: Optimizer, schedule: Schedule) -> None:
    """Go on where ``save_state`` stopped."""
    tensors = load_file(path)
    with torch.no_grad():
        for k, p in averaged.live.items():
            p.copy_(tensors[f"live.{k}"])
            averaged.mean[k].copy_(tensors[f"mean.{k}"])
    head = "optimizer."
    optimizer.load({k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)})
    schedule.spent, schedule.step = float(tensors["clock"][0]), int(tensors["clock"][1])
    console.print(f"going on after step {schedule.step}, {schedule.spent / 60:.1f} minutes")


def half(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {k: v.detach().half().contiguous() for k, v in tensors}
