"""Distances between two sets of images in a feature space, with bootstrap replicates.

Features are extracted once and kept; every number here is a pure float64 function of them. The
replicates re-weight the images (a bootstrap sample is a vector of counts), so that 1000 replicates of a
Frechet distance between 256 images need no further feature, only small singular value problems: the trace
of the square root of the covariances' product is the nuclear norm of the centered N x M Gram matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_dae.config import ConfigError

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared Frechet distance of two Gaussians: |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

    Means (d,), covariances (d, d); computed in float64. The trace of the root is the sum of the roots
    of the eigenvalues of C1^(1/2) C2 C1^(1/2) (symmetric, so real and stable also for singular covariances).
    Source: Dowson and Landau 1982; Heusel et al. 2017 (FID), section 3.
    """
    mu1, cov1, mu2, cov2 = (t.double() for t in (mu1, cov1, mu2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(distance.item(), 0.0)


@dataclass(frozen=True)
class Gram:
    """Inner products of two feature sets x (N, d) and y (M, d): all that the distances need. float64."""

    xx: Tensor
    yy: Tensor
    xy: Tensor
    dim: int


def gram(x: Tensor, y: Tensor) -> Gram:
    """Inner products of features x (N, d) and y (M, d). Raises ConfigError below two images a set."""
    if len(x) < 2 or len(y) < 2:
        raise ConfigError(f"a distance needs at least 2 images in each set, got {len(x)} and {len(y)}.")
    x, y = x.double(), y.double()
    return Gram(x @ x.T, y @ y.T, x @ y.T, x.shape[1])


def frechet_from_features(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to features x (N, d) and y (M, d).

    Covariances are the unbiased ones (N - 1). With fewer images than dimensions in both the Gram matrix is
    used instead of d x d covariances: the same number, faster. Depends on N and M (bias about c / N): compare
    only at equal sizes.
    """
    if max(len(x), len(y)) >= x.shape[1]:  # inner products would be the larger problem
        x, y = x.double(), y.double()
        return frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    return frechet_replicates(gram(x, y), torch.ones(1, len(x)), torch.ones(1, len(y)))[0].item()


def frechet_replicates(inner: Gram, weights_x: Tensor, weights_y: Tensor) -> Tensor:
    """Squared Frechet distance for each of R re-weightings of the images.

    ``weights_x`` (R, N) and ``weights_y`` (R, M): how often each image is in the sample, >= 0. Returns (R,)
    float64. About 2 ms a replicate at N = M = 256, growing with the third power of min(N, M).
    """
    return torch.stack([_weighted_frechet(inner, wx, wy) for wx, wy in zip(weights_x, weights_y, strict=True)])


def _weighted_frechet(inner: Gram, wx: Tensor, wy: Tensor) -> Tensor:
    # Images that the sample left out carry no weight: dropping them makes the problem about 4x cheaper.
    keep_x, keep_y = wx > 0, wy > 0
    wx, wy = wx[keep_x].double(), wy[keep_y].double()
    xx, yy = inner.xx[keep_x][:, keep_x], inner.yy[keep_y][:, keep_y]
    xy = inner.xy[keep_x][:, keep_y]
    n, m = wx.sum(), wy.sum()
    u, v = wx / n, wy / m
    mean_xx, mean_yy, mean_xy = u @ xx @ u, v @ yy @ v, u @ xy @ v
    trace_x = (n / (n - 1)) * (u @ xx.diagonal() - mean_xx)
    trace_y = (m / (m - 1)) * (v @ yy.diagonal() - mean_yy)
    centered = xy - (u @ xy)[None, :] - (xy @ v)[:, None] + mean_xy
    scaled = (wx / (n - 1)).sqrt()[:, None] * centered * (wy / (m - 1)).sqrt()[None, :]
    cross = torch.linalg.svdvals(scaled).sum()
    return (mean_xx + mean_yy - 2 * mean_xy + trace_x + trace_y - 2 * cross).clamp(min=0)


def kernel_distance(x: Tensor, y: Tensor, paired: bool = False) -> float:
    """Unbiased squared MMD of features x (N, d), y (M, d) with the kernel (x . y / d + 1)^3.

    ``paired``: image i of x shows what image i of y shows, so the two are no independent draw and are not
    compared with each other (Gretton et al. 2012, lemma 6). All images at once instead of random subsets: no
    seed, least variance; may be slightly negative, as an unbiased estimate of zero must. Source: Binkowski et
    al. 2018 (KID), equation 4.
    """
    return kernel_replicates(gram(x, y), torch.ones(1, len(x)), torch.ones(1, len(y)), paired)[0].item()


def kernel_replicates(inner: Gram, weights_x: Tensor, weights_y: Tensor, paired: bool = False) -> Tensor:
    """Unbiased squared MMD for each of R re-weightings (R, N), (R, M) of the images; returns (R,) float64.

    Pairs of an image with itself are left out, also where a bootstrap sample holds the image twice: they
    would bias each replicate upward.
    """
    weights_x, weights_y = weights_x.double(), weights_y.double()
    k_xx, k_yy, k_xy = ((k / inner.dim + 1) ** 3 for k in (inner.xx, inner.yy, inner.xy))

    def mean(kernel: Tensor, wx: Tensor, wy: Tensor, skip_diagonal: bool) -> Tensor:
        total, pairs = ((wx @ kernel) * wy).sum(1), wx.sum(1) * wy.sum(1)
        if skip_diagonal:
            total = total - (wx * wy) @ kernel.diagonal()
            pairs = pairs - (wx * wy).sum(1)
        return total / pairs

    within = mean(k_xx, weights_x, weights_x, True) + mean(k_yy, weights_y, weights_y, True)
    return within - 2 * mean(k_xy, weights_x, weights_y, paired)


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """KID's kernel (x . y / d + 1)^3 of features (N, d), (M, d): (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """CMMD's kernel exp(-|x - y|^2 / 200) of features (N, d), (M, d): (N, M)."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * x @ y.T
    return (-squares / (2 * CMMD_SIGMA**2)).exp()


def cmmd_distance(x: Tensor, y: Tensor) -> float:
    """CMMD of unit-length CLIP embeddings x (N, d), y (M, d): 1000 times the squared MMD with a Gaussian of sigma 10.

    The minimum-variance (biased) estimate, as published: pairs of an image with itself count. Source: Jayasumana et
    al. 2024, equations 5 and 6.
    """
    return cmmd_replicates(gram(x, y), torch.ones(1, len(x)), torch.ones(1, len(y)))[0].item()


def cmmd_replicates(inner: Gram, weights_x: Tensor, weights_y: Tensor) -> Tensor:
    """CMMD for each of R re-weightings (R, N), (R, M) of the images; returns (R,) float64."""
    u = weights_x.double() / weights_x.double().sum(1, keepdim=True)
    v = weights_y.double() / weights_y.double().sum(1, keepdim=True)
    xx, yy = inner.xx.diagonal(), inner.yy.diagonal()

    def kernel(products: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (-(a[:, None] + b[None, :] - 2 * products) / (2 * CMMD_SIGMA**2)).exp()

    within = ((u @ kernel(inner.xx, xx, xx)) * u).sum(1) + ((v @ kernel(inner.yy, yy, yy)) * v).sum(1)
    return CMMD_SCALE * (within - 2 * ((u @ kernel(inner.xy, xx, yy)) * v).sum(1))


def inception_splits(n: int) -> int:
    """Splits of the Inception score of n images: 10 as in the literature, fewer below 10 images a split."""
    return max(1, min(10, n // 10))


def inception_score(probs: Tensor, splits: int = 10, seed: int = 0) -> float:
    """exp of the mean KL divergence of class probabilities (N, classes) from their mean; mean over splits.

    Images are shuffled by ``seed`` and cut by ``torch.chunk``, as torchmetrics does. Biased down when a split
    holds few images; on photos of one kind (clothed people) it is a diagnostic, no more. Source: Salimans
    et al. 2016, section 4. Raises ConfigError with fewer images than splits.
    """
    return inception_score_replicates(probs, torch.ones(1, len(probs)), splits, seed)[0].item()


def inception_score_std(probs: Tensor, splits: int = 10, seed: int = 0) -> float:
    """Standard deviation of ``inception_score`` over its splits, N - 1 as torchmetrics has it; NaN for one split.

    What papers print behind the score. It is the spread of scores of N / splits images, no interval of the mean.
    """
    return _split_scores(probs, torch.ones(1, len(probs)), splits, seed)[:, 0].std().item() if splits > 1 else math.nan


def inception_score_replicates(probs: Tensor, weights: Tensor, splits: int, seed: int) -> Tensor:
    """Inception score for each of R re-weightings (R, N) of the images; returns (R,) float64."""
    return _split_scores(probs, weights, splits, seed).mean(0)


def _split_scores(probs: Tensor, weights: Tensor, splits: int, seed: int) -> Tensor:
    """The score of every split, (splits, R)."""
    if len(probs) < splits:
        raise ConfigError(f"an Inception score of {splits} splits needs as many images, got {len(probs)}.")
    probs, weights = probs.double(), weights.double()
    order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(seed))
    negative_entropy = torch.xlogy(probs, probs).sum(1)
    scores = []
    for part in order.chunk(splits):
        share = weights[:, part]
        share = share / share.sum(1, keepdim=True).clamp(min=1)
        marginal = share @ probs[part]
        scores.append((share @ negative_entropy[part] - torch.xlogy(marginal, marginal).sum(1)).exp())
    return torch.stack(scores)
