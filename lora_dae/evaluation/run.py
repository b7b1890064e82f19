"""Measure a finished run: frozen backbone, strength 0 and the configured strength on held-out pairs.

Same captions, same sources, same noise for every row. Everything is written beside the run: metrics.json,
table.md|csv|tex, samples/, plots, report.html.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lora_dae.adapter.files import trained_megabytes
from lora_dae.adapter.words import FILE_NAME as WORDS_FILE
from lora_dae.adapter.words import TOKEN
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import best_device
from lora_dae.backbone.usage import PIPELINES, own_scheduler, plain_pipeline, settled
from lora_dae.config import Config, to_dict
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.attributes.labels import studio_classifier
from lora_dae.evaluation.heldout import HeldOut, overlap, training_pairs
from lora_dae.evaluation.metrics.extras import Extras, load_extras
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features, load_features, stack_images
from lora_dae.evaluation.metrics.measure import Reference, build_reference, distances_to
from lora_dae.evaluation.metrics.observe import Observed
from lora_dae.evaluation.metrics.pattern import pattern_distance
from lora_dae.evaluation.metrics.sizes import add_infinity, size_curves
from lora_dae.evaluation.photo_mode import PhotoMode
from lora_dae.evaluation.references import reconstructed_features, reference_rows
from lora_dae.evaluation.report.examples import PictureGrid, extremes, prompt_grid
from lora_dae.evaluation.report.page import OnPage, Page, check_writable, override, publish
from lora_dae.evaluation.report.plots import log_files, plot_curves, plot_sizes
from lora_dae.evaluation.report.protocol import ON_VALIDATION, Protocol, of_pairs, size_warnings
from lora_dae.evaluation.report.table import ResultsTable
from lora_dae.evaluation.side_by_side import measure_methods, plot_texture
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.finished import read_config
from lora_dae.sampling.load import LoadedRun, load_run, prepare_unet
from lora_dae.sampling.sheet import image_grid

GRID_ROWS = 6
SEEN = 256  # pixels that a picture in the grid has at least
FROZEN = "frozen backbone"


def row_name(strength: float) -> str:
    return f"strength {strength:g}"


def draw_rows(
    run: LoadedRun, held_out: HeldOut, console: Console, bf16: bool, mode: PhotoMode | None = None
) -> dict[str, np.ndarray]:
    """Images of every row of the table, uint8 (N, H, W, 3), by row name; ``mode``: from real photos."""
    cfg = run.cfg
    keep = None if mode is None else mode.keep(held_out, run.backbone)
    start = None if mode is None else mode.start(held_out, run.backbone)
    n = len(held_out.pairs)
    strengths = [0.0]
    if run.enhancement is not None and cfg.enhancement.strength > 0 and cfg.enhancement.placement != "none":
        strengths.append(cfg.enhancement.strength)
    rows: dict[str, np.ndarray] = {}
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:

        def images(name: str, drawer: Drawer, sources: np.ndarray | None, strength: float) -> np.ndarray:
            task = progress.add_task(f"drawing {name}", total=n)
            advance = partial(progress.advance, task)
            return drawer.images(held_out.captions, sources, strength, held_out.numbers, advance, keep, start)

        for strength in strengths:
            rows[row_name(strength)] = images(row_name(strength), run.drawer(bf16), held_out.shown, strength)
        if cfg.evaluation.frozen:
            device = run.backbone.device
            run.backbone.unet.to("cpu")  # two UNets of SDXL fill a GPU
            frozen = load_backbone(cfg.backbone, device)
            prepare_unet(frozen, cfg)
            drawer = Drawer(frozen, None, "none", "none", cfg.data.resolution, cfg.sampling, bf16)
            rows = {FROZEN: images(FROZEN, drawer, None, 0.0), **rows}
            frozen.unet.to("cpu")
            run.backbone.unet.to(device)
    return rows


def measure_rows(
    cfg: Config,
    rows: dict[str, np.ndarray],
    held_out: HeldOut,
    extractor: FeatureExtractor,
    extras: Extras,
    run: LoadedRun | None = None,
    training: HeldOut | None = None,
    mode: PhotoMode | None = None,
    real: Reference | None = None,
    recon: Features | None = None,
) -> tuple[ResultsTable, Reference, dict[str, Observed]]:
    """The table over all rows, the real side that it was measured against, and what was seen of each row's images.

    ``run`` gives the VAE and ``training`` the photos of the reference rows (``evaluation.controls``).
    ``mode``: real photos were given, so every row is measured against them.
    ``real``: the real side, where it is known from before. ``recon``: features of what the VAE makes of it, for
    distances to that as well.
    """
    if real is None:
        photos = stack_images([p.image for p in held_out.pairs])
        real = build_reference(photos, held_out.masks, extractor, *extras.more)
    classifier = studio_classifier(held_out.attributes)
    pattern = pattern_distance(extractor)
    methods, seen = measure_methods(
        rows, held_out, real, extractor, extras, from_source=set(rows) - {FROZEN}, given=mode is not None,
        classifier=classifier, pattern=pattern, bootstrap=cfg.evaluation.bootstrap, seed=cfg.seed,
    )  # fmt: skip
    if recon is not None:
        for name in methods:
            methods[name] |= distances_to(recon, "_recon", seen[name], extractor, cfg.evaluation.bootstrap, cfg.seed)
    references = {}
    if cfg.evaluation.controls:
        references = reference_rows(
            held_out, real, training, None if run is None else run.backbone, extractor, extras, classifier,
            cfg.evaluation.bootstrap, cfg.seed,
            pattern, mode is not None,
        )  # fmt: skip
    sampling = cfg.sampling
    protocol = Protocol(
        num_generated=len(held_out.pairs),
        num_reference=len(real),
        split=cfg.evaluation.split,
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
        mode=mode.name if mode else "text" if held_out.sources is None else "source",
        noise_strength=mode.noise_strength if mode else None,
        method=sampling.method,
        warnings=[*size_warnings(len(held_out.pairs), len(real), 1), *asked_warnings(cfg)],
    )
    # Strength 0 comes first: it is what every other row is compared with.
    order = sorted(methods, key=lambda name: name != row_name(0.0))
    in_order = {name: seen[name] for name in order}
    curves = size_curves(in_order, methods, real.features, (extractor, *extras.more), cfg.seed)
    add_infinity(methods, curves, protocol)
    return ResultsTable({name: methods[name] for name in order}, protocol, references, curves), real, seen


def asked_warnings(cfg: Config) -> list[str]:
    """What the config asks for that makes the numbers mean something else."""
    found = []
    if cfg.evaluation.split == "val":
        found.append(ON_VALIDATION)
    if cfg.evaluation.first_pair:
        found.append(f"from pair {cfg.evaluation.first_pair} of the split on")
    if cfg.evaluation.wrong_source:
        found.append("every picture was steered by the source photo of the next pair, and is measured against its own")
    if cfg.data.buckets:
        found.append(
            "trained in buckets of several sizes, drawn and measured in squares alone: oblong real photos are cropped "
            "or padded, and nothing here says how well the other sizes are drawn"
        )
    return found


def write_grid(rows: dict[str, np.ndarray], held_out: HeldOut, path: Path, count: int = GRID_ROWS) -> np.ndarray:
    """The picture that people look at first: source, every row, the real photo."""
    columns: dict[str, list[np.ndarray]] = {}
    count = min(count, len(held_out.pairs))
    if (shown := held_out.shown) is not None:
        columns["source"] = list(shown[:count])
    columns |= {name: list(images[:count]) for name, images in rows.items()}
    columns["real"] = [p.image for p in held_out.pairs[:count]]
    flat = [columns[name][r] for r in range(count) for name in columns]
    zoom = max(1, SEEN // flat[0].shape[1])
    grid = image_grid(flat, count, len(columns), list(columns), held_out.captions[:count], zoom=zoom)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return np.asarray(grid)


def evaluate_run(
    run_dir: Path,
    console: Console,
    *,
    run: LoadedRun | None = None,
    cfg: Config | None = None,
    bf16: bool = False,
    output: Path | None = None,
    command: str | None = None,
    mode: PhotoMode | None = None,
    on_images: Callable[[HeldOut, dict[str, np.ndarray]], None] | None = None,
    on_page: OnPage | None = None,
) -> tuple[ResultsTable, np.ndarray]:
    """Draw, measure and report one run; returns the table and the sample grid.

    Everything is written into ``output``, the run's own folder by default. ``run`` is loaded where it is not given;
    ``cfg``: other settings than its own. ``mode``: the held-out photos themselves are given. ``on_images`` is given the
    held-out pairs and each row's images, uint8 (N, H, W, 3), before they are measured. Raises ConfigError for a folder
    that is no finished run, a split without images or one that ``mode`` cannot draw.
    """
    cfg = cfg or (read_config(run_dir) if run is None else run.cfg)
    output = output or run_dir
    if mode is not None:
        mode.check(cfg, cfg.evaluation.split)
    splits = load_splits(cfg.data)
    held_out, split = HeldOut.asked_for(splits, cfg), cfg.evaluation.split
    if len(held_out.pairs) < cfg.evaluation.num_samples:
        asked = cfg.evaluation.num_samples
        console.print(f"the {split} split has {len(held_out.pairs)} pairs, not the {asked} asked for: all are taken")
    extras = load_extras(cfg.evaluation, cfg.data.resolution, held_out.captions)
    extractor = load_features(cfg.evaluation.features).to(best_device())  # what cannot be had costs no drawing
    check_writable(output)
    run = run or load_run(run_dir, best_device())
    run.cfg = cfg
    rows = draw_rows(run, held_out, console, bf16, mode)
    if on_images is not None:
        on_images(held_out, rows)
    training = training_pairs(splits["train"], held_out) if cfg.evaluation.controls else None
    with console.status("measuring"):
        recon = reconstructed_features(run.backbone, held_out, extractor) if cfg.evaluation.reconstructions else None
        table, real, seen = measure_rows(cfg, rows, held_out, extractor, extras, run, training, mode, recon=recon)
    table.protocol.definitions.extend(of_pairs(table.protocol.mode))
    if found := overlap(splits, split, len(held_out.pairs), held_out.first):
        table.protocol.warnings.append(found)
    console.print(table.rich())  # first: whatever becomes of the files, the numbers are there
    grid = write_grid(rows, held_out, output / "samples" / "grid.png")
    page = Page(
        title=f"LoRA-DAE · {cfg.name}" + (f" · {mode}" if mode else ""),
        summary=_summary(run_dir, cfg),
        table=table,
        grids=_grids(rows, held_out, seen),
        plots=_plots(run_dir, output, seen, real, table),
        config_yaml=OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg))),
        usage=usage(settled(cfg, run.backbone.folder), run.backbone.folder.family),
        command=command or f"python evaluate.py {override('run', str(run_dir))}",
    )
    publish(output, page, console, on_page)
    return table, grid


def _grids(rows: dict[str, np.ndarray], held_out: HeldOut, seen: dict[str, Observed]) -> list[PictureGrid]:
    methods = {name: list(images) for name, images in rows.items()}
    sources: list[np.ndarray | None] = [p.source for p in held_out.pairs]
    if (shown := held_out.shown) is not None:
        sources = list(shown)
    real: list[np.ndarray | None] = [p.image for p in held_out.pairs]
    own = list(rows)[-1]
    values: dict[str, Tensor] = seen[own].values
    return [
        prompt_grid("Same caption, source and noise in every column", held_out.captions, methods, sources, real),
        *extremes(own, values, held_out.captions, methods, sources, real),
    ]


def _plots(run_dir: Path, output: Path, seen: dict[str, Observed], real: Reference, table: ResultsTable) -> list[Path]:
    plots = [plot_texture(seen, real, output / "plots"), *plot_sizes(table.curves, output / "plots")]
    log = run_dir / "csv" / "metrics.csv"
    if log_files(log):
        curves = {"training": "train/loss", "validation (fixed noise)": "val/loss"}
        plots.append(plot_curves(log, output / "plots" / "loss.svg", curves, "Loss of the adapter"))
    return plots


def _summary(run_dir: Path, cfg: Config) -> dict[str, str]:
    conv = cfg.adapter.conv_rank or cfg.adapter.rank
    rank = "all weights" if cfg.adapter.full_finetune else f"rank {cfg.adapter.rank}"
    if "conv" in cfg.adapter.targets and conv != cfg.adapter.rank and not cfg.adapter.full_finetune:
        rank += f", conv {conv}"
    return {
        "Adapter": f"{rank}, {trained_megabytes(run_dir / 'adapter'):.1f} MB",
        "Training": f"{cfg.trainer.get('max_steps')} steps of {cfg.data.batch_size}",
        "Conditioning": cfg.conditioning,
        "Enhancement": cfg.enhancement.placement if cfg.enhancement.enabled else "none",
        "Data": cfg.data.name + (f" ({cfg.data.difficulty})" if cfg.data.name == "studio" else ""),
        "Seed": str(cfg.seed),
    }


def usage(cfg: Config, family: str) -> str:
    """How to draw with the run's files on its backbone, one of ``family``."""
    source = cfg.conditioning == "source"
    words = f"{TOKEN} " if cfg.adapter.kind == "textual_inversion" else ""
    trigger = "" if cfg.data.captions.trigger is None else f"{cfg.data.captions.trigger} "
    prompt = f"{words}{trigger}a woman wearing a red plaid shirt"
    # Few programs read PEFT's own files of these two, and no plain pipeline has a place for the source's channels.
    attaches = cfg.adapter.kind == "lora" and not cfg.adapter.full_finetune
    if cfg.adapter.kind in ("loha", "lokr") or (source and not attaches):
        shown = " source=mannequin.jpg" if source else ""
        return f'python sample.py run=<this folder> prompt="{prompt.removeprefix(words)}"{shown}'
    lines = [
        "import lora_dae",
        f"from diffusers import {PIPELINES[family]}",
        *(["from PIL import Image"] if source else []),
        "",
        f"pipe = {plain_pipeline(cfg.backbone, family, cfg.backbone.path)}",
        *own_scheduler(cfg.backbone, cfg.enhancement.placement == "direction"),
    ]
    if cfg.adapter.kind == "textual_inversion":
        lines.append(f'pipe.load_textual_inversion("adapter/{WORDS_FILE}", token="{TOKEN}")')
    elif attaches:
        placement = ', placement="direction"' if cfg.enhancement.placement == "direction" else ""
        lines.append(f'lora_dae.attach(pipe, "adapter", strength={cfg.enhancement.strength}{placement})')
    else:
        lines.append('pipe.unet = pipe.unet.from_pretrained("adapter/unet")')
    given, sampling = ', source=Image.open("mannequin.jpg")' if source else "", cfg.sampling
    if source and sampling.guidance_scale != sampling.source_guidance_scale:
        scales = f"{sampling.guidance_scale:g} and {sampling.source_guidance_scale:g}"
        lines.append(f"# attach guides caption and source by one scale; the report has {scales}, as sample.py draws")
    lines.append(f'image = pipe("{prompt}", guidance_scale={sampling.guidance_scale}{given}).images[0]')
    return "\n".join(lines)
