"""The cheap control on finished pictures: whoever claims texture has to beat it."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from lora_dae.sampling.method import Method


class UnsharpMask(Method):
    """Pillow's unsharp mask: pixel + ``amount`` * (pixel - blurred), with a Gaussian of ``radius`` pixels."""

    def __init__(self, amount: float, radius: float) -> None:
        self.filter = ImageFilter.UnsharpMask(radius, round(100 * amount), 0)

    def picture(self, images: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(image).filter(self.filter)) for image in images])
