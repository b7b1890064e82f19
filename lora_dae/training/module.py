"""The LightningModule: the frozen backbone's UNet, the adapter in it, and the enhancement module."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from lora_dae.adapter.inject import trainable_parameters
from lora_dae.adapter.words import LearnedWords
from lora_dae.backbone.load import Backbone
from lora_dae.backbone.tokens import unpack_tokens
from lora_dae.config import Config
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.registration import Encode
from lora_dae.training.ended import NonFiniteLossError
from lora_dae.training.objective import Draws, Photos, denoise, draw, fixed_draws, seeded, weighted_error
from lora_dae.training.on_policy import chain_loss, draw_chain
from lora_dae.training.paired import (
    LATE,
    Decode,
    PairedDraws,
    draw_paired,
    joint_loss,
    refining_loss,
    texture_loss,
)
from lora_dae.training.prior import Prior
from lora_dae.training.resume import STAGES, align_progress
from lora_dae.training.shortcuts import at_half_size
from lora_dae.training.together import global_batch, who

Batch = dict[str, Tensor]
# Streams of random numbers: one per stage, what all samples of a step have in common, pictures of the prior.
SHARED, PRIOR = 4, 5


def check_every(device: torch.device) -> int:
    """Steps between looks at the losses: a GPU has to be waited for at each, a CPU not."""
    return 1 if device.type == "cpu" else 10


@dataclass
class Seen:
    """A step's loss, the global batch's and this process's, and its samples; not looked at yet."""

    step: int
    mean: Tensor
    loss: Tensor
    index: Tensor


class LoraDae(lightning.LightningModule):
    """Stages, one after the other: ``adapter`` trains LoRA (and source input), then the enhancement's parts by name:
    ``texture``, ``decoder``, ``gain``.

    The later ones never touch the first's weights, so LoRA alone and LoRA with enhancement are the same LoRA
    (unless ``enhancement.joint`` trains the texture in the first).
    Checkpoints hold what trains, in any stage, and nothing of the frozen backbone. With ``words`` (textual
    inversion) ``text`` gives the embeddings of samples by number: those of the batch are without them. ``photos``
    gives training samples' real and source photos by number, ``decode`` the images of latents: the decoder stage
    learns from both. ``encode`` gives latents of photos: registered sources are moved first.
    """

    def __init__(
        self,
        backbone: Backbone,
        cfg: Config,
        enhancement: EnhancementModule | None,
        null_text: Tensor,
        stage: str,
        words: LearnedWords | None = None,
        text: Callable[[Tensor], Tensor] | None = None,
        photos: Photos | None = None,
        decode: Decode | None = None,
        encode: Encode | None = None,
    ) -> None:
        """``null_text`` (L, D): the empty caption; its packed tokens (tokens.py) where the text encoders train."""
        super().__init__()
        self.words, self.text = words, text
        self.photos, self.decode, self.encode = photos, decode, encode
        self.unet = backbone.unet
        self.enhancement = enhancement
        self.live_text = backbone if cfg.adapter.trains_text else None
        if self.live_text is not None:
            self.text_encoders = nn.ModuleDict(backbone.text_encoders)
        self.cfg = cfg
        self.noise_scheduler = backbone.scheduler
        self.register_buffer("null_text", null_text, persistent=False)
        self.prior: Prior | None = None
        self._joint = cfg.enhancement.joint and enhancement is not None and enhancement.texture is not None
        self._unchecked: list[Seen] = []
        self.last_loss: float | None = None  # the last that was looked at
        self.strict_loading = False  # checkpoints leave the frozen weights out
        self._kept = set(trainable_parameters(self))
        self.set_stage(stage)

    def set_stage(self, stage: str) -> None:
        """Let only what ``stage`` trains require a gradient."""
        self.stage = stage
        unused = "enhancement.decoder.matcher." if self.cfg.conditioning == "none" else None  # nothing to match with
        for name, parameter in self.named_parameters():
            trains = name in self._kept and self._stage_of(name) == stage
            parameter.requires_grad_(trains and not (unused and name.startswith(unused)))

    def _stage_of(self, name: str) -> str:
        """The stage that trains the parameter of this name."""
        part = name.split(".")[1] if name.startswith("enhancement.") else "adapter"
        return "adapter" if part == "texture" and self._joint else part

    @property
    def num_train_timesteps(self) -> int:
        return int(self.noise_scheduler.config.num_train_timesteps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        stream, places = STAGES.index(self.stage), self._places(batch_idx, len(batch["latent_mean"]))
        generators = [seeded(self.cfg.seed, stream, place) for place in places]
        if self.cfg.adapter.dropout > 0 or self.cfg.objective.token_share < 1:  # they draw from the global generator
            torch.manual_seed(generators[0].initial_seed())
        scale = 1
        if self.stage == "adapter":
            half = self.global_step < self.cfg.objective.low_resolution_share * self.trainer.max_steps
            if half:
                batch = at_half_size(batch)
            draws = draw(batch, self.num_train_timesteps, self.cfg.objective, generators)
            if self._joint:
                draws = replace(draws, texture=self._paired_draws(batch, batch_idx, places, "texture"))
            loss = self._losses(batch, draws).mean()
            if self.prior is not None:
                kept = self.prior.batch(places, batch)
                kept = at_half_size(kept) if half else kept
                generators = [seeded(self.cfg.seed, PRIOR, place) for place in places]
                draws = draw(kept, self.num_train_timesteps, self.cfg.objective, generators)
                loss = loss + self.cfg.objective.prior_weight * self._losses(kept, draws).mean()
        elif self.stage in ("texture", "decoder"):
            loss = self._paired_step(batch, batch_idx, places)
        else:
            assert self.enhancement is not None
            self.unet.eval()
            shared = seeded(self.cfg.seed, SHARED, self._micro_step(batch_idx))
            chain = draw_chain(batch, self.cfg.enhancement, shared, generators)
            batch, null_text = self.with_text(batch)
            unet: Any = self.unet
            loss, parts = chain_loss(
                unet, self.noise_scheduler, self.enhancement, batch, null_text, chain, global_batch,
                self.cfg.enhancement.losses, self.cfg.enhancement.placement, self.photos, self.encode,
            )  # fmt: skip
            scale = self.trainer.world_size
            self.log("enhancement/power_gap", parts.power)
            self.log("enhancement/distribution", parts.distribution)
        # One small collective: the loss of the global batch, and every rank learns of any rank's NaN at once.
        mean = self._mean(loss)
        self._unchecked.append(Seen(self.global_step, mean, loss.detach(), batch["index"]))
        if len(self._unchecked) >= check_every(mean.device):
            self.check_losses()
        self.log("train/loss", mean)  # not for the bar, which would wait for a GPU in every step: see check_losses
        return loss * scale

    def check_losses(self) -> None:
        """Raises NonFiniteLossError, on every rank, if a loss since the last call was NaN or infinite."""
        seen, self._unchecked = self._unchecked, []
        if not seen:
            return
        means = torch.stack([one.mean for one in seen]).tolist()
        self.last_loss = means[-1]
        if all(map(math.isfinite, means)):
            return
        first = next(one for one in seen if not math.isfinite(one.mean.item()))
        samples = who(not math.isfinite(first.loss.item()), first.index.tolist())
        raise NonFiniteLossError(
            f"the loss became {first.mean.item()} at step {first.step} on samples {samples}: lower "
            "optimizer.learning_rate, or look at these samples."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_losses()  # no checkpoint of a step that went wrong

    def on_train_end(self) -> None:
        self.check_losses()

    def _paired_step(self, batch: Batch, batch_idx: int, places: range) -> Tensor:
        """The loss of source texture, or of the decoder stage."""
        module, cfg = self.enhancement, self.cfg.enhancement
        assert module is not None and self.photos is not None and self.decode is not None
        self.unet.eval()
        draws = self._paired_draws(batch, batch_idx, places, self.stage)
        batch, null_text = self.with_text(batch)
        unet: Any = self.unet
        if self.stage == "decoder":
            return refining_loss(
                unet, self.noise_scheduler, module, batch, null_text, draws, self.photos, self.decode, global_batch,
                cfg.losses, self.encode,
            )  # fmt: skip
        loss = texture_loss(
            unet, self.noise_scheduler, module, batch, null_text, draws, global_batch, self.photos, self.encode
        )
        self.log("enhancement/band_error", self._mean(loss))
        return loss

    def _mean(self, own: Tensor) -> Tensor:
        """The mean over all processes, for logs: nothing is learned from it."""
        mean = self.trainer.strategy.reduce(own.detach().clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    def _micro_step(self, batch_idx: int) -> int:
        """How many batches came before this one on each rank."""
        accumulated = self.trainer.accumulate_grad_batches
        return self.global_step * accumulated + batch_idx % accumulated

    def _places(self, batch_idx: int, count: int) -> range:
        """Where in the training stream the batch's samples stand; no number of processes changes a sample's place."""
        first = (self._micro_step(batch_idx) * self.trainer.world_size + self.global_rank) * count
        return range(first, first + count)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        align_progress(checkpoint, self.trainer.accumulate_grad_batches)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self._losses(batch, fixed_draws(batch, self.num_train_timesteps))
        self._validated += torch.stack([losses.sum(), losses.new_tensor(len(losses))])

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2, device=self.device)  # sum of losses, samples

    def on_validation_epoch_end(self) -> None:
        # Lightning's own mean over ranks rounds the mean number of samples down, so an odd number of them raises it.
        total = self.trainer.strategy.reduce(self._validated, reduce_op="sum")
        assert isinstance(total, Tensor)
        self.log("val/loss", total[0] / total[1], batch_size=1, sync_dist=True, prog_bar=True)

    def _paired_draws(self, batch: Batch, batch_idx: int, places: range, stage: str) -> PairedDraws:
        generators = [seeded(self.cfg.seed, STAGES.index(stage), place) for place in places]
        shared = seeded(self.cfg.seed, SHARED, self._micro_step(batch_idx))
        late, turn = LATE if stage == "decoder" else 1.0, places[0] // len(places)
        return draw_paired(batch, self.noise_scheduler, self.cfg.enhancement, shared, generators, turn, late)

    def _losses(self, batch: Batch, draws: Draws) -> Tensor:
        cfg, scheduler = self.cfg.objective, self.noise_scheduler
        if self.text is not None and "index" in batch:
            batch = {**batch, "text": self.text(batch["index"])}
        batch, null_text = self.with_text(batch)
        unet: Any = self.unet
        denoised = denoise(unet, scheduler, batch, null_text, draws)
        prediction_type = scheduler.config.prediction_type
        losses = weighted_error(denoised, batch, prediction_type, cfg.min_snr_gamma, cfg.garment_weight)
        if draws.texture is None or self.enhancement is None:
            return losses
        gamma = cfg.min_snr_gamma
        joint = joint_loss(scheduler, self.enhancement, batch, denoised, draws.texture, gamma, global_batch)
        self.log("enhancement/joint", self._mean(joint.mean()))
        return losses + joint

    def with_text(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with its captions' embeddings, and that of the empty caption: encoded now if the encoders train."""
        if self.live_text is None:
            return batch, self.null_text  # type: ignore[return-value]
        tokens = unpack_tokens(torch.cat([batch["text"], self.null_text[None]]))  # type: ignore[index]
        text = self.live_text.embed_tokens(tokens)
        return {**batch, "text": text[:-1]}, text[-1]

    def configure_optimizers(self) -> Any:
        cfg = self.cfg.optimizer
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in trainable_parameters(self).items():  # of one stage, unless two train jointly
            part = name.split(".")[1] if name.startswith("enhancement.") else "adapter"
            if name.startswith("unet.source_input.") and cfg.source_learning_rate is not None:
                part = "source_input"
            groups.setdefault(part, []).append(parameter)
        rates = {
            "adapter": cfg.learning_rate,
            "source_input": cfg.source_learning_rate,
            "texture": self.cfg.enhancement.learning_rate,
            "decoder": self.cfg.enhancement.decoder_learning_rate,
            "gain": self.cfg.enhancement.learning_rate,
        }
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": own,
                    "lr": rates[part],
                    "weight_decay": cfg.weight_decay if part in ("adapter", "source_input") else 0.0,
                }
                for part, own in groups.items()
            ],
            betas=(cfg.betas[0], cfg.betas[1]),
            fused=self._fuses_optimizer,
        )
        steps = max(self.trainer.max_steps, 1)
        warmup = max(1, min(cfg.warmup_steps, steps // 10))

        def factor(step: int) -> float:
            done = max(step - warmup, 0) / max(steps - warmup, 1)
            return min((step + 1) / warmup, 1.0) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def _fuses_optimizer(self) -> bool:
        return str(self.trainer.precision) != "16-mixed"  # there gradients are scaled, and clipped in between

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """As Lightning does it, which refuses fused optimizers: they may be meant for scaled gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not self._fuses_optimizer:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val and gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only what trains in one of the stages."""
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in self._kept}
