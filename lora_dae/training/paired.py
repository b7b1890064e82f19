"""How source texture and the decoder stage learn: on single noised pairs, towards the true bands.

Without a source this would be wrong: the error of a posterior mean cannot be lowered by putting texture back. The
source photo holds what that mean averages away, so the plain paired error is a right target, and a gate that opens
where the source does not belong pays for it at once. In a share of the batch the source is another sample's, and
there every opened gate costs. Registered sources (registration.py) need more: a network that reads nothing from
photos that are not in place draws the right garment with a texture of its own, which no noised photo shows. So in
most of those batches' pairs, where the moved source shows the garment, the noised photo has another sample's texture:
what the gates see agrees in color only, as in a chain, and what they are to bring back is the photo's. The decoder
stage learns after it and likewise in pixels, on decoded predictions near the end of a chain and on reconstructions,
the latter without a source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_dae.config import LOSSES, EnhancementConfig
from lora_dae.diffusion import add_noise, alpha_sigma, half_log_snr, is_sigma_space, predict_x0, snr
from lora_dae.enhancement.bands import local_log_energy, noise_variances, split_bands
from lora_dae.enhancement.gates import WINDOW
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.registration import Encode, Preview, agreeing, move, register, shown_where
from lora_dae.sampling.loop import Conditions, Guidance, predict
from lora_dae.training.objective import Denoised, Photos, photos_of, to_device
from lora_dae.training.on_policy import draw_guidance

Decode = Callable[[Tensor], Tensor]
Gather = Callable[[Tensor], Tensor]
# Constants, not the batch's own sizes, so that any number of processes trains the same.
_FIDELITY_WEIGHT = 20.0  # bands of photos in [-1, 1] are about 0.05 large
_ENERGY_WEIGHT = 0.05  # of local log energies: L1 alone would rather blur what it cannot place
_EDGE_WEIGHT = 10.0
_FOREIGN = 0.7  # share of the pairs with registered sources whose garment is noised with another one's texture
_MISPLACED = (0.003, 0.003, 0.01, 0.01)  # spread of what is added to their motion: in a chain it is found less well
LATE = 0.4  # share of the timesteps, from the clean end, whose predictions a decoder sees


@dataclass(frozen=True)
class PairedDraws:
    """All that is random in one step; tensors of B values unless said."""

    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor
    step_size: Tensor  # h, in lambda
    first_order: Tensor
    wrong: Tensor  # bool: the module sees another sample's source
    guidance: Guidance
    turn: int  # number of the batch among those of all processes
    foreign: Tensor | None = None  # of registered sources; bool: the garment is noised with another sample's texture
    misplaced: Tensor | None = None  # of those; (B, 4), added to their motion


def draw_paired(
    batch: dict[str, Tensor],
    scheduler: Any,
    cfg: EnhancementConfig,
    shared: torch.Generator,
    generators: Sequence[torch.Generator],
    turn: int,
    share: float = 1.0,
) -> PairedDraws:
    """Timesteps where the module acts, any step size and solver, no guidance for half of the steps.

    Guidance from ``shared``, which all processes have to give alike; the rest from one generator per sample. ``turn``:
    number of the batch among those of all processes. ``share`` of the timesteps, from the clean end.
    """
    shape, device = batch["latent_mean"].shape[1:], batch["latent_mean"].device
    every = torch.arange(int(scheduler.config.num_train_timesteps))
    alpha, sigma = alpha_sigma(scheduler, every, torch.zeros(len(every), 1, 1, 1))
    active = (half_log_snr(alpha, sigma).flatten() > WINDOW[0]).nonzero().flatten()  # from the clean end on
    guided = float(torch.rand((), generator=shared)) < 0.5
    guidance = draw_guidance(cfg, shared, has_source=True)
    noise = torch.stack([torch.randn(shape, generator=own) for own in generators])
    chances = torch.stack([torch.rand(4, generator=own) for own in generators])
    wrong = chances[:, 3] < cfg.wrong_source
    foreign = misplaced = None
    if cfg.registered:
        more = torch.stack([torch.randn(4, generator=own) for own in generators]) * torch.tensor(_MISPLACED)
        painted = torch.stack([torch.rand((), generator=own) for own in generators]) < _FOREIGN
        foreign, misplaced = to_device(painted & ~wrong, device), to_device(more, device)
    return PairedDraws(
        noise=to_device(noise, device),
        timesteps=to_device(active[(chances[:, 0] * share * len(active)).long()], device),
        step_size=to_device(-(0.01 + 0.89 * chances[:, 1]).log(), device),
        first_order=to_device((chances[:, 2] < 0.5).float(), device),
        wrong=to_device(wrong, device),
        guidance=guidance if guided else Guidance(),
        turn=turn,
        foreign=foreign,
        misplaced=misplaced,
    )


def texture_loss(
    unet: nn.Module,
    scheduler: Any,
    module: EnhancementModule,
    batch: dict[str, Tensor],
    null_text: Tensor,
    draws: PairedDraws,
    gather: Gather = lambda own: own,
    photos: Photos | None = None,
    encode: Encode | None = None,
) -> Tensor:
    """Errors of x0's bands, each in units of white noise, over those without the module: 1 where it does nothing.

    A share, for a step's errors grow with its guidance: else the strongest alone would be learned from. The network
    sees the right source always: gates must learn to tell a wrong one from the image itself. A module that registers
    sources needs ``photos`` and ``encode``.
    """
    assert module.texture is not None
    clean, shown, trust = batch["latent_mean"], batch, None
    if module.preview is None:
        given = swapped(batch["source"], draws.wrong, draws.turn, gather)
    else:
        assert photos is not None and encode is not None and draws.foreign is not None
        _, source = photos_of(batch, photos)
        assert source is not None
        given, _, trust, sure = _registered(module.preview, batch, source, draws, encode, gather)
        others = swapped(clean, draws.foreign, draws.turn, gather) - clean
        painted = clean + sure * split_bands(others, module.levels)[0].sum(0)
        shown = {**batch, "latent_mean": painted}
    x0, x0_cond, alpha, sigma = _predicted(unet, scheduler, shown, null_text, draws)
    edited = x0 + module.blend(x0, x0_cond, given, alpha, sigma, draws.step_size, draws.first_order, trust).delta

    def error(x: Tensor) -> Tensor:
        bands = split_bands(x - clean, module.levels)[0]
        variances = noise_variances(module.levels)
        return torch.stack([b.square().mean((1, 2, 3)) / v for b, v in zip(bands, variances, strict=True)]).sum(0)

    return error(edited).mean() / gather(error(x0)).mean()  # of all processes, so that any number trains the same


def joint_loss(
    scheduler: Any,
    module: EnhancementModule,
    batch: dict[str, Tensor],
    denoised: Denoised,
    draws: PairedDraws,
    min_snr_gamma: float,
    gather: Gather = lambda own: own,
) -> Tensor:
    """Texture's error of each sample, (B,), on what the adapter predicts in its own step: both learn from it.

    An ablation. 0 where the module does not act; weighted as the adapter's own error is, so that neither outweighs the
    other: an error of x0 counts as that of the noise up to min(SNR, ``min_snr_gamma``).
    """
    assert module.texture is not None
    prediction_type, alpha, sigma = scheduler.config.prediction_type, denoised.alpha, denoised.sigma
    x0 = predict_x0(denoised.output, denoised.noisy, alpha, sigma, prediction_type, is_sigma_space(scheduler))
    given = swapped(batch["source"], draws.wrong, draws.turn, gather)
    edited = x0 + module.blend(x0, x0, given, alpha, sigma, draws.step_size, draws.first_order).delta
    bands = split_bands(edited - batch["latent_mean"], module.levels)[0]
    error = torch.stack([b.square().mean((1, 2, 3)) for b in bands]).sum(0)
    ratio = snr(alpha, sigma).flatten()
    weight = ratio.clamp(max=min_snr_gamma) if min_snr_gamma > 0 else ratio
    active = half_log_snr(alpha, sigma).flatten() > WINDOW[0]
    return torch.where(active, error * weight, 0.0)


def refining_loss(
    unet: nn.Module,
    scheduler: Any,
    module: EnhancementModule,
    batch: dict[str, Tensor],
    null_text: Tensor,
    draws: PairedDraws,
    photos: Photos,
    decode: Decode,
    gather: Gather = lambda own: own,
    losses: Collection[str] = LOSSES,
    encode: Encode | None = None,
) -> Tensor:
    """The decoder stage's loss, on decoded predictions (with source texture, as it is) and on reconstructions.

    ``photos`` gives the real and source photos of samples by number, ``decode`` the images of latents. ``losses``: as
    ``decoder_loss``; ``encode``: for a module that registers sources.
    """
    clean = batch["latent_mean"]
    real, source = photos_of(batch, photos)
    if source is None:
        with torch.no_grad():
            decoded = decode(clean).float()
        return decoder_loss(module, decoded, real, None, losses)
    trust = None
    if module.preview is None:
        given, seen = (swapped(x, draws.wrong, draws.turn, gather) for x in (batch["source"], source))
    else:
        assert encode is not None
        given, seen, trust, _ = _registered(module.preview, batch, source, draws, encode, gather)
    with torch.no_grad():
        x0, x0_cond, alpha, sigma = _predicted(unet, scheduler, batch, null_text, draws)
        if module.texture is not None:
            blend = module.blend(x0, x0_cond, given, alpha, sigma, draws.step_size, draws.first_order, trust)
            x0 = x0 + blend.delta
        predicted, decoded = decode(torch.cat([x0, clean])).float().chunk(2)
    # Reconstructions without a source keep the stage right for text alone.
    of_predictions = decoder_loss(module, predicted, real, seen, losses, trust)
    return of_predictions + decoder_loss(module, decoded, real, None, losses)


@torch.no_grad()
def _registered(
    preview: Preview, batch: dict[str, Tensor], source: Tensor, draws: PairedDraws, encode: Encode, gather: Gather
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sources that the module sees, moved to the real photos' garments: latents, photos, where (B, 1, h, w)
    they are to be trusted, and where they surely show the same."""
    assert draws.misplaced is not None
    latents, photos = (swapped(x, draws.wrong, draws.turn, gather) for x in (batch["source"], source))
    target, given = preview(batch["latent_mean"]), preview(latents)
    motion = register(target, given)
    moved = move(photos, motion + draws.misplaced)
    return encode(moved).float(), moved, *shown_where(target, agreeing(target, given, motion)[0])


@torch.no_grad()
def _predicted(
    unet: nn.Module, scheduler: Any, batch: dict[str, Tensor], null_text: Tensor, draws: PairedDraws
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 as the network predicts it, guided and not (one object without guidance), alpha and sigma of the noise."""
    clean = batch["latent_mean"]
    alpha, sigma = alpha_sigma(scheduler, draws.timesteps, clean)
    noisy = add_noise(clean, draws.noise, alpha, sigma)
    conditions = Conditions(batch["text"], null_text, batch.get("source"))
    outputs = predict(unet, noisy, draws.timesteps, conditions, draws.guidance)
    prediction_type, sigma_space = scheduler.config.prediction_type, is_sigma_space(scheduler)
    x0, x0_cond = (predict_x0(output, noisy, alpha, sigma, prediction_type, sigma_space) for output in outputs)
    return x0, x0 if outputs[0] is outputs[1] else x0_cond, alpha, sigma


def decoder_loss(
    module: EnhancementModule,
    decoded: Tensor,
    real: Tensor,
    source: Tensor | None,
    losses: Collection[str] = LOSSES,
    trust: Tensor | None = None,
) -> Tensor:
    """L1 of the bands, of their local log energies and of edges; images (B, 3, H, W) in [0, 1].

    Of the last two those that ``losses`` names (energy, edges).
    """
    assert module.decoder is not None
    x, target = decoded * 2 - 1, real * 2 - 1
    edited = x + module.decoder(x, None if source is None else source * 2 - 1, trust=trust).delta
    bands, true = (split_bands(image, module.levels)[0] for image in (edited, target))
    fidelity = torch.stack([(b - t).abs().mean() for b, t in zip(bands, true, strict=True)]).sum()
    total = _FIDELITY_WEIGHT * fidelity
    if "energy" in losses:
        total = total + _ENERGY_WEIGHT * (local_log_energy(bands) - local_log_energy(true)).abs().mean()
    if "edges" in losses:
        total = total + _EDGE_WEIGHT * (gradient_magnitude(edited) - gradient_magnitude(target)).abs().mean()
    return total


def gradient_magnitude(x: Tensor) -> Tensor:
    """Length of the brightness gradient, (B, H - 1, W - 1), by forward differences of the channels' mean."""
    gray = x.mean(1)
    down, right = gray[:, 1:, :-1] - gray[:, :-1, :-1], gray[:, :-1, 1:] - gray[:, :-1, :-1]
    return (down.square() + right.square() + 1e-8).sqrt()


def swapped(source: Tensor, wrong: Tensor, turn: int = 0, gather: Gather = lambda own: own) -> Tensor:
    """``source`` (B, ...), the next sample's of the step where ``wrong`` (B,) says so.

    ``turn``: the batch's number, which tells its place among the batches of all processes.
    """
    everyone = gather(source)
    processes = len(everyone) // len(source)
    start = turn % processes * len(source)
    following = everyone.roll(-1, 0)[start : start + len(source)]
    return torch.where(wrong.view(-1, *[1] * (source.ndim - 1)), following, source)
