"""The stages of a training on one set of weights: the adapter first, then the enhancement module's parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from lora_dae.adapter.initial import initialize
from lora_dae.adapter.inject import inject, make_full_finetune, set_mode, trainable_parameters
from lora_dae.adapter.source_input import attach_source_input
from lora_dae.adapter.table import adapter_table
from lora_dae.adapter.text import inject_text
from lora_dae.adapter.words import LearnedWords, encode_with_words
from lora_dae.backbone.load import Backbone
from lora_dae.backbone.precision import choose_precision, round_frozen
from lora_dae.backbone.tokens import pack_tokens
from lora_dae.config import Config, ConfigError, to_dict
from lora_dae.data.captions import long_captions
from lora_dae.data.module import PairDataModule
from lora_dae.data.pair import PairDataset
from lora_dae.enhancement.module import EnhancementModule, build_enhancement
from lora_dae.enhancement.registration import Preview
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.run import write_grid
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.load import prepare_unet
from lora_dae.training import callbacks, together, tracking
from lora_dae.training.compact import CompactState
from lora_dae.training.distance import PhotoDistance
from lora_dae.training.ema import EMACallback
from lora_dae.training.ended import InterruptedRunError, NonFiniteLossError, PeerFailedError
from lora_dae.training.module import LoraDae
from lora_dae.training.prior import PRIOR_FILE, Prior
from lora_dae.training.resume import STAGES, KeepOrigin, origin, run_dir_override
from lora_dae.training.shortcuts import see_keys
from lora_dae.training.trainer import adapter_steps, build_trainer, validation_interval

console = Console()
PREVIEWED = 64  # training pairs that small pictures of latents are fitted to
TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class Training:
    """The stages on one set of weights, and what they share."""

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        backbone: Backbone,
        splits: dict[str, PairDataset],
        extra_callbacks: Sequence[lightning.Callback] = (),
    ) -> None:
        self.cfg, self.run_dir, self.backbone, self.splits = cfg, run_dir, backbone, splits
        self.extra_callbacks = list(extra_callbacks)
        self.steps = adapter_steps(cfg)
        with torch.random.fork_rng(devices=[]):  # the adapter begins with the same weights with and without it
            self.enhancement = build_enhancement(cfg.enhancement, backbone.latent_channels, cfg.conditioning)
        probe = build_trainer(cfg, run_dir, "32-true", self.steps, [], False)
        self.rank, self.processes = probe.global_rank, probe.world_size
        if len(splits["val"]) < self.processes:
            raise ConfigError(
                f"{self.processes} processes share {len(splits['val'])} validation pairs, and each needs one: raise "
                "data.val_size or data.val_fraction, or start fewer."
            )
        self.device = probe.strategy.root_device
        backbone.vae.to(self.device)  # they fill the cache
        backbone.text_encoders_to(self.device)
        precision = str(cfg.trainer.get("precision", "auto"))
        if precision == "auto" and self.device.type == "cpu" and self.processes > 1:
            precision = "32-true"  # each process would measure for itself, and might decide otherwise
        self.precision = choose_precision(precision, self.device)
        if self.device.type == "cuda" and self.precision.startswith("bf16"):
            if not torch.cuda.is_bf16_supported(including_emulation=False) and probe.global_rank == 0:
                console.print("this GPU only emulates bfloat16, slowly: trainer.precision=16-mixed", highlight=False)
        if cfg.backbone.weights != "fp32" and self.precision == "32-true":
            raise ConfigError(
                f"backbone.weights={cfg.backbone.weights} needs mixed precision, but trainer.precision is 32-true "
                "here: set trainer.precision=bf16-mixed, or backbone.weights=fp32."
            )
        self.origin = origin(cfg, backbone.fingerprint, splits)
        self.stopped_early = ""  # at which step and why, in words
        self.stores: dict[str, Any] = {}  # all stages read the same rows
        self.data = self._data(cfg.data.batch_size)
        attention = prepare_unet(backbone, cfg, self.device)
        started = inject_adapter(backbone, cfg)
        if started and self.rank == 0:
            console.print(started, highlight=False)
        self.words: LearnedWords | None = None
        if cfg.adapter.kind == "textual_inversion":
            self.words = LearnedWords(backbone, cfg.adapter.words)
            self.words.attach(backbone)
        null = self._encode_text([""])[0].to(self.device)
        if self.rank == 0:  # before the stages take turns in what requires a gradient
            self._announce(attention)
        round_frozen(backbone.unet, self.precision)
        text = self._text_with_words()
        self.module = LoraDae(
            backbone, cfg, self.enhancement, null, "adapter", self.words, text, self._photos, backbone.decode,
            self._encode_photos,
        )  # fmt: skip
        self.loggers: list[Any] = []
        if self.rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            self.loggers = tracking.build_loggers(cfg, run_dir, to_dict(cfg), console)

    def _announce(self, attention: str) -> None:
        """Say what trains and how."""
        cfg, backbone = self.cfg, self.backbone
        captions = self.data.captions("train")
        too_long = long_captions(captions, backbone.tokenizer, backbone.text_chunks, len(backbone.text_encoders))
        if too_long:
            console.print(too_long, soft_wrap=True, highlight=False)
        extra: dict[str, Any] = dict(backbone.text_encoders) if cfg.adapter.trains_text else {}
        extra |= {"words": self.words, "enhancement": self.enhancement}
        console.print(adapter_table(backbone.unet, {k: v for k, v in extra.items() if v is not None}))
        if cfg.adapter.trains_text:
            console.print("the text encoder trains: captions are encoded anew in every step, none is cached")
        console.print(f"{self.device}, {self.precision}, {attention} attention", highlight=False)

    def _data(self, batch_size: int, option: str = "data.batch_size") -> PairDataModule:
        return PairDataModule(
            self.splits["train"], self.splits["val"], self.splits["test"],
            cache_dir=Path(self.cfg.data.cache_dir) / "latents", encode_images=self._encode_images,
            encode_text=self._encode_text,
            vae=f"{self.backbone.folder.fingerprint('vae')}-{self.precision}",
            text_encoder=f"{self.backbone.folder.fingerprint(*TEXT_PARTS)}-{self.backbone.text_chunks}"
            + ("-tokens" if self.cfg.adapter.trains_text else ""),
            batch_size=batch_size, option=option, seed=self.cfg.seed, cache=self.cfg.data.cache,
            masks=self.cfg.objective.garment_weight != 1, stores=self.stores,
        )  # fmt: skip

    def _encode_text(self, captions: list[str]) -> Tensor:
        """What a batch has of a caption: its embedding, or its tokens while the text encoders train."""
        if self.cfg.adapter.trains_text:
            return pack_tokens(self.backbone.tokenize(captions))
        return self.backbone.encode_text(captions)

    def _text_with_words(self) -> Callable[[Tensor], Tensor] | None:
        """What training encodes anew in every step: the captions of samples, by number, with the words as they are."""
        if self.words is None:
            return None
        words, pairs = self.words, {True: self.splits["train"], False: self.splits["val"]}

        def encode(numbers: Tensor) -> Tensor:
            captions = [pairs[self.module.training][number].caption for number in numbers.tolist()]
            return encode_with_words(self.backbone, words, captions)

        return encode

    def _encode_images(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """In the training precision: on a CPU with bfloat16 this halves the wait before the first step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.startswith("bf16")):
            mean, std = self.backbone.encode_images(images)
        return mean.float(), std.float()

    def _encode_photos(self, photos: Tensor) -> Tensor:
        """Latents of photos (B, 3, H, W) in [0, 1]."""
        return self._encode_images((photos * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())[0]

    def _fit_preview(self, preview: Preview) -> None:
        """On the same training photos in every process, and again where a checkpoint goes on: it is no weight."""
        train = self.splits["train"]
        pairs = (train[i] for i in range(0, len(train), max(1, len(train) // PREVIEWED)))
        photos = (image for pair in pairs for image in (pair.image, pair.source) if image is not None)
        as_tensors = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in photos)
        preview.fit((self._encode_photos(photo), photo.to(self.device)) for photo in as_tensors)

    def _photos(self, indices: list[int], mirrored: list[bool]) -> tuple[Tensor, Tensor | None]:
        """Real photos and source photos of training samples, (B, 3, H, W) in [0, 1], on the training device."""
        found = [self.splits["train"][i] for i in indices]
        pairs = [pair.mirrored() if turned else pair for pair, turned in zip(found, mirrored, strict=True)]

        def stack(images: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device).float() / 255

        sources = [pair.source for pair in pairs if pair.source is not None]
        return stack([pair.image for pair in pairs]), stack(sources) if len(sources) == len(pairs) else None

    def fit(self, checkpoints: dict[str, Path]) -> None:
        """Adapter first, then the enhancement on its averaged weights: the gain last, on what all else does."""
        if self.enhancement is not None and self.enhancement.preview is not None:
            self._fit_preview(self.enhancement.preview)
        planned = planned_stages(self.cfg, self.enhancement)
        names = [name for name, *_ in planned]
        reached = max((names.index(name) for name in checkpoints if name in names), default=0)
        for name, steps, batch_size in planned[reached:]:  # a checkpoint holds what the stages before it trained
            option = "enhancement.texture_batch_size" if name == "texture" else "enhancement.batch_size"
            data = self.data if name == "adapter" else self._data(batch_size, option)
            self._stage(name, steps, data, checkpoints.get(name))

    def _stage(self, stage: str, steps: int, data: PairDataModule, checkpoint: Path | None) -> None:
        cfg = self.cfg
        self.module.set_stage(stage)
        ema = EMACallback(cfg.optimizer.ema_decay if stage == "adapter" else 0.0)
        interrupt = callbacks.CleanInterrupt()
        path = self.run_dir / "checkpoints" / f"{stage}.ckpt"
        if self.rank == 0:  # of later stages, begun from what now trains on: `last` would go on from those
            for later in STAGES[STAGES.index(stage) + 1 :]:
                path.with_name(f"{later}.ckpt").unlink(missing_ok=True)
        patience = cfg.trainer.get("early_stop_patience") if stage == "adapter" else None
        early = [] if patience is None else [callbacks.EarlyStop(patience, validation_interval(cfg, steps))]
        keep = callbacks.Checkpoint(path, validation_interval(cfg, steps), after_validation=patience is not None)
        throughput, stop = callbacks.Throughput(data.batch_size), together.StopTogether()
        progress = [callbacks.StepProgress(stage)] if cfg.trainer.get("enable_progress_bar", True) else []
        extra: list[Any] = [
            ema, CompactState(ema), interrupt, *early, KeepOrigin(self.origin), throughput, keep, stop, *progress,
            *self.extra_callbacks,
        ]  # fmt: skip
        if self.device.type != "cpu" and cfg.data.cache != "off":  # no step needs what has encoded everything
            text = not cfg.adapter.trains_text and self.words is None
            extra.append(callbacks.Rest(lambda: self.backbone.rest(self.device, text)))
        self.module.prior = None
        if stage == "adapter":
            extra += self._of_adapter(ema, throughput.pause)
        loggers = self.loggers
        if stage != "adapter":
            planned = planned_stages(cfg, self.enhancement)
            before = sum(count for _, count, _ in planned[: [name for name, *_ in planned].index(stage)])
            loggers = tracking.stage_loggers(loggers, self.run_dir, stage, before)
        trainer = build_trainer(cfg, self.run_dir, self.precision, steps, extra, stage == "adapter", loggers)
        if self.cfg.adapter.full_finetune:
            self.module.unet.train(stage == "adapter")
        else:
            set_mode(self.module.unet, stage == "adapter")
        see_keys(self.module.unet, cfg.objective.token_share if stage == "adapter" else 1.0)
        if cfg.adapter.trains_text:
            self.module.text_encoders.train(stage == "adapter")
        if self.rank == 0 and self.processes > 1:
            size = gradient_bytes(self.module)
            console.print(
                f"{self.processes} processes, {size / 1e6:.3g} MB of gradients reduced a step", highlight=False
            )
        try:
            with stop:
                trainer.fit(
                    self.module, datamodule=data, ckpt_path=checkpoint, weights_only=checkpoint is not None or None
                )
        except NonFiniteLossError:  # all ranks know
            raise
        except Exception as error:
            if stop.first:
                raise PeerFailedError(stop.first) from error
            raise
        if interrupt.interrupted:
            raise InterruptedRunError(
                f"stopped at step {trainer.global_step} of {steps}; go on with: python train.py <same overrides> "
                f"{run_dir_override(self.run_dir)} ckpt_path=last"
            )
        if self.rank == 0 and early and early[0].why:
            self.stopped_early = early[0].why
            console.print(self.stopped_early, highlight=False, soft_wrap=True)
        if ema.ema is not None:
            ema.ema.swap_in(trainable_parameters(self.module))

    def _of_adapter(self, ema: EMACallback, pause: Callable[[], None]) -> list[Any]:
        """Callbacks of the adapter's stage alone: what draws on its way, and the prior that its module learns from."""
        cfg, tracked = self.cfg, self.cfg.tracking
        extra: list[Any] = []
        if tracked.sample_every_n_steps > 0:
            extra.append(callbacks.Drawing(tracked.sample_every_n_steps, lambda step: self._grid(ema, step), pause))
        if tracked.distance_every_n_steps > 0:
            extra.append(callbacks.Drawing(tracked.distance_every_n_steps, self._distance(ema), pause))
        if cfg.objective.prior_weight > 0:
            self.module.prior = Prior(self.run_dir / PRIOR_FILE, cfg, self.backbone, self.precision.startswith("bf16"))
            extra.append(self.module.prior)
        return extra

    def leave_device(self) -> None:
        """Frozen and trained weights go to the host: whoever draws with the run next loads it from its files."""
        self.backbone.unet.to("cpu")
        self.backbone.vae.to("cpu")
        self.backbone.text_encoders_to(torch.device("cpu"))

    def drawer(self) -> Drawer:
        """What draws with the weights as they stand, without enhancement."""
        cfg, bf16 = self.cfg, self.precision.startswith("bf16")
        return Drawer(self.backbone, None, "none", cfg.conditioning, cfg.data.resolution, cfg.sampling, bf16)

    def prompts(self, held_out: HeldOut) -> list[str]:
        return [c if self.words is None else self.words.prompt(c) for c in held_out.captions]

    @torch.no_grad()
    def _drawn(self, ema: EMACallback, held_out: HeldOut) -> np.ndarray:
        """This process's share of the prompts, drawn on the averaged weights as they stand now; uint8 (n, H, W, 3)."""
        drawer, captions = self.drawer(), self.prompts(held_out)
        own, sources = list(together.share(len(held_out.pairs))), held_out.sources
        with ema.swapped(self.module):
            return drawer.images([captions[i] for i in own], None if sources is None else sources[own], indices=own)

    def _distance(self, ema: EMACallback) -> Callable[[int], None]:
        """What logs how far drawn validation prompts are from their photos; whose features are taken now."""
        cfg = self.cfg
        count = max(cfg.evaluation.num_samples, self.processes)  # each process needs one
        held_out = HeldOut.take(self.splits["val"], count, cfg.conditioning)
        photos = [pair.image for pair in held_out.pairs]
        distance = PhotoDistance(photos, cfg.evaluation.features, self.device, held_out.sources is not None)

        def log(step: int) -> None:
            found = distance(list(self._drawn(ema, held_out)))
            named = {f"val/{name}": value for name, value in found.items()}
            tracking.log_metrics(self.loggers, named, step - 1)  # Lightning's number of this step, whose loss follows

        return log

    def _grid(self, ema: EMACallback, step: int) -> None:
        """A picture of the fixed validation prompts; each process draws its share."""
        cfg = self.cfg
        held_out = HeldOut.take(self.splits["val"], cfg.tracking.num_grid_prompts, cfg.conditioning, least=1)
        drawn = self._drawn(ema, held_out)
        images = together.collect(torch.from_numpy(drawn).to(self.device), len(held_out.pairs)).cpu().numpy()
        if self.rank != 0:
            return
        grid = write_grid(
            {f"step {step}": images}, held_out, self.run_dir / "samples" / f"step_{step:06d}.png", len(images)
        )
        tracking.log_image(self.loggers, "val/samples", grid, step - 1)  # as Lightning numbers steps


def inject_adapter(backbone: Backbone, cfg: Config) -> str:
    """Put what the adapter's stage trains into ``backbone``, in place; returns what ``init_from`` gave."""
    said = ""
    if cfg.adapter.full_finetune:
        make_full_finetune(backbone.unet)
    else:
        inject(backbone.unet, cfg.adapter)
        if cfg.adapter.trains_text:
            inject_text(backbone.text_encoders, cfg.adapter)
        if cfg.adapter.init_from is not None:
            encoders = backbone.text_encoders
            said = initialize(backbone.unet, cfg.adapter.init_from, cfg.adapter.allow_partial, encoders)
    if cfg.conditioning == "source":
        attach_source_input(backbone.unet)
    return said


def planned_stages(cfg: Config, module: EnhancementModule | None) -> list[tuple[str, int, int]]:
    """Name, steps and batch size of what trains, in order."""
    e = cfg.enhancement
    planned = [("adapter", adapter_steps(cfg), cfg.data.batch_size)]
    if module is not None and module.texture is not None and not e.joint:  # then it trains with the adapter
        planned.append(("texture", e.texture_steps, e.texture_batch_size))
    if module is not None and module.decoder is not None:
        planned.append(("decoder", e.decoder_steps, e.batch_size))
    if module is not None and module.gain is not None:
        planned.append(("gain", e.max_steps, e.batch_size))
    return planned


def gradient_bytes(module: torch.nn.Module) -> int:
    """What the processes exchange at every optimizer step: the gradients of what trains, and of nothing else."""
    return sum(p.numel() * p.element_size() for p in trainable_parameters(module).values())
