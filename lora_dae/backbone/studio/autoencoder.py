"""Step 1 of the recipe: an AutoencoderTiny with a fixed linear encoder and a trained decoder.

The encoder is the 16 principal components of 4x4 pixels (they hold 34 dB and 94 % of the power up to 3/4 of
Nyquist, where 12 hold 31 dB and 71 %), written into AutoencoderTiny's own convolutions. Being linear, it makes
shrunk latents those of the shrunk picture; being fixed, it lets the decoder be trained further
without touching a denoiser that stands. Decoder: L1, squared error and gradient losses, no adversarial part.
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
from lora_dae.backbone.studio.recipe import Averaged, Optimizer, Schedule, console

CROP, BATCH = 64, 16
LATENT_CHANNELS, FACTOR = 16, 4
NOISE = 0.05  # standard deviation of the noise on the latents, whose mean variance is 1
# 1 leaves the components as strong as they are, 0 makes all equally strong. Between: coarse ones matter more to
# the denoiser's loss, yet fine ones are not lost in the noise of a sampler's last step.
STRENGTH = 0.3


def build() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(64, 64, 64),
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(4, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
    )


@torch.no_grad()
def fit_encoder(vae: AutoencoderTiny, images: np.ndarray) -> None:
    """Write the principal components of 4x4 patches into the encoder, and freeze it.

    images: uint8 (N, H, W, 3). Two stride-2 convolutions gather the 48 numbers of a patch, the last one projects
    them; each component is scaled so that the variances' mean is 1 (see ``STRENGTH``).
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255  # the encoder's own input range
    patches = F.pixel_unshuffle(pixels, FACTOR).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    variance, vectors = torch.linalg.eigh(torch.cov(patches.T))
    variance, vectors = variance.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS]
    vectors = vectors * vectors.sum(0).sign()  # the sign of an eigenvector is arbitrary: fix it
    scale = variance.sqrt() ** (STRENGTH - 1)
    scale = scale / (variance * scale**2).mean().sqrt()
    projection = ((vectors * scale).T).float()
    copy, *gathers, project = vae.encoder.layers
    for conv in vae.encoder.layers:
        conv.weight.zero_()
    copy.bias.zero_()
    copy.weight[range(3), range(3), 1, 1] = 1
    for conv, n in zip(gathers, (3, 12), strict=True):
        for out in range(4 * n):
            # The order of F.pixel_unshuffle: channel, row, column. Kernel index 1 is the even pixel, 2 the odd one.
            conv.weight[out, out // 4, 1 + out % 4 // 2, 1 + out % 2] = 1
    order = F.pixel_unshuffle(F.pixel_unshuffle(torch.arange(48.0).view(1, 3, 4, 4), 2), 2).flatten().long()
    inverse = F.pixel_unshuffle(torch.arange(48.0).view(1, 3, 4, 4), FACTOR).flatten().long()
    position = {int(p): k for k, p in enumerate(inverse)}
    project.weight[:, :, 1, 1] = projection[:, [position[int(p)] for p in order]]
    project.bias.copy_(-(projection.double() @ mean))
    vae.encoder.requires_grad_(False)


def crops(sources: list[np.ndarray], shares: list[float], rng: np.random.Generator) -> Tensor:
    """A batch of random 64-pixel crops, float32 (B, 3, 64, 64) in [-1, 1]."""
    out = np.empty((BATCH, CROP, CROP, 3), np.uint8)
    which = rng.choice(len(sources), BATCH, p=np.array(shares) / sum(shares))
    for k, s in enumerate(which):
        image = sources[s][int(rng.integers(len(sources[s])))]
        y, x = FACTOR * rng.integers(0, (image.shape[0] - CROP) // FACTOR + 1, 2)
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


def step_loss(vae: AutoencoderTiny, images: Tensor, generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        z = vae.encoder(images)
    z = z + NOISE * torch.randn(z.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        output = vae.decoder(z.contiguous(memory_format=torch.channels_last))
    return image_loss(output.float(), images)


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
    vae = build()
    averaged = Averaged({"vae": vae}, 0.999)
    if not recipe.warm_start(averaged, {"vae": weights / "vae" / "diffusion_pytorch_model.safetensors"}):
        fit_encoder(vae, np.concatenate([part[:: max(1, len(part) // 500)] for part in sources]))
        averaged = Averaged({"vae": vae}, 0.999)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae.encoder.requires_grad_(False)
    optimizer = Optimizer(dict(vae.decoder.named_parameters(prefix="vae.decoder")), 5e-3, 1.5e-3, 1e-4)
    schedule, state = Schedule(minutes), work / "autoencoder.safetensors"
    if state.exists():
        recipe.load_state(state, averaged, optimizer, schedule)
    losses: list[float] = []
    while not schedule.finished:
        share = schedule.tick()
        rng = np.random.default_rng((seed, schedule.step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + schedule.step)
        loss = step_loss(vae, crops(sources, shares, rng), generator)
        loss.backward()
        optimizer.step(share, clip=0.5)
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
