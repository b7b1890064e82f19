"""Feature networks of published distances: clean-fid's Inception, DINOv2, CLIP. Their weights are downloaded or given.

None of them is needed: whatever cannot be loaded is a ConfigError, which the evaluation prints as "not available".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics.features import FeatureExtractor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class PooledFeatures(FeatureExtractor):
    """A network without class probabilities: ``features`` gives float32 (N, d)."""

    def features(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def features_and_probs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return features, features.new_empty(len(features), 0)


class CleanFid(PooledFeatures):
    """FID and KID as clean-fid makes them (mode "clean"): its resize (PIL bicubic, not quantized) and its weights.

    299 x 299, aspect ratio not kept, 2048 features. Source: Parmar, Zhang and Zhu 2022. Raises ConfigError when
    clean-fid or its Inception cannot be had.
    """

    name = "clean-fid"
    num_features = 2048
    names = {"fd": "fid", "kd": "kid"}

    def __init__(self, device: str | torch.device = "cpu") -> None:
        super().__init__()
        try:
            from cleanfid.features import build_feature_extractor
            from cleanfid.resize import build_resizer
        except ImportError as error:
            raise ConfigError(f"clean-fid cannot be imported ({error}): pip install 'lora-dae[fid]'.") from error
        try:
            self.network: Callable[[Tensor], Tensor] = build_feature_extractor("clean", device, use_dataparallel=False)
        except (OSError, RuntimeError) as error:  # no connection, or a file that is none
            raise ConfigError(f"the Inception weights of clean-fid cannot be had ({_reason(error)}).") from error
        self.resize: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
        self.register_buffer("where", torch.zeros(0, device=device))

    def features(self, images: Tensor) -> Tensor:
        with ThreadPoolExecutor() as pool:  # Pillow lets other threads run while it resizes
            resized = list(pool.map(self.resize, _as_uint8(images)))
        batch = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
        return self.network(batch.to(images.device)).float()


class DinoV2(PooledFeatures):
    """FD-DINOv2: the class token after the last norm, of 224 x 224 pixels (PIL bicubic on 8 bits, ImageNet's mean).

    ``model``: a folder or hub name of transformers; published numbers are those of facebook/dinov2-large. Source:
    Stein et al. 2023 (dgm-eval). Raises ConfigError when it cannot be loaded.
    """

    name = "dinov2"
    names = {"fd": "fd_dinov2"}
    side = 224

    def __init__(self, model: str) -> None:
        super().__init__()
        from transformers import Dinov2Model

        self.network: Any = _load(Dinov2Model, model, "evaluation.dinov2")
        self.num_features = int(self.network.config.hidden_size)

    def features(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        resized = [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in _as_uint8(images)]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device) / 255
        return self.network(pixel_values=_normalized(pixels, IMAGENET)).pooler_output


class ClipEmbeddings(PooledFeatures):
    """CMMD: unit-length CLIP image embeddings; the whole picture is resized (antialiased bicubic), nothing is cropped.

    ``model``: a folder or hub name of transformers; published numbers are those of openai/clip-vit-large-patch14-336 on
    center crops, which cut off heads and feet. Source: Jayasumana et al. 2024. Raises ConfigError when it cannot be
    loaded.
    """

    name = "clip"
    names = {"mmd": "cmmd"}

    def __init__(self, model: str) -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        self.network: Any = _load(CLIPVisionModelWithProjection, model, "evaluation.cmmd")
        self.num_features = int(self.network.config.projection_dim)

    def features(self, images: Tensor) -> Tensor:
        side = int(self.network.config.image_size)
        resized = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(self.network(pixel_values=_normalized(resized, CLIP)).image_embeds, dim=1)


def _load(kind: Any, model: str, option: str) -> Any:
    try:
        return kind.from_pretrained(model, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{option}={model} cannot be loaded ({_reason(error)}).") from error


def _normalized(images: Tensor, statistics: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    mean, std = (torch.tensor(s, device=images.device)[:, None, None] for s in statistics)
    return (images - mean) / std


def _as_uint8(images: Tensor) -> list[np.ndarray]:
    """NCHW in [0, 1] as HWC arrays."""
    return list((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
