"""Does a run's model lack texture, where, and do its pairs match? What the enhancement can and cannot repair.

Teacher-forced (really noised photos): per band the slope <x0, x0^> / <x0^, x0^>, 1 for a calibrated network and above
1 for one that smooths too much, and the missing energy 1 - |x0^|^2 / (|x0|^2 - |x0 - x0^|^2), 0 for a posterior mean.
On-policy (the sampler's own states): each band's energy against really noised photos at the level that a step reached,
an identity of the forward process. With a source photo: how sure its matches are, on the garment and beside it, and
whether the gates tell it from another pair's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from lora_dae.config import ConfigError
from lora_dae.data.sources import load_split
from lora_dae.diffusion import add_noise, alpha_sigma, is_sigma_space, predict_x0
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.gates import WINDOW
from lora_dae.enhancement.hook import GateInputs, enhance_scheduler, gate_inputs
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.registration import RegisteredSource
from lora_dae.enhancement.texture import Blend, in_places
from lora_dae.evaluation.diagnosis import SHOWN, Diagnosis, as_table, plot_energies, plot_matches
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.sampling.draw import FRESH, as_photos
from lora_dae.sampling.load import LoadedRun, load_run
from lora_dae.sampling.loop import (
    Conditions,
    Guidance,
    initial_noise,
    noise_generator,
    predict,
    sample_latents,
)
from lora_dae.sampling.method import Method, Step
from lora_dae.sampling.schedulers import build_scheduler

LEVELS = 3
_TIMES = (50, 120, 200, 300, 400, 500, 600, 700, 800)  # of 1000


def calibration_slope(x0: Tensor, predicted: Tensor) -> float:
    """<x0, x0^> / <x0^, x0^> over all elements; 1 = calibrated, 1 / c for a prediction shrunk by c."""
    return float((x0 * predicted).sum() / predicted.square().sum().clamp_min(1e-12))


def missing_energy(x0: Tensor, predicted: Tensor) -> float:
    """1 - |x0^|^2 / (|x0|^2 - |x0 - x0^|^2); 0 for a posterior mean, 1 - c / (2 - c) for one shrunk by c."""
    explained = x0.square().sum() - (x0 - predicted).square().sum()
    return float(1 - predicted.square().sum() / explained.clamp_min(1e-12))


@torch.no_grad()
def diagnose(
    run_dir: Path,
    console: Console,
    split: str = "val",
    num_samples: int = 64,
    bf16: bool = False,
    device: str | torch.device = "cpu",
) -> Path:
    """Diagnose a finished run on ``split``; writes ``diagnosis/`` into its folder and returns that.

    Raises ConfigError for a folder that is no finished run.
    """
    run = load_run(run_dir, device)
    held_out = HeldOut.take(load_split(run.cfg.data, split), num_samples, run.cfg.conditioning)
    if len({p.image.shape for p in held_out.pairs}) > 1:
        raise ConfigError("diagnose needs photos of one size: leave data.buckets empty.")
    latents = run.backbone.encode_images(np.stack([p.image for p in held_out.pairs]))[0].float()
    sources = held_out.sources
    source = None if sources is None else run.backbone.encode_images(sources)[0].float()
    text = run.backbone.encode_text(["", *held_out.captions])
    conditions = Conditions(text[1:], text[0], source)
    with run.drawer(bf16).precision():
        slope, missing = _teacher_forced(run, latents, conditions)
        energy, plain, steps = _on_policy(run, latents, conditions, sources)
    maps = _matches(run, plain, source, conditions.text, sources)
    output = run_dir / "diagnosis"
    output.mkdir(exist_ok=True)
    gates = None if maps is None else told_apart(maps["gate"], maps.pop("with another's"))
    found = Diagnosis(list(_TIMES), slope, missing, steps, energy, _confidence(maps, held_out.masks), gates)
    (output / "diagnosis.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    plot_energies(found, output / "energy.png")
    if maps is not None and sources is not None:
        plot_matches(
            sources, run.backbone.decode(torch.cat([step.x0 for step in plain])[:SHOWN]), maps, output / "matches.png"
        )
    console.print(as_table(found))
    for sentence in found.verdict():
        console.print(sentence, soft_wrap=True, highlight=False)
    console.print(f"pictures {output}", soft_wrap=True, highlight=False)
    return output


def _teacher_forced(
    run: LoadedRun, latents: Tensor, conditions: Conditions
) -> tuple[list[list[float]], list[list[float]]]:
    scheduler = run.backbone.scheduler
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    slope, missing = [], []
    true = split_bands(latents, LEVELS)[0]
    for t in _TIMES:
        predicted = []
        for at, some in _batches(run, conditions):
            timesteps = torch.full((len(some.text),), t, device=latents.device)
            alpha, sigma = alpha_sigma(scheduler, timesteps, latents[at])
            noisy = add_noise(latents[at], noise[at], alpha, sigma)
            output = predict(run.backbone.unet, noisy, timesteps, some, Guidance())[0]
            prediction_type = scheduler.config.prediction_type
            predicted.append(predict_x0(output, noisy, alpha, sigma, prediction_type, is_sigma_space(scheduler)))
        bands = list(zip(true, split_bands(torch.cat(predicted), LEVELS)[0], strict=True))
        slope.append([calibration_slope(a, b) for a, b in bands])
        missing.append([missing_energy(a, b) for a, b in bands])
    return slope, missing


def _batches(run: LoadedRun, conditions: Conditions) -> Iterator[tuple[slice, Conditions]]:
    """As many pairs at once as the run draws at once."""
    size, source = run.cfg.sampling.batch_size, conditions.source
    for k in range(0, len(conditions.text), size):
        at = slice(k, k + size)
        yield at, Conditions(conditions.text[at], conditions.null_text, None if source is None else source[at])


class Watch(Method):
    """Changes nothing; keeps energies of reached and really noised states, and the step where gates are first on.

    The last step, where they never are.
    """

    def __init__(self, latents: Tensor, noise: Tensor) -> None:
        self.latents, self.noise = latents, noise
        self.energies: list[Tensor] = []  # of each step, (bands, reached and real)
        self.first: GateInputs | None = None  # what gates see there: later the picture has a texture of its own
        self.on = False

    def guide(self, step: Step) -> Tensor:
        guided = super().guide(step)
        alpha, sigma = step.level
        if not self.on:
            self.first = gate_inputs(step.scheduler, guided, step.timestep, step.sample, step.conditional)
            self.on = alpha >= sigma * math.exp(WINDOW[1])
        return guided

    def after(self, step: Step, guided: Tensor, reached: Tensor, level: tuple[float, float]) -> Tensor:
        reference = add_noise(self.latents, self.noise, *level)
        both = [split_bands(x, LEVELS)[0].cpu().double().square().flatten(1).sum(1) for x in (reached, reference)]
        self.energies.append(torch.stack(both, dim=1))
        return reached


def _on_policy(
    run: LoadedRun, latents: Tensor, conditions: Conditions, sources: np.ndarray | None
) -> tuple[dict[str, list[list[float]]], list[GateInputs], list[int]]:
    """Energies by strength, the step of each batch where gates are first on, at strength 0, timesteps."""
    cfg, backbone = run.cfg, run.backbone
    strengths = [0.0]
    if run.enhancement is not None and run.enhancement.acts_on_latents and cfg.enhancement.strength > 0:
        strengths.append(cfg.enhancement.strength)
    channels, height, width = latents.shape[1:]
    start = initial_noise(cfg.sampling.seed, list(range(len(latents))), (channels, height, width)).to(latents)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents)
    guidance = Guidance(cfg.sampling.guidance_scale, cfg.sampling.source_guidance_scale)
    energy: dict[str, list[list[float]]] = {}
    plain: list[GateInputs] = []
    steps: list[int] = []
    for strength in strengths:
        total: Tensor | float = 0.0
        for at, some in _batches(run, conditions):
            scheduler = build_scheduler(cfg.sampling.scheduler, backbone.scheduler)
            if strength > 0:
                assert run.enhancement is not None
                trust = run.enhancement.trust(some.text, some.source)
                placed = None if sources is None else _registering(run, sources[at], some.source)
                scheduler = enhance_scheduler(
                    scheduler, run.enhancement, strength, cfg.enhancement.placement, placed or some.source, trust
                )
            watch, count = Watch(latents[at], noise[at]), cfg.sampling.num_inference_steps
            own = [noise_generator(cfg.sampling.seed + FRESH, k) for k in range(*at.indices(len(latents)))]
            sample_latents(backbone.unet, scheduler, start[at], some, guidance, count, watch, own)
            steps = [int(t) for t in scheduler.timesteps]
            total = total + torch.stack(watch.energies)
            if strength == 0:
                assert watch.first is not None
                plain.append(watch.first)
        assert isinstance(total, Tensor)
        energy[f"strength {strength:g}"] = (total[:, :, 0] / total[:, :, 1]).tolist()
    return energy, plain, steps


def _registering(run: LoadedRun, sources: np.ndarray, latents: Tensor | None) -> RegisteredSource | None:
    photos = as_photos(sources)
    if run.enhancement is None or photos is None or latents is None:
        return None
    return run.enhancement.registering(photos, latents, run.drawer(False).encode)


def _matches(
    run: LoadedRun, plain: list[GateInputs], source: Tensor | None, text: Tensor, photos: np.ndarray | None
) -> dict[str, Tensor] | None:
    """Maps (N, h, w) of what the module makes of the first step where gates are on, at strength 0.

    Confidence, displacement in latents, the finest band's gate, and the same gate with the next pair's source.
    """
    module = run.enhancement
    if module is None or module.texture is None or source is None or photos is None:
        return None
    found: dict[str, list[Tensor]] = {"confidence": [], "displacement": [], "gate": [], "with another's": []}
    both, first = ((source, photos), (source.roll(-1, 0), np.roll(photos, -1, 0))), 0
    for step in plain:
        at = slice(first, first + len(step.x0))
        first += len(step.x0)
        of_step = []
        for latents, images in both:
            placed = _registering(run, images[at], latents[at])
            of_step.append((*_blended(module, step, latents[at], text[at], placed), placed))
        own, gate, placed = of_step[0]
        match = own.match if placed is None else placed.match(step.x0)
        assert match is not None
        found["confidence"].append(match.confidence[:, 0])
        found["displacement"].append(match.flow.square().sum(1).sqrt())
        found["gate"].append(gate)
        found["with another's"].append(of_step[1][1])
    return {name: torch.cat(parts) for name, parts in found.items()}


def _blended(
    module: EnhancementModule, step: GateInputs, source: Tensor, text: Tensor, placed: RegisteredSource | None
) -> tuple[Blend, Tensor]:
    """What source texture does there, and the finest band's gate (N, h, w), with what the captions say."""
    trust = module.trust(text, source)
    if placed is not None:
        source = placed.at(step.x0, step.sigma / step.alpha)
        trust = placed.trusted(trust)
    blend = module.blend(step.x0, step.x0_cond, source, step.alpha, step.sigma, step.h, step.first_order, trust)
    assert blend.gates is not None
    return blend, blend.gates[:, 0] if trust is None else (blend.gates[:, :1] * in_places(trust, blend.gates))[:, 0]


def told_apart(own: Tensor, other: Tensor) -> dict[str, float]:
    """``Diagnosis.gates`` of two maps (N, h, w)."""
    means = [x.double().mean((1, 2)) for x in (own, other)]
    more = means[0] - means[1]
    half = 1.96 * float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else math.inf
    middle = float(more.mean())
    return {
        "own": float(means[0].mean()), "other": float(means[1].mean()), "low": middle - half, "high": middle + half
    }  # fmt: skip


def _confidence(maps: dict[str, Tensor] | None, masks: Tensor | None) -> dict[str, float] | None:
    if maps is None or masks is None:
        return None
    sure = maps["confidence"]
    inside = functional.interpolate(masks[:, None].float(), sure.shape[1:], mode="area")[:, 0].to(sure)
    inside = inside / inside.amax().clamp_min(1e-6)
    beside = 1 - inside
    return {
        "garment": float((sure * inside).sum() / inside.sum().clamp_min(1e-6)),
        "beside": float((sure * beside).sum() / beside.sum().clamp_min(1e-6)),
    }
