"""Perceptual distances to a known image: LPIPS (AlexNet), DISTS, MS-SSIM. Per image, for the paired mode only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from lora_dae.config import ConfigError

Distance = Callable[[Tensor, Tensor], Tensor]  # two float NCHW batches in [0, 1] -> (N,)
MS_SSIM_SIDE = 176  # pixels: below, torchmetrics has no fifth scale larger than its 11-pixel window
BATCH = 16
SHIFT = (-0.030, -0.088, -0.188)  # LPIPS's own normalization, of images in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
TAPS = (1, 4, 7, 9, 11)  # the five ReLUs of AlexNet's feature part
CHANNELS = (64, 192, 384, 256, 256)


def ms_ssim(images: Tensor, target: Tensor) -> Tensor:
    """Multi-scale structural similarity per image, (N,): torchmetrics, gaussian window of sigma 1.5, five scales.

    Float NCHW in [0, 1], data range 1. Raises ConfigError below 176 pixels, where five scales do not exist. Source:
    Wang, Simoncelli and Bovik 2003.
    """
    if min(images.shape[-2:]) < MS_SSIM_SIDE:
        raise ConfigError(f"MS-SSIM needs images of at least {MS_SSIM_SIDE} pixels, got {tuple(images.shape[-2:])}.")
    values = [
        multiscale_structural_similarity_index_measure(a, b, sigma=1.5, data_range=1.0, reduction="none")
        for a, b in zip(images.split(BATCH), target.split(BATCH), strict=True)
    ]
    return torch.cat(values)


def composed(distance: Distance, images: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """A distance of whole pictures, of ``images`` pasted into ``target`` inside ``masks`` (N, H, W) of 0 and 1; (N,).

    For what has no map to average over a garment: MS-SSIM multiplies means over scales, DISTS compares statistics of
    the whole picture. As pasted results of virtual try-on are measured: the more background, the better the value, so
    compare on the same masks only. NaN for an empty mask, where the picture would be the target itself.
    """
    inside = masks[:, None].to(images.dtype)
    values = distance(images * inside + target * (1 - inside), target)
    return torch.where(masks.flatten(1).sum(1).to(values.device) > 0, values, torch.nan)


class Lpips(nn.Module):
    """LPIPS version 0.1 on AlexNet: mean over places of weighted squared differences of unit-length features.

    ``weights``: safetensors with torchvision's ``features.0.weight`` and so on; the linear heads are those that
    torchmetrics ships. ``forward``: float NCHW in [0, 1], at least 32 pixels, -> (N,), 0 for equal images. Source:
    Zhang et al. 2018, equation 1. Raises ConfigError for a file of another kind.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
        )  # fmt: skip
        if not weights.is_file():
            raise ConfigError(f"evaluation.lpips={weights} does not exist: give AlexNet's features as safetensors.")
        try:
            self.load_state_dict(load_file(weights))
        except Exception as error:  # safetensors and torch have an error class each for a file that does not fit
            raise ConfigError(
                f"evaluation.lpips={weights} does not hold torchvision's AlexNet features "
                "(features.0.weight to features.10.bias): give a file that does."
            ) from error
        path = Path(inspect.getfile(torchmetrics_lpips)).parent / "lpips_models" / "alex.pth"
        heads = torch.load(path, map_location="cpu", weights_only=True)
        for k in range(len(TAPS)):
            self.register_buffer(f"head{k}", heads[f"lin{k}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        pieces = zip(images.split(BATCH), target.split(BATCH), strict=True)
        return torch.cat([_over_places(self._maps(a, b)) for a, b in pieces])

    @torch.inference_mode()
    def with_inside(self, images: Tensor, target: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """``forward``, and the mean over the pixels of ``masks`` (N, H, W) of LPIPS's spatial map; (N,) both.

        The map is upstream's (``spatial=True``): that of each layer enlarged bilinearly to the picture, then added. A
        garment's value so does not depend on its size, as that of a picture pasted together would; features near its
        border see what lies beside it. NaN for an empty mask.
        """
        wholes, means = [], []
        pieces = zip(images.split(BATCH), target.split(BATCH), masks.split(BATCH), strict=True)
        for a, b, mask in pieces:
            layers = self._maps(a, b)
            maps = torch.zeros(len(a), *mask.shape[1:])
            for one in layers:
                maps += nn.functional.interpolate(one, mask.shape[1:], mode="bilinear", align_corners=False)[:, 0].cpu()
            inside = mask.cpu().float()
            means.append((maps * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)))  # 0 / 0 = NaN
            wholes.append(_over_places(layers))
        return torch.cat(wholes), torch.cat(means)

    def _maps(self, a: Tensor, b: Tensor) -> list[Tensor]:
        """The distance at each place of each layer, (N, 1, h, w)."""
        layers = enumerate(zip(self._taps(a), self._taps(b), strict=True))
        return [nn.functional.conv2d((x - y).square(), self.get_buffer(f"head{k}")) for k, (x, y) in layers]

    def _taps(self, images: Tensor) -> list[Tensor]:
        x = (2 * images.to(self.get_buffer("shift").device) - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        taps = []
        for k, layer in enumerate(self.features):
            x = layer(x)
            if k in TAPS:
                taps.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return taps


def _over_places(layers: list[Tensor]) -> Tensor:
    """Maps (N, 1, h, w) averaged each and added, (N,)."""
    total = torch.zeros(len(layers[0]))
    for weighted in layers:
        total = total + weighted.mean(dim=(1, 2, 3)).cpu()
    return total


def load_dists(device: str | torch.device = "cpu") -> Distance:
    """DISTS (Ding et al. 2020) of torchmetrics, computed on ``device``.

    Raises ConfigError when torchvision or its VGG16 cannot be had.
    """
    from torchmetrics.functional.image.dists import DISTSNetwork

    try:
        network = DISTSNetwork(load_weights=True).eval().requires_grad_(False).to(device)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ConfigError(f"DISTS needs torchvision and its VGG16 weights ({reason}).") from error

    def dists(images: Tensor, target: Tensor) -> Tensor:
        with torch.inference_mode():
            pieces = zip(images.split(BATCH), target.split(BATCH), strict=True)
            return torch.cat([network(a.to(device), b.to(device)).flatten().cpu() for a, b in pieces])

    return dists
