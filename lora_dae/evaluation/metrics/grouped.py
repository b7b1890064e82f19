"""Distances between large sets of images, with intervals from leaving out one of 20 groups at a time.

A bootstrap of a Frechet distance solves a problem per sample; with thousands of images the delete-a-group jackknife
(Kott 2001) needs 20 instead of 1000. Memory does not grow with N squared: kernels are summed block by block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_dae.evaluation.metrics.distances import frechet_distance

GROUPS = 20
LARGE = 512  # images in the smaller set: from here on groups are left out instead of a bootstrap
HUGE = 8192  # images in the larger one, with at least two groups' worth in the other
BLOCK = 2048


def is_large(n: int, m: int) -> bool:
    """Whether sets of n and m images are measured so: a bootstrap's inner products would not fit, or take too long."""
    return min(n, m) >= LARGE or (max(n, m) > HUGE and min(n, m) >= 2 * GROUPS)


def groups_of(n: int, seed: int) -> Tensor:
    """Group 0 to 19 of each of ``n`` images, (n,) int64; equal sizes to within one, the same for equal (n, seed)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    groups = torch.empty(n, dtype=torch.int64)
    groups[order] = torch.arange(n) % GROUPS
    return groups


def as_replicates(value: float, left_out: Tensor) -> Tensor:
    """Values with a group left out (20,) as replicates whose standard deviation is the jackknife's standard error.

    SE^2 = (G - 1) / G * sum (v_g - mean v)^2; spread so, they serve wherever bootstrap replicates do, and those of two
    methods on the same prompts belong together.
    """
    return value + (left_out - left_out.mean()) * ((GROUPS - 1) / math.sqrt(GROUPS))


def grouped_frechet(x: Tensor, y: Tensor, groups_x: Tensor, groups_y: Tensor) -> Tensor:
    """Squared Frechet distance of features x (N, d), y (M, d) without group g of both, (20,) float64."""
    center = y.double().mean(0)  # a common shift changes no distance and keeps float64's digits for what differs
    sums_x, sums_y = _moments(x.double() - center, groups_x), _moments(y.double() - center, groups_y)
    return torch.tensor([frechet_distance(*_without(sums_x, g), *_without(sums_y, g)) for g in range(GROUPS)])


def _moments(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (G,), sums (G, d) and sums of products (G, d, d) of each group."""
    parts = [x[groups == g] for g in range(GROUPS)]
    counts = torch.tensor([float(len(p)) for p in parts], dtype=torch.float64)
    return counts, torch.stack([p.sum(0) for p in parts]), torch.stack([p.T @ p for p in parts])


def _without(moments: tuple[Tensor, Tensor, Tensor], g: int) -> tuple[Tensor, Tensor]:
    counts, sums, products = moments
    n = counts.sum() - counts[g]
    total = sums.sum(0) - sums[g]
    mean = total / n
    return mean, (products.sum(0) - products[g] - n * torch.outer(mean, mean)) / (n - 1)


def grouped_mmd(
    x: Tensor,
    y: Tensor,
    groups_x: Tensor,
    groups_y: Tensor,
    kernel: Callable[[Tensor, Tensor], Tensor],
    skip_same: bool,
    paired: bool = False,
) -> tuple[float, Tensor]:
    """Squared MMD of features x (N, d), y (M, d), and without group g of both, (20,) float64.

    ``kernel`` maps (a, d), (b, d) to (a, b). ``skip_same`` leaves out pairs of an image with itself (the unbiased
    estimate), ``paired`` also image i of x with image i of y.
    """
    xx = _block_sums(x, x, groups_x, groups_x, kernel, skip_same)
    yy = _block_sums(y, y, groups_y, groups_y, kernel, skip_same)
    xy = _block_sums(x, y, groups_x, groups_y, kernel, paired)

    def value(g: int | None) -> float:
        return (_mean(xx, g) + _mean(yy, g) - 2 * _mean(xy, g)).item()

    return value(None), torch.tensor([value(g) for g in range(GROUPS)], dtype=torch.float64)


def _block_sums(
    x: Tensor,
    y: Tensor,
    groups_x: Tensor,
    groups_y: Tensor,
    kernel: Callable[[Tensor, Tensor], Tensor],
    skip_same: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of the kernel and numbers of pairs for each pair of groups, (G, G) each."""
    one_x = torch.nn.functional.one_hot(groups_x, GROUPS).double()
    one_y = torch.nn.functional.one_hot(groups_y, GROUPS).double()
    sums = torch.zeros(GROUPS, GROUPS, dtype=torch.float64)
    for start in range(0, len(x), BLOCK):
        rows = slice(start, start + BLOCK)
        values = kernel(x[rows].double(), y.double())
        if skip_same:
            index = torch.arange(len(values))
            values[index, index + start] = 0
        sums += one_x[rows].T @ values @ one_y
    pairs = torch.outer(one_x.sum(0), one_y.sum(0))
    if skip_same:
        pairs = pairs - torch.diag(one_x.sum(0))
    return sums, pairs


def _mean(sums_and_pairs: tuple[Tensor, Tensor], g: int | None) -> Tensor:
    keep = torch.arange(GROUPS) != (-1 if g is None else g)
    sums, pairs = (t[keep][:, keep].sum() for t in sums_and_pairs)
    return sums / pairs
