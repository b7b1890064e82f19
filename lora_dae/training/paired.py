"""How source texture learns: on single noised pairs, towards the true bands.

Without a source this would be wrong: the error of a posterior mean cannot be lowered by putting texture back. The
source photo holds what that mean averages away, so the plain paired error is a right target, and a gate that opens
where the source does not belong pays for it at once. In a share of the batch the source is another sample's, and
there every opened gate costs. The decoder stage learns likewise in pixels, on decoded predictions and on
reconstructions, the latter without a source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dae.config import EnhancementConfig
from lora_dae.diffusion import add_noise, alpha_sigma, half_log_snr, is_sigma_space, predict_x0
from lora_dae.enhancement.bands import local_log_energy, split_bands
from lora_dae.enhancement.gates import WINDOW
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.sampling.loop import Conditions, Guidance, predict

_ENERGY_WEIGHT = 0.05  # of local log energies: L1 alone would rather blur what it cannot place
_EDGE_WEIGHT = 0.5


@dataclass(frozen=True)
class PairedDraws:
    """All that is random in one step; tensors of B values unless said."""

    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor
    step_size: Tensor  # h, in lambda
    first_order: Tensor
    wrong: Tensor  # bool: the module sees another sample's source
    guidance: float


def draw_paired(
    batch: dict[str, Tensor], scheduler: Any, cfg: EnhancementConfig, generator: torch.Generator
) -> PairedDraws:
    """Timesteps where the module acts, any step size and solver, guidance 1 for half of the steps."""
    shape, device = batch["latent_mean"].shape, batch["latent_mean"].device
    n = shape[0]
    every = torch.arange(int(scheduler.config.num_train_timesteps))
    alpha, sigma = alpha_sigma(scheduler, every, torch.zeros(len(every), 1, 1, 1))
    active = (half_log_snr(alpha, sigma).flatten() > WINDOW[0]).nonzero().flatten()
    guided = float(torch.rand((), generator=generator)) < 0.5
    scale = 1 + (min(cfg.guidance_range[1], 3.0) - 1) * float(torch.rand((), generator=generator))
    return PairedDraws(
        noise=torch.randn(shape, generator=generator).to(device),
        timesteps=active[torch.randint(len(active), (n,), generator=generator)].to(device),
        step_size=-(1 - torch.empty(n).uniform_(0.1, 0.99, generator=generator)).log().to(device),
        first_order=torch.randint(2, (n,), generator=generator).float().to(device),
        wrong=(torch.rand(n, generator=generator) < cfg.wrong_source).to(device),
        guidance=scale if guided else 1.0,
    )


def texture_loss(
    unet: nn.Module,
    scheduler: Any,
    module: EnhancementModule,
    batch: dict[str, Tensor],
    null_text: Tensor,
    draws: PairedDraws,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, the same without the module, edited x0): errors of x0's bands, each in units of the band's energy.

    The network sees the right source always: gates must learn to tell a wrong one from the image itself.
    """
    assert module.texture is not None
    clean = batch["latent_mean"]
    alpha, sigma = alpha_sigma(scheduler, draws.timesteps, clean)
    noisy = add_noise(clean, draws.noise, alpha, sigma)
    conditions = Conditions(batch["text"], null_text, batch["source"])
    with torch.no_grad():
        guided, _ = predict(unet, noisy, draws.timesteps, conditions, Guidance(draws.guidance, draws.guidance))
        prediction_type = scheduler.config.prediction_type
        x0 = predict_x0(guided.float(), noisy, alpha, sigma, prediction_type, is_sigma_space(scheduler))
    given = swapped(batch["source"], draws.wrong)
    blend = module.blend(x0, given, alpha, sigma, draws.step_size, draws.first_order)
    edited = x0 + blend.delta
    energies = [band.square().mean() + 1e-6 for band in split_bands(clean, module.levels)[0]]

    def error(x: Tensor) -> Tensor:
        bands = split_bands(x - clean, module.levels)[0]
        return torch.stack([b.square().mean() / e for b, e in zip(bands, energies, strict=True)]).sum()

    return error(edited), error(x0.detach()), edited.detach()


def decoder_loss(
    module: EnhancementModule, decoded: Tensor, real: Tensor, source: Tensor | None, wrong: Tensor | None
) -> Tensor:
    """Band errors (L1, in units of each band's own size), local log energies and edges; images (B, 3, H, W) in [0, 1].

    ``source`` None: what reconstructions lack, and a decoded image without any source.
    """
    assert module.decoder is not None
    given = source if source is None or wrong is None else swapped(source, wrong)
    x, target = decoded * 2 - 1, real * 2 - 1
    edited = x + module.decoder(x, None if given is None else given * 2 - 1).delta
    bands, true = split_bands(edited, module.levels)[0], split_bands(target, module.levels)[0]
    pairs = list(zip(bands, true, strict=True))
    fidelity = torch.stack([(b - t).abs().mean() / (t.abs().mean() + 1e-4) for b, t in pairs]).sum()
    energy = (local_log_energy(bands) - local_log_energy(true)).abs().mean()
    true_edges = gradient_magnitude(target)
    edges = (gradient_magnitude(edited) - true_edges).abs().mean() / (true_edges.mean() + 1e-4)
    return fidelity + _ENERGY_WEIGHT * energy + _EDGE_WEIGHT * edges


def gradient_magnitude(x: Tensor) -> Tensor:
    """Length of the brightness gradient, (B, H - 1, W - 1), by forward differences of the channels' mean."""
    gray = x.mean(1)
    down, right = gray[:, 1:, :-1] - gray[:, :-1, :-1], gray[:, :-1, 1:] - gray[:, :-1, :-1]
    return (down.square() + right.square() + 1e-8).sqrt()


def swapped(source: Tensor, wrong: Tensor) -> Tensor:
    """``source`` (B, ...), the next sample's where ``wrong`` (B,) says so."""
    return torch.where(wrong.view(-1, *[1] * (source.ndim - 1)), source.roll(1, 0), source)
