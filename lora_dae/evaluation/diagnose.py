"""Does a run's model lack texture, where, and do its pairs match? What the enhancement can and cannot repair.

Teacher-forced (really noised photos): per band the slope <x0, x0^> / <x0^, x0^>, 1 for a calibrated network and above
1 for one that smooths too much, and the missing energy 1 - |x0^|^2 / (|x0|^2 - |x0 - x0^|^2), 0 for a posterior mean.
On-policy (the sampler's own states): each band's energy against really noised photos at the level that a step reached,
an identity of the forward process. With a source photo: how sure its matches are, on the garment and beside it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from lora_dae.config import ConfigError
from lora_dae.data.sources import load_splits
from lora_dae.diffusion import add_noise, alpha_sigma, current_level, is_sigma_space, predict_x0
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.hook import enhance_scheduler
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.report.plots import INK, PALETTE, STYLE
from lora_dae.sampling.load import LoadedRun, load_run
from lora_dae.sampling.loop import Conditions, Guidance, initial_noise, predict, sample_latents
from lora_dae.sampling.method import Method, Step
from lora_dae.sampling.schedulers import build_scheduler

LEVELS = 3
BANDS = ("fine", "middle", "coarse")
_TIMES = (50, 120, 200, 300, 400, 500, 600, 700, 800)  # of 1000
_SHOWN = 6


@dataclass(frozen=True)
class Diagnosis:
    """Lists over timesteps or steps of one number per band, finest first."""

    timesteps: list[int]
    slope: list[list[float]]
    missing: list[list[float]]
    steps: list[int]  # timestep that each step left
    energy: dict[str, list[list[float]]]  # by row, the state's energy over that of really noised photos
    confidence: dict[str, float] | None  # of the matches: "garment", "beside"

    def verdict(self) -> list[str]:
        """What a user should know, in sentences."""
        sentences = []
        for name, ratios in self.energy.items():
            said = [f"{band} {ratio:.2f}" for band, ratio in zip(BANDS, ratios[-1], strict=True)]
            few = [band for band, ratio in zip(BANDS, ratios[-1], strict=True) if ratio < 0.9]
            many = [band for band, ratio in zip(BANDS, ratios[-1], strict=True) if ratio > 1.1]
            found = [f"lacks texture ({', '.join(few)})"] * bool(few) + [f"has too much ({', '.join(many)})"] * bool(
                many
            )
            what = " and ".join(found) or "is right"
            sentences.append(f"{name}: final energy over that of real photos {', '.join(said)}: {what}.")
        if self.confidence is not None:
            on, beside = self.confidence["garment"], self.confidence["beside"]
            sentences.append(f"matches: confidence {on:.2f} on the garment, {beside:.2f} beside it.")
        return sentences


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
    held_out = HeldOut.take(load_splits(run.cfg.data)[split], num_samples, run.cfg.conditioning)
    if len({p.image.shape for p in held_out.pairs}) > 1:
        raise ConfigError("diagnose needs photos of one size: leave data.buckets empty.")
    with torch.autocast(run.backbone.device.type, torch.bfloat16, enabled=bf16):
        latents = run.backbone.encode_images(np.stack([p.image for p in held_out.pairs]))[0].float()
        sources = held_out.sources
        source = None if sources is None else run.backbone.encode_images(sources)[0].float()
        text = run.backbone.encode_text(["", *held_out.captions])
        conditions = Conditions(text[1:], text[0], source)
        slope, missing = _teacher_forced(run, latents, conditions)
        energy, final, steps = _on_policy(run, latents, conditions)
        maps = _matches(run, final, conditions)
    output = run_dir / "diagnosis"
    output.mkdir(exist_ok=True)
    found = Diagnosis(list(_TIMES), slope, missing, steps, energy, _confidence(maps, held_out.masks))
    (output / "diagnosis.json").write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    _plot(found, output / "energy.png")
    if maps is not None and sources is not None:
        _plot_matches(sources, run.backbone.decode(final), maps, output / "matches.png")
    console.print(_table(found))
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
        timesteps = torch.full((len(latents),), t, device=latents.device)
        alpha, sigma = alpha_sigma(scheduler, timesteps, latents)
        noisy = add_noise(latents, noise, alpha, sigma)
        output = predict(run.backbone.unet, noisy, timesteps, conditions, Guidance())[0]
        prediction_type = scheduler.config.prediction_type
        x0 = predict_x0(output, noisy, alpha, sigma, prediction_type, is_sigma_space(scheduler))
        bands = list(zip(true, split_bands(x0, LEVELS)[0], strict=True))
        slope.append([calibration_slope(a, b) for a, b in bands])
        missing.append([missing_energy(a, b) for a, b in bands])
    return slope, missing


class _Watch(Method):
    """Changes nothing; keeps each reached state's energy per band over that of really noised photos."""

    def __init__(self, latents: Tensor, noise: Tensor) -> None:
        self.latents, self.noise = latents, noise
        self.ratios: list[list[float]] = []

    def after(self, step: Step, guided: Tensor, reached: Tensor, level: tuple[float, float]) -> Tensor:
        reference = add_noise(self.latents, self.noise, *level)
        bands = zip(split_bands(reached, LEVELS)[0], split_bands(reference, LEVELS)[0], strict=True)
        self.ratios.append([float(a.square().mean() / b.square().mean()) for a, b in bands])
        return reached


def _on_policy(
    run: LoadedRun, latents: Tensor, conditions: Conditions
) -> tuple[dict[str, list[list[float]]], Tensor, list[int]]:
    cfg, backbone = run.cfg, run.backbone
    strengths = [0.0]
    if run.enhancement is not None and run.enhancement.acts_on_latents and cfg.enhancement.strength > 0:
        strengths.append(cfg.enhancement.strength)
    channels, height, width = latents.shape[1:]
    start = initial_noise(cfg.sampling.seed, list(range(len(latents))), (channels, height, width)).to(latents)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents)
    guidance = Guidance(cfg.sampling.guidance_scale, cfg.sampling.source_guidance_scale)
    energy: dict[str, list[list[float]]] = {}
    final, steps = latents, []
    for strength in strengths:
        scheduler = build_scheduler(cfg.sampling.scheduler, backbone.scheduler)
        if strength > 0:
            assert run.enhancement is not None
            trust = run.enhancement.trust(conditions.text, conditions.source)
            scheduler = enhance_scheduler(
                scheduler, run.enhancement, strength, cfg.enhancement.placement, conditions.source, trust
            )
        watch = _Watch(latents, noise)
        scheduler.set_timesteps(cfg.sampling.num_inference_steps, device=latents.device)
        steps = [int(t) for t in scheduler.timesteps]
        final = sample_latents(
            backbone.unet, scheduler, start, conditions, guidance, cfg.sampling.num_inference_steps, watch
        )
        energy[f"strength {strength:g}"] = watch.ratios
    return energy, final, steps


def _matches(run: LoadedRun, final: Tensor, conditions: Conditions) -> dict[str, Tensor] | None:
    """Maps (N, h, w) of the last step: confidence, displacement in latents, the finest band's gate."""
    module, source = run.enhancement, conditions.source
    if module is None or module.texture is None or source is None:
        return None
    scheduler = build_scheduler(run.cfg.sampling.scheduler, run.backbone.scheduler)
    scheduler.set_timesteps(run.cfg.sampling.num_inference_steps)
    alpha, sigma = current_level(scheduler, scheduler.timesteps[-1])
    blend = module.blend(final, source, alpha, sigma, 1.0, trust=module.trust(conditions.text, source))
    assert blend.match is not None and blend.gates is not None
    return {
        "confidence": blend.match.confidence[:, 0],
        "displacement": blend.match.flow.square().sum(1).sqrt(),
        "gate": blend.gates[:, 0],
    }


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


def _table(found: Diagnosis) -> Table:
    table = Table("band", "slope, t <= 300", "missing energy, t <= 300", *(f"final energy, {n}" for n in found.energy))
    late = [k for k, t in enumerate(found.timesteps) if t <= 300]
    for b, band in enumerate(BANDS):
        slope = np.mean([found.slope[k][b] for k in late])
        missing = np.mean([found.missing[k][b] for k in late])
        table.add_row(band, f"{slope:.3f}", f"{missing:.3f}", *(f"{r[-1][b]:.2f}" for r in found.energy.values()))
    return table


def _plot(found: Diagnosis, output: Path) -> None:
    with matplotlib.rc_context({**STYLE, "savefig.transparent": False}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        for b, band in enumerate(BANDS):
            left.plot(found.timesteps, [row[b] for row in found.slope], color=PALETTE[b], marker="o", label=band)
            for (name, ratios), style in zip(found.energy.items(), ("-", "--"), strict=False):
                label = f"{band}, {name}"
                right.plot(found.steps, [row[b] for row in ratios], style, color=PALETTE[b], label=label)
        for axes, title, unit in (
            (left, "Calibration of the network, teacher-forced", "slope <x0, x0^> / <x0^, x0^>"),
            (right, "Energy along the chain, on-policy", "state / really noised photos"),
        ):
            axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(title)
            axes.set_xlabel("timestep")
            axes.set_ylabel(unit)
            axes.invert_xaxis()
            axes.legend(fontsize=8)
        figure.savefig(output, dpi=130)


def _plot_matches(sources: np.ndarray, images: Tensor, maps: dict[str, Tensor], output: Path) -> None:
    count = min(_SHOWN, len(sources))
    columns = ["source", "image", *maps]
    with matplotlib.rc_context({**STYLE, "axes.grid": False, "savefig.transparent": False}):
        figure = Figure(figsize=(2 * len(columns), 2 * count), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(count, len(columns), squeeze=False)
        for r in range(count):
            shown = [sources[r], images[r].permute(1, 2, 0).cpu().numpy(), *(m[r].cpu().numpy() for m in maps.values())]
            for axes, name, picture in zip(grid[r], columns, shown, strict=True):
                axes.imshow(picture, vmin=0, vmax=None if name == "displacement" else 1)
                axes.set_axis_off()
                if r == 0:
                    axes.set_title(name)
        figure.savefig(output, dpi=110)
