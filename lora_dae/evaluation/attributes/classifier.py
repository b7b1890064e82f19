"""The attribute classifier: reads garment, color, pattern, ... off a picture, to check it against a caption.

A small convolutional network with one linear head per attribute, trained on rendered photos whose
attributes are known (``attributes_fit``). Shipped as safetensors with the class lists in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lora_dae.config import ConfigError
from lora_dae.evaluation.metrics.features import as_float_images

RESOLUTION = 128
EMBEDDED = Path(__file__).parent / "shipped" / "model.safetensors"
FORMAT = "lora-dae attribute classifier 1"
UNKNOWN = -1  # class index of an attribute that an image's label does not name


@dataclass(frozen=True)
class Prediction:
    """One attribute of N images: class index (N,) int64 and class probabilities (N, classes) float32."""

    indices: Tensor
    probs: Tensor


def _conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """x + conv(x), same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class AttributeClassifier(nn.Module):
    """Classifies NCHW float images in [0, 1] by several attributes at once.

    0.43 M parameters and 80 million multiply-adds an image at 128 x 128; other sizes are resized first
    (antialiased bilinear). ``attributes`` maps each attribute's name to its class names.
    """

    def __init__(self, attributes: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.attributes = {name: list(classes) for name, classes in attributes.items()}
        self.body = nn.Sequential(
            _conv(3, 32, kernel=5, stride=2),  # 64 x 64: 32 filters on 75 inputs keep two-pixel stripes apart
            _conv(32, 64, stride=2),  # 32 x 32
            _conv(64, 96, stride=2),  # 16 x 16
            Residual(96),
            _conv(96, 128, stride=2),  # 8 x 8
            Residual(128),
        )
        self.dropout = nn.Dropout(0.1)
        # The mean says what there is on the whole, the maximum what there is somewhere (a collar, a hem).
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(c)) for name, c in self.attributes.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Float NCHW in [0, 1] -> attribute name -> logits (N, classes)."""
        if images.shape[-2:] != (RESOLUTION, RESOLUTION):
            images = F.interpolate(images, size=(RESOLUTION, RESOLUTION), mode="bilinear", antialias=True)
        maps = self.body((images - 0.5) * 4)
        pooled = self.dropout(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.inference_mode()
    def predict(self, images: Tensor, batch_size: int = 64) -> dict[str, Prediction]:
        """Classes of uint8 or float [0, 1] NCHW images, on the CPU. The network must be in eval mode."""
        device = next(self.parameters()).device
        pieces = [self(as_float_images(piece).to(device)) for piece in images.split(batch_size)]
        result = {}
        for name in self.attributes:
            probs = torch.cat([piece[name] for piece in pieces]).float().softmax(dim=1).cpu()
            result[name] = Prediction(probs.argmax(dim=1), probs)
        return result

    def encode(self, labels: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Labels (attribute -> class name, one mapping an image) as class indices (N,), or UNKNOWN."""
        return {
            name: torch.tensor([classes.index(row[name]) if row.get(name) in classes else UNKNOWN for row in labels])
            for name, classes in self.attributes.items()
        }

    def correct(self, images: Tensor, labels: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Per attribute that any label names: (N,) float32, 1 right, 0 wrong, NaN without a known class."""
        predicted = self.predict(images)
        result = {}
        for name, truth in self.encode(labels).items():
            known = truth != UNKNOWN
            if known.any():
                right = (predicted[name].indices == truth).float()
                result[name] = torch.where(known, right, torch.nan)
        return result

    def accuracy(self, images: Tensor, labels: Sequence[Mapping[str, str]]) -> dict[str, float]:
        """Share of images whose attribute is read as labelled, per attribute."""
        return {name: right.nanmean().item() for name, right in self.correct(images, labels).items()}

    def save(self, path: Path, card: Mapping[str, str] | None = None) -> None:
        """Write weights (fp16) and class lists; ``card`` adds text to the metadata, e.g. an accuracy."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: (value.half() if value.is_floating_point() else value).contiguous()
            for key, value in self.state_dict().items()
        }
        save_file(tensors, path, {"format": FORMAT, "attributes": json.dumps(self.attributes), **(card or {})})


def load_classifier(path: Path) -> AttributeClassifier:
    """Read a classifier (fp32, eval mode); raises ConfigError when the file is missing or another kind."""
    if not path.is_file():
        raise ConfigError(f"there is no attribute classifier at {path}; run `make classifier` to train it.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ConfigError(f"{path} is not an attribute classifier of this program; give one that it saved.")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    classifier = AttributeClassifier(json.loads(metadata["attributes"]))
    classifier.load_state_dict(tensors)
    return classifier.eval().requires_grad_(False)


def load_embedded() -> AttributeClassifier:
    """The classifier that ships with the package, for the studio's attributes."""
    return load_classifier(EMBEDDED)
