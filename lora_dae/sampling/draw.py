"""Images for captions and source photos, by one set of trained parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lora_dae.adapter.fused import merged_once
from lora_dae.backbone.load import Backbone
from lora_dae.backbone.precision import half_type
from lora_dae.config import ConfigError, SamplingConfig
from lora_dae.enhancement.hook import enhance_scheduler
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.registration import RegisteredSource
from lora_dae.sampling.keep import Kept
from lora_dae.sampling.loop import Conditions, Guidance, initial_noise, noise_generator, sample_latents
from lora_dae.sampling.method import Method
from lora_dae.sampling.methods import build_method
from lora_dae.sampling.noised import Noised
from lora_dae.sampling.schedulers import build_scheduler

FRESH = 7_919  # apart from the seed of the noise that a chain starts from


@dataclass
class Drawer:
    """Draws images: the backbone (its UNet may hold LoRA and a source input) and the enhancement."""

    backbone: Backbone
    enhancement: EnhancementModule | None
    placement: str
    conditioning: str  # source | none
    resolution: int
    cfg: SamplingConfig
    bf16: bool = False

    def images(
        self,
        captions: Sequence[str],
        sources: np.ndarray | None = None,
        strength: float = 0.0,
        indices: Sequence[int] | None = None,
        on_batch: Callable[[int], None] | None = None,
        keep: Kept | None = None,
        start: Noised | None = None,
    ) -> np.ndarray:
        """uint8 (N, H, W, 3), one image per caption; ``sources`` uint8 (N, H, W, 3) steer them.

        A run with ``conditioning=source`` draws from captions alone as well: it was trained with source dropout.

        ``indices`` choose the noise of each image together with ``cfg.seed``, so the same index gives the
        same image at any batch size. ``on_batch`` is told how many images each batch finished.
        ``keep``: one real photo per caption, of which all but a part stays as the VAE gives it back; ``start``: one
        that is noised and drawn again.
        """
        if self.conditioning == "none" and sources is not None:
            raise ConfigError("this run was trained with conditioning=none: it takes captions alone.")
        indices = list(range(len(captions))) if indices is None else indices
        out = [np.zeros((0, self.resolution, self.resolution, 3), np.uint8)]
        with merged_once(self.backbone.unet):
            for k in range(0, len(captions), self.cfg.batch_size):
                at = slice(k, k + self.cfg.batch_size)
                some = None if sources is None else sources[at]
                kept = None if keep is None else keep[at]
                noised = None if start is None else start[at]
                latents, trust, placed = self._chain(
                    list(captions[at]), some, strength, list(indices[at]), kept, noised
                )
                shown = as_photos(some) if placed is None else placed.moved
                trust = trust if placed is None else placed.trusted(trust)
                decoded = self.backbone.decode(latents, self.cfg.tiled_decode)
                pictures = self._method().picture(_bytes(self._refined(decoded, shown, strength, trust)))
                out.append(pictures if kept is None else kept.finished(pictures, _bytes(decoded)))
                if on_batch is not None:
                    on_batch(len(latents))
        return np.concatenate(out)

    def latents(
        self,
        captions: list[str],
        sources: np.ndarray | None,
        strength: float,
        indices: list[int],
        kept: Kept | None = None,
        start: Noised | None = None,
    ) -> Tensor:
        """Clean latents, float32 (N, C, h, w), for one batch."""
        return self._chain(captions, sources, strength, indices, kept, start)[0]

    @torch.no_grad()
    def _chain(
        self,
        captions: list[str],
        sources: np.ndarray | None,
        strength: float,
        indices: list[int],
        kept: Kept | None,
        start: Noised | None,
    ) -> tuple[Tensor, Tensor | None, RegisteredSource | None]:
        """Clean latents of one batch, the trust in its sources, and the latter where they were registered."""
        backbone, device = self.backbone, self.backbone.device
        size = self.resolution // backbone.vae_scale_factor
        noise = initial_noise(self.cfg.seed, indices, (backbone.latent_channels, size, size)).to(device)
        embedded = backbone.encode_text(["", *captions])
        source = None if sources is None else backbone.encode_images(sources)[0]
        scheduler, trust, placed = build_scheduler(self.cfg.scheduler, backbone.scheduler), None, None
        if self.enhancement is not None and strength > 0 and self.placement != "none":
            trust = self.enhancement.trust(embedded[1:], source)
            photos = as_photos(sources)
            if photos is not None and source is not None:
                placed = self.enhancement.registering(photos, source, self.encode)
            seen = source if placed is None else placed
            scheduler = enhance_scheduler(scheduler, self.enhancement, strength, self.placement, seen, trust)
        if source is None and backbone.unet.config["in_channels"] == 2 * backbone.latent_channels:
            source = torch.zeros_like(noise)  # a fully fine-tuned UNet has the extra channels for good
        backbone.unet.eval()
        with self.precision():
            drawn = sample_latents(
                backbone.unet,
                scheduler,
                noise,
                Conditions(embedded[1:], embedded[0], source),
                Guidance(self.cfg.guidance_scale, self.cfg.source_guidance_scale),
                self.cfg.num_inference_steps,
                self._method(),
                [noise_generator(self.cfg.seed + FRESH, i) for i in indices],
                kept,
                start,
            )
        return drawn, trust, placed

    @torch.no_grad()
    def _refined(self, images: Tensor, photos: Tensor | None, strength: float, trust: Tensor | None = None) -> Tensor:
        """The enhancement's decoder stage on decoded images."""
        if self.enhancement is None or self.placement == "none":
            return images
        return self.enhancement.refine(images, photos, strength, trust)

    def encode(self, photos: Tensor) -> Tensor:
        """Latents of photos (B, 3, H, W) in [0, 1], as registered sources ask for them."""
        return self.backbone.encode_images(_bytes(photos))[0]

    def _method(self) -> Method:
        """Anew for every batch: some remember the steps before."""
        return build_method(self.cfg.method, self.cfg.method_options)

    def precision(self) -> AbstractContextManager:
        """Autocast around calls of the network, as its weights and ``bf16`` ask for it."""
        # A layer with an adapter keeps its own precision, whatever the others are held in.
        half = self.bf16 or any(p.dtype != torch.float32 for p in self.backbone.unet.parameters())
        device = self.backbone.device
        return torch.autocast(device.type, half_type(device)) if half else nullcontext()


def as_photos(sources: np.ndarray | None) -> Tensor | None:
    """uint8 (N, H, W, 3) as (N, 3, H, W) in [0, 1]."""
    return None if sources is None else torch.from_numpy(np.array(sources)).permute(0, 3, 1, 2).float() / 255


def _bytes(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] as uint8 (N, H, W, 3). Raises ConfigError where they are not finite."""
    if not images.isfinite().all():  # bytes would be black, and distances to them finite
        raise ConfigError(
            "the drawn pictures are not finite: with backbone.weights=fp16 or on a GPU without bfloat16 the network "
            "overflows (backbone.weights=fp32 does not); otherwise the weights have diverged."
        )
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
