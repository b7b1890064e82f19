"""How the module learns whether a source photo shows what its caption says: right pairs against swapped ones.

After all stages, on the process that exports: seconds where everything is encoded already. Validation pairs say how
well it tells them apart, and set where it begins to doubt: nearly all right pairs are trusted, whatever that lets
through.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lora_dae.enhancement.agreement import Agreement, facts, words

MOST, LEAST = 2560, 16  # training pairs that are looked at, a fifth as many of validation; less is not judged
MOST_LIVE = 512  # where nothing is encoded already
BATCH, LEARNING_RATE = 64, 6e-3  # down to 0 by a cosine: at a constant rate more swapped pairs pass
FEWEST_STEPS, MOST_STEPS = 500, 2000  # 5 for 3 pairs between them: few pairs are learned by heart in more
TRUSTED = 0.02  # share of right pairs that may be doubted
AT_THRESHOLD = 2.2  # logit of a trust of .9
TELLS = 0.7  # share of comparisons (right against swapped) below which it is left out


@dataclass(frozen=True)
class Agreed:
    """agreement: None where it is left out; told: share of comparisons in which a right pair has more trust than a
    swapped one (area under the curve); doubted: share of swapped pairs with a trust below one half."""

    agreement: Agreement | None
    told: float
    doubted: float
    lacking: str = ""  # why it cannot be judged

    def __str__(self) -> str:
        if self.lacking:
            return f"the sources are trusted whatever the captions say: {self.lacking}"
        left = "" if self.agreement is not None else ", so the sources are trusted always"
        return (
            f"captions and source photos: right and swapped validation pairs told apart in {self.told:.0%} of "
            f"comparisons, {self.doubted:.0%} of the swapped doubted{left}"
        )


@dataclass(frozen=True)
class Pairs:
    """What captions say (N, D) and what photos show (N, F)."""

    words: Tensor
    facts: Tensor
    nothing: Tensor  # what the empty caption says, (1, D)

    @classmethod
    def of(cls, batches: Iterable[tuple[dict[str, Tensor], Tensor]], tokens: int) -> Pairs:
        """Of batches with ``text`` (B, L, D) and ``source`` (B, C, h, w), each with the empty caption's (L, D)."""
        seen = [
            (words(batch["text"], tokens).cpu(), facts(batch["source"]).cpu(), words(null[None], tokens).cpu())
            for batch, null in batches
        ]
        said, shown, nothing = zip(*seen, strict=True)
        return cls(torch.cat(said), torch.cat(shown), nothing[0])

    def __len__(self) -> int:
        return len(self.words)

    @property
    def apart(self) -> Tensor:
        """(N, N) bool: pairs whose captions differ and whose photos do; the others would be right ones."""
        return _differ(self.words) & _differ(self.facts)


def learn_agreement(train: Pairs, val: Pairs, channels: int, tokens: int, seed: int) -> Agreed:
    """An ``Agreement`` of captions of ``tokens`` with latents of ``channels``, on right and swapped ``train`` pairs.

    Judged on ``val``. The empty caption goes with every photo. Draws from a generator of its own.
    """
    if not bool(val.apart.any()):
        return Agreed(None, math.nan, math.nan, "all validation pairs have one caption, or one photo")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        agreement = Agreement(train.words.shape[1], channels, tokens)
        fit(agreement, train)
    with torch.no_grad():
        logits, apart = agreement.logits(val.words, val.facts), val.apart
        right, swapped = logits.diagonal(), logits[apart]
        doubt = right.kthvalue(max(1, round(TRUSTED * len(right)))).values
        agreement.bias.add_(AT_THRESHOLD - doubt)
        below = torch.searchsorted(
            swapped.sort().values, right.contiguous()
        )  # swapped ones with less trust than each right one
        told = float(below.double().mean()) / len(swapped)
        doubted = float((swapped < doubt - AT_THRESHOLD).float().mean())
    return Agreed(agreement.requires_grad_(False) if told >= TELLS else None, told, doubted)


def fit(agreement: Agreement, train: Pairs) -> None:
    """Yes to right pairs and to the empty caption, no to swapped ones; inputs are standardized meanwhile."""
    (said, shown), scales = zip(*map(_standardized, (train.words, train.facts)), strict=True)
    (mean, spread), _ = scales
    nothing = (train.nothing - mean) / spread
    steps = min(max(5 * len(train) // 3, FEWEST_STEPS), MOST_STEPS)
    optimizer = torch.optim.AdamW(agreement.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randperm(len(train))[:BATCH]
        batch = Pairs(train.words[some], train.facts[some], train.nothing)
        logits = agreement.logits(said[some], shown[some])
        loss = functional.softplus(-logits.diagonal()).mean()
        apart = batch.apart
        if bool(apart.any()):
            loss = loss + functional.softplus(logits[apart]).mean()
        loss = loss + 0.2 * functional.softplus(-agreement.logits(nothing, shown[some])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for layer, (mean, spread) in zip((agreement.text, agreement.input), scales, strict=True):
        with torch.no_grad():  # the layers take what is not standardized from now on
            layer.bias.sub_(layer.weight @ (mean / spread))
            layer.weight.div_(spread)


def _differ(x: Tensor) -> Tensor:
    # By matrix products, cdist's default, a vector is far from itself where it is long.
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") > 1e-4


def _standardized(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    mean, spread = x.mean(0), x.std(0).clamp_min(1e-4)
    return (x - mean) / spread, (mean, spread)
