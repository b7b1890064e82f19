"""The LightningModule: the frozen backbone's UNet, the adapter in it, and the enhancement module."""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from lora_dae.adapter.inject import trainable_parameters
from lora_dae.backbone.load import Backbone
from lora_dae.backbone.tokens import unpack_tokens
from lora_dae.config import Config
from lora_dae.enhancement.gates import EnhancementModule
from lora_dae.training.objective import adapter_loss, draw, fixed_draws, step_generator
from lora_dae.training.on_policy import chain_loss, draw_chain

Batch = dict[str, Tensor]
STAGES = ("adapter", "enhancement")


class NonFiniteLossError(RuntimeError):
    """A loss became NaN or infinite; the message says at which step and on which samples."""


class LoraDae(lightning.LightningModule):
    """Two stages, one after the other: ``adapter`` trains LoRA (and source input), ``enhancement`` the module.

    The second never touches the first's weights, so LoRA alone and LoRA with enhancement are the same LoRA.
    Checkpoints hold what trains, in either stage, and nothing of the frozen backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        cfg: Config,
        enhancement: EnhancementModule | None,
        null_text: Tensor,
        stage: str,
    ) -> None:
        """``null_text`` (L, D): the empty caption; its packed tokens (tokens.py) where the text encoders train."""
        super().__init__()
        self.unet = backbone.unet
        self.enhancement = enhancement
        self.live_text = backbone if cfg.adapter.trains_text else None
        if self.live_text is not None:
            self.text_encoders = nn.ModuleDict(backbone.text_encoders)
        self.cfg = cfg
        self.noise_scheduler = backbone.scheduler
        self.register_buffer("null_text", null_text, persistent=False)
        self.strict_loading = False  # checkpoints leave the frozen weights out
        self._kept = set(trainable_parameters(self))
        self.set_stage(stage)

    def set_stage(self, stage: str) -> None:
        """Let only what ``stage`` trains require a gradient."""
        self.stage = stage
        for name, parameter in self.named_parameters():
            in_enhancement = name.startswith("enhancement.")
            parameter.requires_grad_(name in self._kept and in_enhancement == (stage == "enhancement"))

    @property
    def num_train_timesteps(self) -> int:
        return int(self.noise_scheduler.config.num_train_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        generator = step_generator(self.cfg.seed, self.global_step, self.global_rank, STAGES.index(self.stage))
        if self.stage == "adapter":
            losses = self._losses(batch, draw(batch, self.num_train_timesteps, self.cfg.objective, generator))
            loss = losses.mean()
        else:
            assert self.enhancement is not None
            self.unet.eval()
            chain = draw_chain(batch, self.cfg.enhancement, generator)
            batch, null_text = self._with_text(batch)
            loss, parts = chain_loss(
                self.unet, self.noise_scheduler, self.enhancement, batch, null_text, chain  # type: ignore[arg-type]
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

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self._losses(batch, fixed_draws(batch, self.num_train_timesteps))
        self.log("val/loss", losses.mean(), batch_size=len(losses), sync_dist=True, prog_bar=True)

    def _losses(self, batch: Batch, draws: Any) -> Tensor:
        cfg = self.cfg.objective
        batch, null_text = self._with_text(batch)
        return adapter_loss(
            self.unet, self.noise_scheduler, batch, null_text, draws, cfg.min_snr_gamma, cfg.garment_weight  # type: ignore[arg-type]
        )  # fmt: skip

    def _with_text(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with its captions' embeddings, and that of the empty caption: encoded now if the encoders train."""
        if self.live_text is None:
            return batch, self.null_text  # type: ignore[return-value]
        tokens = unpack_tokens(torch.cat([batch["text"], self.null_text[None]]))  # type: ignore[index]
        text = self.live_text.embed_tokens(tokens)
        return {**batch, "text": text[:-1]}, text[-1]

    def configure_optimizers(self) -> Any:
        cfg = self.cfg.optimizer
        parameters = list(trainable_parameters(self).values())
        enhancing = self.stage == "enhancement"
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.cfg.enhancement.learning_rate if enhancing else cfg.learning_rate,
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
