"""DreamBooth's prior preservation: while the adapter learns new photos, it keeps what the frozen backbone draws.

    loss = loss(photos) + prior_weight * loss(the frozen backbone's pictures of prior_caption)

Ruiz et al. 2022 (arXiv 2208.12242, equation 3). The pictures are latents and never decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from lora_dae.adapter.atomic import load_tensors, save_tensors
from lora_dae.adapter.inject import kept_modes
from lora_dae.backbone.load import Backbone
from lora_dae.backbone.tokens import pack_tokens
from lora_dae.config import Config, ConfigError
from lora_dae.sampling.draw import Drawer
from lora_dae.training import together

PRIOR_FILE = "prior.safetensors"  # in a run folder: the latents that it keeps to


class Prior(Callback):
    """Draws the latents before the first step, each process its share, and keeps them in ``path`` for a resumed run."""

    def __init__(self, path: Path, cfg: Config, backbone: Backbone, bf16: bool) -> None:
        self.path, self.cfg, self.backbone, self.bf16 = path, cfg, backbone, bf16
        self.latents = self.text = torch.empty(0)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """The adapter changes nothing yet, so the UNet still is the frozen backbone."""
        if trainer.ckpt_path is not None:
            self._take_over(Path(trainer.ckpt_path), trainer.is_global_zero)
        else:
            with kept_modes(pl_module.unet):
                self.latents = self._draw().cpu()
            if trainer.is_global_zero:
                save_tensors({"latents": self.latents}, self.path, {"format": "pt"})
        caption = [self.cfg.objective.prior_caption]
        live = self.cfg.adapter.trains_text  # then a batch has tokens
        text = pack_tokens(self.backbone.tokenize(caption)) if live else self.backbone.encode_text(caption)
        self.text = text[0].cpu()

    def _take_over(self, checkpoint: Path, first: bool) -> None:
        """The latents that the training of ``checkpoint`` keeps to, into this run's folder as well."""
        beside = checkpoint.parent.parent / PRIOR_FILE
        found = next((path for path in (beside, self.path) if path.is_file()), None)
        if found is None:
            raise ConfigError(f"{beside} is gone, the pictures that this run keeps to: start anew without ckpt_path.")
        self.latents = load_tensors(found, "start anew without ckpt_path")[0]["latents"]
        if first and found.resolve() != self.path.resolve():
            save_tensors({"latents": self.latents}, self.path, {"format": "pt"})

    def _draw(self) -> Tensor:
        cfg, count = self.cfg, self.cfg.objective.prior_images
        plain = replace(cfg.sampling, method="none", method_options={})
        drawer = Drawer(self.backbone, None, "none", cfg.conditioning, cfg.data.resolution, plain, self.bf16)
        own, at_once = list(together.share(count)), cfg.sampling.batch_size
        parts = [own[k : k + at_once] for k in range(0, len(own), at_once)]
        captions = [cfg.objective.prior_caption] * at_once
        drawn = [drawer.latents(captions[: len(part)], None, 0.0, part) for part in parts]
        shape = (0, self.backbone.latent_channels, *[cfg.data.resolution // self.backbone.vae_scale_factor] * 2)
        return together.collect(torch.cat([torch.zeros(shape, device=self.backbone.device), *drawn]), count)

    def batch(self, places: Sequence[int], like: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of them, by places in the training stream; with empty sources where ``like`` has sources."""
        device = like["text"].device
        latents = self.latents[[place % len(self.latents) for place in places]].to(device)
        found = {"latent_mean": latents, "latent_std": torch.zeros_like(latents)}
        found["text"] = self.text.to(like["text"]).expand(len(latents), *self.text.shape)
        return found | ({"source": torch.zeros_like(latents)} if "source" in like else {})
