"""Measure a finished run: frozen backbone, strength 0 and the configured strength on held-out pairs.

Same captions, same sources, same noise for every row. Everything is written beside the run: metrics.json,
table.md, samples/, plots, report.html.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_dae.backbone.load import load_backbone
from lora_dae.config import Config, ConfigError, to_dict
from lora_dae.data.pair import Pair, PairDataset, replace_pixels
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.attributes import AttributeClassifier, load_embedded
from lora_dae.evaluation.clip_score import ClipScore
from lora_dae.evaluation.controls import blurred, over_sharpened
from lora_dae.evaluation.features import load_features, stack_images
from lora_dae.evaluation.measure import Reference, build_reference, evaluate_images
from lora_dae.evaluation.perceptual import MS_SSIM_SIDE, Distance, Lpips, load_dists
from lora_dae.evaluation.plots import plot_band_power, plot_curves
from lora_dae.evaluation.report import write_report
from lora_dae.evaluation.table import MetricValue, Protocol, ResultsTable
from lora_dae.evaluation.texture import band_power
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.load import LoadedRun, load_run, prepare_unet
from lora_dae.sampling.sheet import image_grid

GRID_ROWS = 6
FROZEN = "frozen backbone"
STUDIO_ATTRIBUTES = {"garment", "color", "pattern", "view"}  # what tells its pairs from other attributed ones


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs, in memory."""

    pairs: list[Pair]

    @classmethod
    def take(cls, dataset: PairDataset, count: int, conditioning: str) -> HeldOut:
        """The first ``count`` pairs of a split, without sources where none steer; fewer than 2 raise ConfigError."""
        if len(dataset) < 2:
            raise ConfigError(f"the split to evaluate on has {len(dataset)} images: give it at least 2.")
        pairs = [dataset[i] for i in range(min(count, len(dataset)))]
        return cls(pairs if conditioning == "source" else [replace_pixels(p, source=None) for p in pairs])

    @property
    def captions(self) -> list[str]:
        return [p.caption for p in self.pairs]

    @property
    def sources(self) -> np.ndarray | None:
        found = [p.source for p in self.pairs if p.source is not None]
        return np.stack(found) if len(found) == len(self.pairs) else None

    @property
    def masks(self) -> torch.Tensor | None:
        found = [p.mask for p in self.pairs if p.mask is not None]
        return torch.from_numpy(np.stack(found)) if len(found) == len(self.pairs) else None

    @property
    def attributes(self) -> list[dict[str, str]] | None:
        found = [p.attributes for p in self.pairs if p.attributes is not None]
        return found if len(found) == len(self.pairs) else None


def row_name(strength: float) -> str:
    return f"strength {strength:g}"


def draw_rows(run: LoadedRun, held_out: HeldOut, console: Console, bf16: bool) -> dict[str, np.ndarray]:
    """Images of every row of the table, uint8 (N, H, W, 3), by row name."""
    cfg = run.cfg
    n = len(held_out.pairs)
    strengths = [0.0]
    if run.enhancement is not None and cfg.enhancement.strength > 0 and cfg.enhancement.placement != "none":
        strengths.append(cfg.enhancement.strength)
    rows: dict[str, np.ndarray] = {}
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:

        def images(name: str, drawer: Drawer, sources: np.ndarray | None, strength: float) -> np.ndarray:
            task = progress.add_task(f"drawing {name}", total=n)
            return drawer.images(held_out.captions, sources, strength, on_batch=lambda k: progress.advance(task, k))

        for strength in strengths:
            rows[row_name(strength)] = images(row_name(strength), run.drawer(bf16), held_out.sources, strength)
        if cfg.evaluation.frozen:
            frozen = load_backbone(cfg.backbone, run.backbone.device)
            prepare_unet(frozen, cfg)
            drawer = Drawer(frozen, None, "none", "none", cfg.data.resolution, cfg.sampling, bf16)
            rows = {FROZEN: images(FROZEN, drawer, None, 0.0), **rows}
    return rows


def measure_rows(
    cfg: Config, rows: dict[str, np.ndarray], held_out: HeldOut, split: str, extras: Extras
) -> tuple[ResultsTable, Reference]:
    """The table over all rows, and the real side that it was measured against."""
    extractor = load_features(cfg.evaluation.features)
    real = build_reference(stack_images([p.image for p in held_out.pairs]), held_out.masks, extractor)
    classifier = _classifier(held_out)
    if cfg.evaluation.controls:
        rows = {**rows, **control_rows(held_out)}
    methods: dict[str, dict[str, MetricValue]] = {}
    for name, images in rows.items():
        methods[name] = evaluate_images(
            stack_images(list(images)),
            real,
            extractor,
            attributes=held_out.attributes,
            classifier=classifier,
            bootstrap=cfg.evaluation.bootstrap,
            seed=cfg.seed,
            paired=held_out.sources is not None and name != FROZEN,
            perceptual=extras.perceptual,
            clip=extras.clip,
            captions=held_out.captions,
        )
    sampling = cfg.sampling
    protocol = Protocol(
        num_generated=len(held_out.pairs),
        num_reference=len(real),
        split=split,
        resolution=cfg.data.resolution,
        sampler=sampling.scheduler,
        steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        source_guidance_scale=sampling.source_guidance_scale if cfg.conditioning == "source" else None,
        seeds=[sampling.seed],
        features=cfg.evaluation.features,
        bootstrap=cfg.evaluation.bootstrap,
        definitions=extras.definitions,
        not_available=extras.not_available,
    )
    # Strength 0 comes first: it is what every other row is compared with.
    order = sorted(methods, key=lambda name: name != row_name(0.0))
    if FROZEN in methods:  # it saw no source: nothing that compares with the real photo of the same pair applies
        comparable = methods[row_name(0.0)]
        methods[FROZEN] = {k: v for k, v in methods[FROZEN].items() if k in comparable}
    return ResultsTable({name: methods[name] for name in order}, protocol), real


def control_rows(held_out: HeldOut) -> dict[str, np.ndarray]:
    """The real photos made worse on purpose: a metric that ranks these well says nothing about texture."""
    makers = {"real, blurred": blurred, "real, over-sharpened": over_sharpened}
    return {name: np.stack([make(p.image) for p in held_out.pairs]) for name, make in makers.items()}


@dataclass(frozen=True)
class Extras:
    """Metrics that need weights of their own: loaded before anything is drawn, so that a mistake costs no drawing."""

    perceptual: dict[str, Distance]
    clip: ClipScore | None
    definitions: list[str]
    not_available: dict[str, str]  # metric -> why


def load_extras(cfg: Config, captions: list[str]) -> Extras:
    """What ``evaluation.lpips``, ``dists`` and ``clip`` ask for; ConfigError for weights or captions that do not fit.

    Only DISTS may be missing: it has no file of its own to name.
    """
    perceptual: dict[str, Distance] = {}
    definitions: list[str] = []
    not_available: dict[str, str] = {}
    if cfg.data.resolution < MS_SSIM_SIDE:
        not_available["ms_ssim"] = f"needs {MS_SSIM_SIDE} pixels"
    if cfg.evaluation.lpips is None:
        not_available["lpips_alex"] = "evaluation.lpips names no weights"
    else:
        perceptual["lpips_alex"] = Lpips(Path(cfg.evaluation.lpips))
        definitions.append("lpips: version 0.1, AlexNet")
    if cfg.evaluation.dists:
        try:
            perceptual["dists"] = load_dists()
        except ConfigError as error:
            not_available["dists"] = str(error)
    clip = None
    if cfg.evaluation.clip is not None:
        clip = ClipScore(cfg.evaluation.clip)
        clip.check(captions)
        definitions.append(f"clip score: 2.5 max(cos, 0), {clip.name}")
    return Extras(perceptual, clip, definitions, not_available)


def _classifier(held_out: HeldOut) -> AttributeClassifier | None:
    """The embedded classifier, where the pairs' attributes are the studio's."""
    rows = held_out.attributes
    known = rows is not None and all(STUDIO_ATTRIBUTES <= row.keys() for row in rows)
    return load_embedded() if known else None


def write_grid(rows: dict[str, np.ndarray], held_out: HeldOut, path: Path, count: int = GRID_ROWS) -> np.ndarray:
    """The picture that people look at first: source, every row, the real photo."""
    columns: dict[str, list[np.ndarray]] = {}
    count = min(count, len(held_out.pairs))
    if held_out.sources is not None:
        columns["source"] = [p.source for p in held_out.pairs[:count] if p.source is not None]
    columns |= {name: list(images[:count]) for name, images in rows.items()}
    columns["real"] = [p.image for p in held_out.pairs[:count]]
    flat = [columns[name][r] for r in range(count) for name in columns]
    grid = image_grid(flat, count, len(columns), list(columns), held_out.captions[:count], zoom=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return np.asarray(grid)


def evaluate_run(
    run_dir: Path,
    console: Console,
    *,
    split: str = "test",
    run: LoadedRun | None = None,
    bf16: bool = False,
    on_images: Callable[[HeldOut, dict[str, np.ndarray]], None] | None = None,
) -> tuple[ResultsTable, np.ndarray]:
    """Draw, measure and report one run; returns the table and the sample grid.

    ``on_images`` is given the held-out pairs and each row's images, uint8 (N, H, W, 3), before they are measured.
    Raises ConfigError for a folder that is no finished run or a split without images.
    """
    run = run or load_run(run_dir)
    cfg = run.cfg
    held_out = HeldOut.take(load_splits(cfg.data)[split], cfg.evaluation.num_samples, cfg.conditioning)
    extras = load_extras(cfg, held_out.captions)
    rows = draw_rows(run, held_out, console, bf16)
    if on_images is not None:
        on_images(held_out, rows)
    with console.status("measuring"):
        table, real = measure_rows(cfg, rows, held_out, split, extras)
    table.save(run_dir / "metrics.json")
    (run_dir / "table.md").write_text(table.markdown(), encoding="utf-8")
    grid = write_grid(rows, held_out, run_dir / "samples" / "grid.png")
    plots = _plots(run_dir, rows, real, cfg)
    report = write_report(
        run_dir,
        f"LoRA-DAE · {cfg.name}",
        _summary(run_dir, cfg),
        table,
        [("Same caption, source and noise in every column", run_dir / "samples" / "grid.png")],
        plots,
        OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))),
        usage(cfg),
    )
    console.print(table.rich())
    console.print(f"report   {report}", soft_wrap=True, highlight=False)
    return table, grid


def _plots(run_dir: Path, rows: dict[str, np.ndarray], real: Reference, cfg: Config) -> list[Path]:
    plots = []
    paired = real.garment_power is not None and cfg.conditioning == "source"
    masks = real.masks if paired else None
    spectra = {
        name: band_power(stack_images(list(images)).float() / 255, masks).spectrum() for name, images in rows.items()
    }
    power = (real.garment_power if paired else real.power) or real.power
    plots.append(plot_band_power(spectra, power.spectrum(), run_dir / "plots" / "band_power.svg"))
    log = run_dir / "csv" / "metrics.csv"
    if log.is_file():
        curves = {"training": "train/loss", "validation (fixed noise)": "val/loss"}
        plots.append(plot_curves(log, run_dir / "plots" / "loss.svg", curves, "Loss of the adapter"))
    return plots


def _summary(run_dir: Path, cfg: Config) -> dict[str, str]:
    size = sum(f.stat().st_size for f in (run_dir / "adapter").rglob("*.safetensors"))
    conv = cfg.adapter.conv_rank or cfg.adapter.rank
    rank = "all weights" if cfg.adapter.full_finetune else f"rank {cfg.adapter.rank}"
    if "conv" in cfg.adapter.targets and conv != cfg.adapter.rank and not cfg.adapter.full_finetune:
        rank += f", conv {conv}"
    return {
        "Adapter": f"{rank}, {size / 1e6:.1f} MB",
        "Training": f"{cfg.trainer.get('max_steps')} steps of {cfg.data.batch_size}",
        "Conditioning": cfg.conditioning,
        "Enhancement": cfg.enhancement.placement if cfg.enhancement.enabled else "none",
        "Data": cfg.data.name + (f" ({cfg.data.difficulty})" if cfg.data.name == "studio" else ""),
        "Seed": str(cfg.seed),
    }


def usage(cfg: Config) -> str:
    """How to draw with the run's files."""
    base = cfg.backbone.path or "<lora_dae>/backbone/studio/weights"
    lines = [
        "import lora_dae",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{base}")',
    ]
    if not cfg.adapter.full_finetune:
        lines.append(f'lora_dae.attach(pipe, "adapter", strength={cfg.enhancement.strength})')
    else:
        lines.append('pipe.unet = pipe.unet.from_pretrained("adapter/unet")')
    lines.append(
        f'image = pipe("a woman wearing a red plaid shirt", guidance_scale={cfg.sampling.guidance_scale}).images[0]'
    )
    return "\n".join(lines)
