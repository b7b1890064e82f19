"""The LightningModule: the frozen backbone's UNet, the adapter in it, and the enhancement module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor

from lora_dae.adapter.inject import trainable_parameters
from lora_dae.backbone.load import Backbone
from lora_dae.config import Config
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.training.objective import adapter_loss, draw, fixed_draws, step_generator
from lora_dae.training.on_policy import chain_loss, draw_chain
from lora_dae.training.paired import decoder_loss, draw_paired, texture_loss

Batch = dict[str, Tensor]
Photos = Callable[[list[int]], tuple[Tensor, Tensor | None]]
Decode = Callable[[Tensor], Tensor]
STAGES = ("adapter", "gain", "texture")  # numbered by place, for the random streams
_DECODED = 8  # images of a batch that the decoder stage learns from


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message says at which step and on which samples."""


class LoraDae(lightning.LightningModule):
    """Stages, one after the other: ``adapter`` trains LoRA (and source input), ``texture`` the enhancement's source
    texture and decoder stage, ``gain`` its gain.

    The later ones never touch the first's weights, so LoRA alone and LoRA with enhancement are the same LoRA.
    Checkpoints hold what trains, in any stage, and nothing of the frozen backbone. ``photos`` gives the real photos
    and source photos of training samples by index, (B, 3, H, W) in [0, 1], and ``decode`` the images of latents:
    the decoder stage learns from both.
    """

    def __init__(
        self,
        backbone: Backbone,
        cfg: Config,
        enhancement: EnhancementModule | None,
        null_text: Tensor,
        stage: str,
        photos: Photos | None = None,
        decode: Decode | None = None,
    ) -> None:
        super().__init__()
        self.unet = backbone.unet
        self.enhancement = enhancement
        self.cfg = cfg
        self.noise_scheduler = backbone.scheduler
        self.register_buffer("null_text", null_text, persistent=False)
        self.photos, self.decode = photos, decode
        self.strict_loading = False  # checkpoints leave the frozen weights out
        self._kept = set(trainable_parameters(self))
        self.set_stage(stage)

    def set_stage(self, stage: str) -> None:
        """Let only what ``stage`` trains require a gradient."""
        self.stage = stage
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._kept and _stage_of(name) == stage)

    @property
    def num_train_timesteps(self) -> int:
        return int(self.noise_scheduler.config.num_train_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        generator = step_generator(self.cfg.seed, self.global_step, self.global_rank, STAGES.index(self.stage))
        if self.stage == "adapter":
            draws = draw(batch, self.num_train_timesteps, self.cfg.objective, generator)
            losses = self._losses(batch, draws)
            loss = losses.mean()
        elif self.stage == "texture":
            loss = self._texture_step(batch, generator)
        else:
            assert self.enhancement is not None
            self.unet.eval()
            chain = draw_chain(batch, self.cfg.enhancement, generator)
            loss, parts = chain_loss(
                self.unet, self.noise_scheduler, self.enhancement, batch, self.null_text, chain  # type: ignore[arg-type]
            )  # fmt: skip
            self.log("enhancement/power_gap", parts.power)
            self.log("enhancement/distribution", parts.distribution)
        if not math.isfinite(loss.item()):
            samples = ", ".join(str(i) for i in batch["index"].tolist())
            raise NonFiniteLossError(
                f"the loss became {loss.item()} at step {self.global_step} on samples {samples}: lower "
                "optimizer.learning_rate, or look at these samples."
            )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def _texture_step(self, batch: Batch, generator: torch.Generator) -> Tensor:
        module = self.enhancement
        assert module is not None
        self.unet.eval()
        draws = draw_paired(batch, self.noise_scheduler, self.cfg.enhancement, generator)
        clean = batch["latent_mean"]
        late = draws.timesteps.argsort()[:_DECODED]  # near the end of a chain: what the decoder will see
        loss, images = clean.new_zeros(()), clean[:0]
        if module.texture is not None:
            loss, before, edited = texture_loss(
                self.unet,
                self.noise_scheduler,
                module,
                batch,
                self.null_text,
                draws,  # type: ignore[arg-type]
            )
            self.log("enhancement/band_error", loss / before)
            images = edited[late]
        if module.decoder is None:
            return loss
        assert self.photos is not None and self.decode is not None
        real, source = self.photos(batch["index"][late].tolist())
        with torch.no_grad():
            decoded = self.decode(torch.cat([images, clean[late]])).float().chunk(2 if len(images) else 1)
        # Reconstructions without a source keep the stage right for text alone.
        refined = decoder_loss(module, decoded[-1], real, None, None)
        if source is not None:
            refined = refined + decoder_loss(module, decoded[0], real, source, draws.wrong[late])
        self.log("enhancement/decoder", refined)
        return loss + refined

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self._losses(batch, fixed_draws(batch, self.num_train_timesteps))
        self.log("val/loss", losses.mean(), batch_size=len(losses), sync_dist=True, prog_bar=True)

    def _losses(self, batch: Batch, draws: Any) -> Tensor:
        cfg = self.cfg.objective
        return adapter_loss(
            self.unet, self.noise_scheduler, batch, self.null_text, draws, cfg.min_snr_gamma, cfg.garment_weight  # type: ignore[arg-type]
        )  # fmt: skip

    def configure_optimizers(self) -> Any:
        cfg = self.cfg.optimizer
        parameters = list(trainable_parameters(self).values())
        enhancing = self.stage != "adapter"
        rates = {
            "adapter": cfg.learning_rate,
            "gain": self.cfg.enhancement.learning_rate,
            "texture": self.cfg.enhancement.texture_learning_rate,
        }
        optimizer = torch.optim.AdamW(
            parameters,
            lr=rates[self.stage],
            betas=(cfg.betas[0], cfg.betas[1]),
            weight_decay=0.0 if enhancing else cfg.weight_decay,
        )
        steps = max(self.trainer.max_steps, 1)
        warmup = min(cfg.warmup_steps, max(steps // 10, 1))

        def factor(step: int) -> float:
            done = max(step - warmup, 0) / max(steps - warmup, 1)
            return min((step + 1) / warmup, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what trains in one of the stages."""
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in self._kept}


def _stage_of(name: str) -> str:
    """The stage that trains the parameter of this name."""
    if not name.startswith("enhancement."):
        return "adapter"
    return "gain" if name.startswith("enhancement.gain.") else "texture"
