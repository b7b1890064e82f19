"""Step 1 of the recipe: an AutoencoderTiny whose 12-channel, 4x smaller latents keep fine cloth.

L1 and gradient losses on 64-pixel crops; a little noise on the latents and, every eighth step, the
demand that decoding shrunk latents gives the shrunk picture (scale equivariance, as in EQ-VAE, 2502.09509):
both make the latents smooth, so that a small denoiser can learn them. No adversarial part.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from lora_dae.backbone.studio import recipe
from lora_dae.backbone.studio.recipe import Averaged, Schedule, console

CROP, BATCH = 64, 16
LATENT_CHANNELS = 12
NOISE = 0.06  # standard deviation of the noise on unit-variance latents


def build() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(64, 64, 64),
        decoder_block_out_channels=(64, 64, 64),
        num_encoder_blocks=(1, 2, 4),
        num_decoder_blocks=(4, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


def crops(sources: list[np.ndarray], shares: list[float], rng: np.random.Generator) -> Tensor:
    """A batch of random 64-pixel crops, float32 (B, 3, 64, 64) in [-1, 1]."""
    out = np.empty((BATCH, CROP, CROP, 3), np.uint8)
    which = rng.choice(len(sources), BATCH, p=np.array(shares) / sum(shares))
    for k, s in enumerate(which):
        image = sources[s][int(rng.integers(len(sources[s])))]
        y, x = rng.integers(0, image.shape[0] - CROP + 1, 2)
        piece = image[y : y + CROP, x : x + CROP]
        out[k] = piece[:, ::-1] if rng.uniform() < 0.5 else piece
    return (
        torch.from_numpy(out)
        .permute(0, 3, 1, 2)
        .float()
        .div_(127.5)
        .sub_(1)
        .contiguous(memory_format=torch.channels_last)
    )


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def image_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + squared error + L1 of the gradients at two scales: the last keep texture from blurring."""
    loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
    for scale in (1, 2):
        o, t = (F.avg_pool2d(v, scale) if scale > 1 else v for v in (output, target))
        loss = loss + sum(F.l1_loss(a, b) for a, b in zip(gradients(o), gradients(t), strict=True))
    return loss


def step_loss(vae: AutoencoderTiny, images: Tensor, shrink: bool, generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encoder(images)
    z = z.float()
    # Each channel near zero mean and unit variance, so that scheduler and noise fit it.
    moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
    target = images
    if shrink:
        z, target = F.avg_pool2d(z, 2), F.avg_pool2d(images, 2)
    z = z + NOISE * torch.randn(z.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae.decoder(z.contiguous(memory_format=torch.channels_last))
    return image_loss(output.float(), target) + 0.05 * moments


@torch.no_grad()
def reconstruct(vae: AutoencoderTiny, images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [0, 1], by encoding and decoding in float32."""
    out = []
    for k in range(0, len(images), 16):
        x = torch.from_numpy(np.array(images[k : k + 16])).permute(0, 3, 1, 2).float() / 127.5 - 1
        out.append((vae.decode(vae.encode(x).latents).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(out)


def fidelity(vae: AutoencoderTiny, images: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Mean per-image PSNR, PSNR on the garment, and the share of real power kept per band.

    Bands are rings of the radial power spectrum, in cycles per image; Nyquist is 64 at 128 pixels.
    """
    real = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    fake = reconstruct(vae, images)
    mask = torch.from_numpy(np.array(masks))[:, None].float() / 255
    error = (real - fake).square()
    psnr = (-10 * error.mean((1, 2, 3)).log10()).mean()
    inside = (error * mask).sum((1, 2, 3)) / (3 * mask.sum((1, 2, 3))).clamp(min=1)
    result = {"psnr": float(psnr), "psnr_garment": float((-10 * inside.clamp(min=1e-9).log10()).mean())}
    n = real.shape[-1]
    f = torch.fft.fftfreq(n) * n
    radius = torch.hypot(f[:, None], f[None, :])
    power = [torch.fft.fft2(v.mean(1)).abs().square().mean(0) for v in (fake, real)]
    for low, high in ((8, 16), (16, 24), (24, 32), (32, 40), (40, 48), (48, 64)):
        ring = (radius >= low) & (radius < high)
        result[f"power_{low}_{high}"] = float(power[0][ring].sum() / power[1][ring].sum())
    return result


def train(minutes: float, work: Path, weights: Path, photo_root: Path | None, seed: int = 0) -> None:
    """Train (or go on training) and write ``weights/vae``."""
    base, _ = recipe.base_data(work / "cache")
    target, target_val = recipe.target_data(work / "cache")
    real, _ = recipe.photos(photo_root)
    assert target.sources is not None
    sources = [base.images, target.images, target.sources] + ([real] if len(real) else [])
    shares = [0.45, 0.25, 0.12] + ([0.18] if len(real) else [])
    torch.manual_seed(seed)
    vae = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = Averaged({"vae": vae}, 0.999)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    schedule, state = Schedule(minutes, 1.2e-3), work / "autoencoder.safetensors"
    if state.exists():
        recipe.load_state(state, averaged, optimizer, schedule)
    else:
        recipe.warm_start(averaged, {"vae": weights / "vae" / "diffusion_pytorch_model.safetensors"})
    losses: list[float] = []
    while not schedule.finished:
        rate = schedule.tick()
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((seed, schedule.step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + schedule.step)
        loss = step_loss(vae, crops(sources, shares, rng), schedule.step % 8 == 0, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizer.step()
        averaged.update(schedule.step)
        losses.append(float(loss.detach()))
        if schedule.step % 200 == 0:
            console.print(f"{schedule.spent / 60:6.1f} min  step {schedule.step}  loss {np.mean(losses[-200:]):.4f}")
        if schedule.step % 1500 == 0 or schedule.finished:
            recipe.save_state(state, averaged, optimizer, schedule)
            averaged.swap()
            console.print(
                {k: round(v, 3) for k, v in fidelity(vae, target_val.images[:64], target_val.masks[:64]).items()}
            )
            averaged.swap()
    averaged.swap()
    vae.eval().half().save_pretrained(weights / "vae")
    config = weights / "vae" / "config.json"
    entries = json.loads(config.read_text(encoding="utf-8"))
    entries.pop("block_out_channels", None)  # diffusers writes it, then warns about it when it reads it
    config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    averaged.swap()
