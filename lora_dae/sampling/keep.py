"""Real photos of which only a part is drawn: the rest of their latents is put back after every reverse step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_dae.backbone.load import Backbone
from lora_dae.diffusion import add_noise

WIDER = 64  # a mask grows by this part of the height, so that no rim of the old garment stays to be continued


@dataclass(frozen=True)
class Kept:
    """``latents`` of real photos, clean, float32 (N, C, h, w), and where they are ``drawn`` anew, bool (N, 1, h, w).

    Blended latent diffusion (Avrahami et al. 2022, arXiv 2206.02779, algorithm 1): what is not drawn is, at every noise
    level, the photo's own. The noise is the one that the image's chain starts from, as diffusers inpaints.
    """

    latents: Tensor
    drawn: Tensor

    @classmethod
    def of_photos(cls, backbone: Backbone, photos: np.ndarray, masks: Tensor) -> Kept:
        """``photos`` uint8 (N, H, W, 3), ``masks`` uint8 (N, H, W), bright where the photo is drawn anew.

        The masks grow a little, and a latent that they touch is drawn.
        """
        inside = (masks > 127).float()[:, None]
        reach = max(1, round(inside.shape[2] / WIDER))
        wider = F.max_pool2d(inside, 2 * reach + 1, stride=1, padding=reach)
        drawn = F.max_pool2d(wider, backbone.vae_scale_factor) > 0
        latents = backbone.encode_images(photos)[0]
        return cls(latents, drawn.to(latents.device))

    def __getitem__(self, some: slice) -> Kept:
        return Kept(self.latents[some], self.drawn[some])

    def at(self, reached: Tensor, noise: Tensor, level: tuple[float, float] | None) -> Tensor:
        """What a step ``reached`` at (alpha, sigma) ``level``, the photo put back; None: at the end, without noise."""
        photo = self.latents if level is None else add_noise(self.latents, noise, *level)
        return torch.where(self.drawn, reached, photo.to(reached.dtype))

    def finished(self, pictures: np.ndarray, decoded: np.ndarray) -> np.ndarray:
        """What was done to ``decoded`` images afterwards, where they are drawn; uint8 (N, H, W, 3) in and out."""
        factor = pictures.shape[1] // self.drawn.shape[2]
        drawn = self.drawn[:, 0].cpu().numpy().repeat(factor, 1).repeat(factor, 2)
        return np.where(drawn[..., None], pictures, decoded)
