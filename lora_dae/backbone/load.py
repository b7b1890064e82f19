"""The frozen Stable Diffusion: loaded from an ordinary diffusers folder, asked to encode and decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lora_dae.backbone.layout import BackboneFolder, inspect_backbone
from lora_dae.config import BackboneConfig, ConfigError

ENCODE_BATCH_SIZE = 16
Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass
class Backbone:
    """The parts of one Stable Diffusion, in float32, frozen, in eval mode, on one device."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any  # the folder's own: its betas and prediction_type are those that the UNet was trained with
    folder: BackboneFolder
    fingerprint: str
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
        return next(self.vae.parameters()).device

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> tuple[Tensor, Tensor]:
        """Photos, uint8 (N, H, W, 3), to the VAE's posterior: (mean, std) of scaled latents.

        Both float32 (N, C, h, w), scaled as the UNet sees them: (latent - shift_factor) * scaling_factor.
        An AutoencoderTiny is deterministic: its std is zero.
        """
        means, stds = [], []
        for batch in _batches(images):
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
        """Captions to the text encoder's last hidden states, float32 (N, L * text_chunks, D).

        As in diffusers' StableDiffusionPipeline: padded and cut to the tokenizer's ``model_max_length``,
        no attention mask. With more ``text_chunks`` the tokens that one window leaves over fill further ones, each
        encoded by itself between the marks of beginning and end, one after the other.
        """
        if self.text_chunks > 1:
            return self._encode_chunks(captions)
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def _encode_chunks(self, captions: list[str]) -> Tensor:
        length, tokenizer = self.tokenizer.model_max_length, self.tokenizer
        room = length - 2  # beside the two marks
        rows = []
        for words in tokenizer(captions, add_special_tokens=False, truncation=False, verbose=False).input_ids:
            for chunk in range(self.text_chunks):
                window = [tokenizer.bos_token_id, *words[chunk * room : (chunk + 1) * room], tokenizer.eos_token_id]
                rows.append(window + [tokenizer.pad_token_id] * (length - len(window)))
        encoded = self.text_encoder(torch.tensor(rows, device=self.device))[0]
        return encoded.reshape(len(captions), self.text_chunks * length, -1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) to images, float32 (N, 3, H, W) in [0, 1]."""
        images = []
        for batch in _batches(latents):
            raw = batch.to(self.device, torch.float32) / self._scale + self._shift
            images.append((self.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1))
        return torch.cat(images)

    @property
    def _scale(self) -> float:
        return float(self.vae.config["scaling_factor"])

    @property
    def _shift(self) -> float:
        return float(self.vae.config["shift_factor"] or 0.0)  # AutoencoderKL of SD 1.x says None


def load_backbone(cfg: BackboneConfig, device: str | torch.device = "cpu") -> Backbone:
    """Loads every part of the folder that ``cfg`` names (``studio`` = the shipped one) by from_pretrained.

    Raises ConfigError, before weights load, for all that ``inspect_backbone`` checks, and then if a weight
    file is damaged or lacks some of its layer's weights.
    """
    folder = inspect_backbone(cfg)
    vae: AutoencoderKL | AutoencoderTiny
    if folder.vae_class == "AutoencoderTiny":
        vae = _load(AutoencoderTiny, folder, "vae", device)
    else:
        vae = _load(AutoencoderKL, folder, "vae", device)
    return Backbone(
        unet=_load(UNet2DConditionModel, folder, "unet", device),
        vae=vae,
        text_encoder=_load(CLIPTextModel, folder, "text_encoder", device),
        tokenizer=CLIPTokenizer.from_pretrained(folder.path / "tokenizer"),
        scheduler=_scheduler(folder),
        folder=folder,
        fingerprint=folder.fingerprint(),
        text_chunks=cfg.text_chunks,
    )


def _load(model_class: type[Model], folder: BackboneFolder, part: str, device: str | torch.device) -> Model:
    path = folder.path / part
    try:
        with _quiet():
            model, info = model_class.from_pretrained(  # type: ignore[attr-defined]
                path,
                variant=folder.variants[part],
                use_safetensors=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise ConfigError(
            f"the weights in {path} cannot be loaded ({reason}): restore them from the model's source."
        ) from error
    if info["missing_keys"]:  # from_pretrained would leave these random, with no more than a warning
        missing = sorted(info["missing_keys"])
        raise ConfigError(f"the weights in {path} lack {len(missing)} tensors, {missing[0]} first: restore them.")
    return model.to(device).eval().requires_grad_(False)


def _scheduler(folder: BackboneFolder) -> Any:
    scheduler_class = getattr(diffusers, folder.scheduler_class, None)
    if scheduler_class is None:
        raise ConfigError(
            f"the backbone at {folder.path} uses {folder.scheduler_class}, which diffusers "
            f"{diffusers.__version__} does not have: name another class in scheduler/scheduler_config.json."
        )
    return scheduler_class.from_pretrained(folder.path / "scheduler")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no warning that AutoencoderTiny does not know its own block_out_channels."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()


def _batches(items: Any) -> Iterator[Any]:
    for start in range(0, len(items), ENCODE_BATCH_SIZE):
        yield items[start : start + ENCODE_BATCH_SIZE]
