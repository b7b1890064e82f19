"""The adapter's own loss: the backbone's denoising objective, unchanged, on the user's pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dae.backbone.pooled import pooled_width, with_sizes
from lora_dae.config import ObjectiveConfig
from lora_dae.diffusion import add_noise, alpha_sigma, min_snr_weight, snr, training_target

Photos = Callable[[list[int], list[bool]], tuple[Tensor, Tensor | None]]  # sample numbers, which are mirrored


@dataclass(frozen=True)
class Draws:
    """All that is random in one step: (B, C, h, w) noises, (B,) integer timesteps, (B,) dropout decisions."""

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    drop_caption: Tensor
    drop_source: Tensor
    texture: Any = None  # paired.PairedDraws where source texture trains in the same step


def seeded(*parts: int) -> torch.Generator:
    """A CPU generator that is a function of some whole numbers, such as (seed, stream, place in the stream)."""
    value = 0
    for part in parts:
        value = (value * 6_364_136_223_846_793_005 + part + 1_442_695_040_888_963_407) % 2**63
    return torch.Generator().manual_seed(value)


def photos_of(batch: dict[str, Tensor], photos: Photos) -> tuple[Tensor, Tensor | None]:
    """Real and source photos of a batch, turned as its latents are."""
    turned = batch.get("mirrored")
    count = len(batch["latent_mean"])
    return photos(batch["index"].tolist(), [False] * count if turned is None else turned.tolist())


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, without waiting for what a GPU still has to do."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)


def draw(
    batch: dict[str, Tensor], num_timesteps: int, cfg: ObjectiveConfig, generators: Sequence[torch.Generator]
) -> Draws:
    """Draw a step's randomness, each sample's from its own generator, and move it to the batch's device.

    So what a sample is drawn depends on no other sample of its batch and on no number of processes; drawn on the CPU,
    it is the same on every device. (``seed_everything`` alone would give every rank the same noise.)
    """
    shape, device = batch["latent_mean"].shape[1:], batch["latent_mean"].device
    rows = [
        (
            torch.randn(shape, generator=own),
            torch.randn(shape, generator=own),
            torch.randint(0, num_timesteps, (), generator=own),
            torch.rand(2, generator=own),
        )
        for own in generators
    ]
    columns = (torch.stack(column) for column in zip(*rows, strict=True))
    posterior, noise, timesteps, chances = (to_device(column, device) for column in columns)
    return Draws(
        posterior=posterior,
        noise=noise,
        timesteps=timesteps,
        drop_caption=chances[:, 0] < cfg.caption_dropout,
        drop_source=chances[:, 1] < cfg.source_dropout,
    )


def fixed_draws(batch: dict[str, Tensor], num_timesteps: int) -> Draws:
    """Draws for validation: a function of each sample's index alone, timesteps spread evenly; no dropout."""
    indices = batch["index"].tolist()
    shape, device = batch["latent_mean"].shape, batch["latent_mean"].device
    noise = torch.stack([torch.randn(shape[1:], generator=seeded(0, i, 0, 1)) for i in indices])
    golden = torch.tensor([(i * 0.6180339887) % 1.0 for i in indices])
    never = torch.zeros(shape[0], dtype=torch.bool, device=device)
    return Draws(
        posterior=torch.zeros(shape, device=device),
        noise=noise.to(device),
        timesteps=(golden * num_timesteps).long().to(device),
        drop_caption=never,
        drop_source=never,
    )


@dataclass(frozen=True)
class Denoised:
    """What the network made of noised latents: its output and target, (B, C, h, w), and what it was given."""

    output: Tensor
    target: Tensor
    noisy: Tensor  # (B, C, h, w), without the source's channels
    alpha: Tensor  # (B, 1, 1, 1), as sigma
    sigma: Tensor


def denoise(unet: nn.Module, scheduler: Any, batch: dict[str, Tensor], null_text: Tensor, draws: Draws) -> Denoised:
    """Noise the batch and ask the network.

    The source latents, where the batch has them, enter as extra input channels (InstructPix2Pix, Brooks et al. 2023).
    SDXL is told each photo's ``size_ids`` (B, 6), also where its caption is dropped (Podell et al. 2023).
    """
    x0 = batch["latent_mean"] + batch["latent_std"] * draws.posterior
    alpha, sigma = alpha_sigma(scheduler, draws.timesteps, x0)
    noised = noisy = add_noise(x0, draws.noise, alpha, sigma)
    text = torch.where(draws.drop_caption[:, None, None], null_text, batch["text"])
    width = pooled_width(getattr(unet, "config", {}))
    if width and "size_ids" in batch:
        text = with_sizes(text, batch["size_ids"], width)
    if "source" in batch:
        source = torch.where(draws.drop_source[:, None, None, None], 0.0, batch["source"])
        noisy = torch.cat([noisy, source], dim=1)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    output = unet(noisy, draws.timesteps, encoder_hidden_states=text, return_dict=False)[0]
    target = training_target(x0, draws.noise, alpha, sigma, scheduler.config.prediction_type)
    return Denoised(output.float(), target, noised, alpha, sigma)


def weighted_error(
    denoised: Denoised,
    batch: dict[str, Tensor],
    prediction_type: str,
    min_snr_gamma: float,
    garment_weight: float = 1.0,
) -> Tensor:
    """Squared error of the network's own target, float32 (B,), weighted.

    Min-SNR weights of Hang et al. 2023; ``min_snr_gamma=0`` leaves them out. Where the batch has a ``mask``
    (B, 1, h, w) in [0, 1], the squared errors are averaged with weight ``garment_weight`` in it and 1 elsewhere.
    """
    squares = (denoised.output - denoised.target).square()
    if "mask" in batch and garment_weight != 1:
        weight = 1 + (garment_weight - 1) * batch["mask"]
        error = (squares * weight).mean((1, 2, 3)) / weight.mean((1, 2, 3)).clamp_min(1e-6)
    else:
        error = squares.mean((1, 2, 3))
    if min_snr_gamma <= 0:
        return error
    ratio = snr(denoised.alpha, denoised.sigma).flatten()
    return error * min_snr_weight(ratio, min_snr_gamma, prediction_type)
