"""The frozen Stable Diffusion, of any family: loaded part by part, asked to encode and decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_dae.backbone import pooled
from lora_dae.backbone.int8 import to_int8
from lora_dae.backbone.layout import BackboneFolder, inspect_backbone
from lora_dae.backbone.parts import load_part, load_scheduler, load_tokenizer
from lora_dae.backbone.recompute import recompute
from lora_dae.config import BackboneConfig, ConfigError

ENCODE_BATCH_SIZE = 16
ENCODE_PIXELS = 16 * 256 * 256  # at once: an SDXL VAE takes about 1.5 GB for a photo of 1024 x 1024
TILE = 512  # pixels
# Of the UNet by backbone.weights; int8 holds its blocks in int8 (int8.py) and the rest so.
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}


@dataclass
class Backbone:
    """The parts of one Stable Diffusion, frozen, in eval mode. All but the UNet are float32 and on one device."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any  # the folder's own: its betas and prediction_type are those that the UNet was trained with
    folder: BackboneFolder
    fingerprint: str
    text_encoder_2: CLIPTextModelWithProjection | None = None  # SDXL
    tokenizer_2: CLIPTokenizer | None = None
    visits: torch.device | None = None  # where resting models go while they are used (see rest)
    resting: list[Any] = field(default_factory=list)
    text_chunks: int = 1  # windows of the text encoder that a caption may fill

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent pixel, along one side."""
        return self.folder.vae_scale_factor

    @property
    def latent_channels(self) -> int:
        return self.folder.latent_channels

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction or sample."""
        return str(self.scheduler.config.prediction_type)

    @property
    def device(self) -> torch.device:
        """Where encoded and decoded tensors lie."""
        return self.visits or next(self.vae.parameters()).device

    @property
    def text_length(self) -> int:
        """Rows of a text embedding: the tokens, and for SDXL the pooled text (pooled.py)."""
        return self.tokenizer.model_max_length + int(self.text_encoder_2 is not None)

    @property
    def text_encoders(self) -> dict[str, CLIPTextModel | CLIPTextModelWithProjection]:
        """By component: ``text_encoder``, and ``text_encoder_2`` of SDXL."""
        found = {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def text_encoders_to(self, device: torch.device) -> None:
        for encoder in self.text_encoders.values():
            encoder.to(device)  # type: ignore[arg-type]

    def rest(self, device: torch.device, text: bool = True) -> None:
        """VAE and (``text``) text encoders leave ``device`` for the host, and come back only while they are used."""
        self.visits = device
        self.resting = [self.vae, *(self.text_encoders.values() if text else [])]
        for model in self.resting:
            model.to("cpu")

    @contextmanager
    def _awake(self, *models: torch.nn.Module) -> Iterator[None]:
        visitors = [model for model in models if any(model is other for other in self.resting)]
        for model in visitors:
            model.to(self.visits)
        try:
            yield
        finally:
            for model in visitors:
                model.to("cpu")

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Photos, uint8 (N, H, W, 3), to the VAE's posterior: (mean, std) of scaled latents.

        Both float32 (N, C, h, w), scaled as the UNet sees them: (latent - shift_factor) * scaling_factor.
        An AutoencoderTiny is deterministic: its std is zero.
        """
        means, stds = [], []
        with self._awake(self.vae):
            for batch in _batches(images, images.shape[1] * images.shape[2]):
                pixels = torch.from_numpy(np.ascontiguousarray(batch)).to(self.device)
                encoded = self.vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
                if isinstance(self.vae, AutoencoderTiny):
                    mean, std = encoded.latents, torch.zeros_like(encoded.latents)
                else:
                    mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
                means.append((mean - self._shift) * self._scale)
                stds.append(std * self._scale)
        return torch.cat(means), torch.cat(stds)

    @torch.no_grad()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions to what the UNet attends to, float32 (N, text_length, D): embed_tokens(tokenize(captions))."""
        with self._awake(*self.text_encoders.values()):
            return self.embed_tokens(self.tokenize(captions).to(self.device))

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions to token numbers, int64 (N, E, L * text_chunks) on the CPU, E = text encoders.

        As in diffusers' pipelines: padded and cut to the tokenizer's ``model_max_length`` L. With more
        ``text_chunks`` (one encoder only) the tokens that one window leaves over fill further ones.
        """
        if self.text_chunks > 1:
            return self._windows(captions)[:, None]
        tokenizers = [t for t in (self.tokenizer, self.tokenizer_2) if t is not None]
        return torch.stack([_tokens(tokenizer, captions) for tokenizer in tokenizers], dim=1)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """What ``tokenize`` gave, on the encoders' device, to float32 (N, text_length, D); differentiable.

        As in diffusers' pipelines, without an attention mask. SD 1.x and 2.x: the last hidden states. SDXL: the last
        but one of both encoders, and the pooled text as the last row (pooled.py); the empty caption is zeros where
        the model was trained so. Each of several windows is encoded by itself: (N, text_length * text_chunks, D).
        """
        if self.text_encoder_2 is None:
            windows = tokens[:, 0].reshape(len(tokens) * self.text_chunks, -1)
            return self.text_encoder(windows)[0].float().reshape(len(tokens), tokens.shape[2], -1)
        first = self.text_encoder(tokens[:, 0], output_hidden_states=True)
        second = self.text_encoder_2(tokens[:, 1], output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        packed = pooled.pack(text, second.text_embeds).float()
        if self.folder.zeros_for_empty:
            empty = (tokens == self.tokenize([""]).to(tokens.device)).all(dim=(1, 2))
            packed = torch.where(empty[:, None, None], torch.zeros_like(packed), packed)
        return packed

    def _windows(self, captions: list[str]) -> Tensor:
        length, tokenizer = self.tokenizer.model_max_length, self.tokenizer
        room = length - 2  # beside the two marks
        rows = []
        for words in tokenizer(captions, add_special_tokens=False, truncation=False, verbose=False).input_ids:
            row: list[int] = []
            for chunk in range(self.text_chunks):
                window = [tokenizer.bos_token_id, *words[chunk * room : (chunk + 1) * room], tokenizer.eos_token_id]
                row += window + [tokenizer.pad_token_id] * (length - len(window))
            rows.append(row)
        return torch.tensor(rows)

    @torch.no_grad()
    def decode(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """Scaled latents (N, C, h, w) to images, float32 (N, 3, H, W) in [0, 1].

        ``tiled``: in diffusers' own overlapping tiles, of at most 512 pixels.
        """
        images = []
        kind = self.device.type
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        # SDXL's VAE overflows in float16; bfloat16 does not.
        precision = torch.autocast(kind, enabled=False) if half else nullcontext()
        with self._awake(self.vae), precision, self._tiling() if tiled else nullcontext():
            for batch in _batches(latents, latents.shape[2] * latents.shape[3] * self.vae_scale_factor**2):
                raw = batch.to(self.device, torch.float32) / self._scale + self._shift
                images.append((self.vae.decode(raw).sample.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    @contextmanager
    def _tiling(self) -> Iterator[None]:
        vae: Any = self.vae
        factor, latents = self.vae_scale_factor, vae.tile_latent_min_size
        if isinstance(vae, AutoencoderTiny):  # diffusers takes 2 ** out_channels, 8, for the factor of any
            side = latents * vae.spatial_scale_factor // factor
            told = {"tile_latent_min_size": side, "spatial_scale_factor": factor}
        else:  # diffusers cuts nothing up to the size that the VAE was trained at, 1024 pixels for SDXL's
            side = min(latents, TILE // factor)
            told = {"tile_latent_min_size": side, "tile_sample_min_size": side * factor}
        own = {name: getattr(vae, name) for name in told}
        vars(vae).update(told)
        vae.enable_tiling()
        try:
            yield
        finally:
            vae.disable_tiling()
            vars(vae).update(own)

    @property
    def _scale(self) -> float:
        return float(self.vae.config["scaling_factor"])

    @property
    def _shift(self) -> float:
        return float(self.vae.config["shift_factor"] or 0.0)  # AutoencoderKL of SD 1.x says None


def load_backbone(cfg: BackboneConfig, device: str | torch.device = "cpu") -> Backbone:
    """Loads every part of what ``cfg`` names (``studio`` = the shipped one), one after the other.

    The UNet's weights are of ``cfg.weights``. Raises ConfigError, before weights load, for all that
    ``inspect_backbone`` checks, and then if a weight file is damaged or lacks some of its layer's weights.
    """
    folder = inspect_backbone(cfg)
    second = folder.family == "sdxl"
    if second and cfg.text_chunks > 1:
        raise ConfigError("backbone.text_chunks is for one text encoder; SDXL has two: leave it at 1.")
    tokenizer = load_tokenizer(folder, "tokenizer")  # first, as what is wrong shows before weights load
    tokenizer_2 = load_tokenizer(folder, "tokenizer_2") if second else None
    scheduler = load_scheduler(folder)
    fp32, text_encoder_2 = torch.float32, None
    vae: AutoencoderKL | AutoencoderTiny
    if folder.vae_class == "AutoencoderTiny":
        vae = load_part(AutoencoderTiny, folder, "vae", device, fp32)
    else:
        vae = load_part(AutoencoderKL, folder, "vae", device, fp32)
    unet = load_part(UNet2DConditionModel, folder, "unet", device, WEIGHTS[cfg.weights])
    if cfg.weights == "int8":
        to_int8(unet)
    pooled.hook_into(unet, folder.vae_scale_factor)
    recompute(unet, cfg.gradient_checkpointing)
    if second:
        text_encoder_2 = load_part(CLIPTextModelWithProjection, folder, "text_encoder_2", device, fp32)
    return Backbone(
        unet=unet,
        vae=vae,
        text_encoder=load_part(CLIPTextModel, folder, "text_encoder", device, fp32),
        tokenizer=tokenizer,
        scheduler=scheduler,
        folder=folder,
        fingerprint=folder.fingerprint(),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        text_chunks=cfg.text_chunks,
    )


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def encode_batch(pixels: int) -> int:
    """How many photos of so many pixels pass the VAE at once."""
    return max(1, min(ENCODE_BATCH_SIZE, ENCODE_PIXELS // pixels))


def _batches(items: Any, pixels: int) -> Iterator[Any]:
    size = encode_batch(pixels)
    for start in range(0, len(items), size):
        yield items[start : start + size]
