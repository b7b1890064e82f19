"""How far the pictures that a training draws on its way are from real ones: the evaluation's distances, as a curve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lora_dae.evaluation.metrics.distances import frechet_from_features, kernel_distance
from lora_dae.evaluation.metrics.features import load_features, stack_images
from lora_dae.training import together


class PhotoDistance:
    """Frechet and kernel distance of drawn pictures to validation photos; the processes share the pictures.

    Features of all ranks are put together before anything is computed of them, so any number of processes gives the
    numbers of one. A training makes this before its processes have met: each then looks at all photos. On few pictures
    a Frechet distance lies far too high: its course counts, at one number of pictures.
    """

    def __init__(self, photos: Sequence[np.ndarray], features: str, device: torch.device, paired: bool) -> None:
        """``photos`` uint8 (H, W, 3); ``features`` names the network (``evaluation.features``).

        ``paired``: picture i is drawn from the source of photo i. Raises ConfigError when the network cannot be had.
        """
        with torch.random.fork_rng(devices=[]):  # a network draws weights before it loads them: not out of training's
            self.extractor = load_features(features, device)
        self.count, self.paired, self.device = len(photos), paired, device
        self.real = self._features([photos[k] for k in together.share(self.count)])

    def __call__(self, own: Sequence[np.ndarray]) -> dict[str, float]:
        """``own``: this rank's ``together.share`` of the pictures, uint8 (H, W, 3). Metric -> value, on every rank."""
        drawn, names = self._features(own), self.extractor.names
        return {
            names["fd"]: frechet_from_features(drawn, self.real),
            names["kd"]: kernel_distance(drawn, self.real, self.paired),
        }

    def _features(self, own: Sequence[np.ndarray]) -> torch.Tensor:
        pooled = self.extractor.extract(stack_images([picture]) for picture in own).pooled  # sizes may differ
        return together.collect(pooled.to(self.device), self.count).cpu()
