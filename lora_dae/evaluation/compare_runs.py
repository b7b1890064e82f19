"""``evaluate.py runs=[runs/a,runs/b]``: one page over several methods, same prompts and seeds, against a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import best_device
from lora_dae.config import ConfigError, EvaluationConfig
from lora_dae.data.pair import Pair
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.attributes.labels import studio_classifier
from lora_dae.evaluation.heldout import HeldOut, overlap, training_pairs
from lora_dae.evaluation.metrics.extras import load_extras
from lora_dae.evaluation.metrics.features import load_features, stack_images
from lora_dae.evaluation.metrics.measure import build_reference, measure_images
from lora_dae.evaluation.metrics.observe import Observed
from lora_dae.evaluation.metrics.pattern import pattern_distance
from lora_dae.evaluation.metrics.sizes import add_infinity, size_curves
from lora_dae.evaluation.photo_mode import PhotoMode
from lora_dae.evaluation.pictures import METADATA, Item, find_methods, gather, parse_spec
from lora_dae.evaluation.references import reference_rows
from lora_dae.evaluation.report.examples import extremes, prompt_grid
from lora_dae.evaluation.report.page import OnPage, Page, check_writable, write_page
from lora_dae.evaluation.report.plots import plot_band_power, plot_sizes
from lora_dae.evaluation.report.protocol import Protocol, size_warnings
from lora_dae.evaluation.report.sheets import judges_sheets, people_sheets
from lora_dae.evaluation.report.table import MetricValue, ResultsTable
from lora_dae.sampling.load import read_config


@dataclass(frozen=True)
class CompareRequest:
    """``runs``: [name=]<run or folder of pictures>[@strength]; ``baseline``: one of their names, None: the first."""

    runs: list[str]
    baseline: str | None
    split: str
    vqa: Path | None
    study: Path | None
    seed: int
    output: Path
    command: str
    mode: PhotoMode | None = None  # the real photos themselves are given


def compare_runs(
    request: CompareRequest, cfg: EvaluationConfig, console: Console, on_page: OnPage | None = None
) -> ResultsTable:
    """Draw what is not drawn yet, measure, write the page into ``request.output``, and return the table.

    Raises ConfigError before anything is drawn for paths, names, a vqa or study folder that do not fit; and for
    pictures without real photos to measure them against.
    """
    names = [parse_spec(spec)[0] for spec in request.runs]
    if request.baseline is not None and request.baseline not in names:
        raise ConfigError(f"baseline={request.baseline} is none of the methods: use one of {', '.join(names)}.")
    find_methods(request.runs, request.split, request.mode)  # before features are loaded
    check_writable(request.output)
    sheets = [] if request.vqa is None else judges_sheets(request.vqa)
    sheets += [] if request.study is None else people_sheets(request.study)
    extractor = load_features(cfg.features).to(best_device())  # what cannot be had costs no drawing
    sets = gather(request.runs, request.split, cfg.num_samples, console, request.mode)
    held_out = _held_out(sets.items)
    size = held_out.pairs[0].image.shape
    if any(p.image.shape != size for p in held_out.pairs) or next(iter(sets.methods.values()))[0].shape != size:
        raise ConfigError("the real photos have not the pictures' size: measure both at one resolution.")
    if any(p.source is not None and p.source.shape != size for p in held_out.pairs):
        raise ConfigError("the source photos have not the pictures' size: measure all at one resolution.")
    extras = load_extras(cfg, min(size[:2]), held_out.captions)
    extractors = (extractor, *extras.more)
    sources_given, given = held_out.sources is not None, request.mode is not None
    real = build_reference(stack_images([p.image for p in held_out.pairs]), held_out.masks, *extractors)
    classifier = studio_classifier(held_out.attributes)
    pattern = pattern_distance(extractor)
    first = request.baseline or names[0]
    methods: dict[str, dict[str, MetricValue]] = {}
    seen: dict[str, Observed] = {}
    with console.status("measuring"):
        for name in sorted(names, key=lambda n: n != first):
            methods[name], seen[name] = measure_images(
                stack_images(sets.methods[name]),
                real,
                extractor,
                attributes=held_out.attributes,
                classifier=classifier,
                bootstrap=cfg.bootstrap,
                seed=request.seed,
                paired=given or (sources_given and name in sets.from_source),
                perceptual=extras.perceptual,
                clip=extras.clip,
                captions=held_out.captions,
                sources=None if held_out.sources is None else stack_images(list(held_out.sources)),
                pattern=pattern,
                more=extras.more,
            )
        # Who drew from the prompt alone is not measured against the photo of the same pair.
        if sources_given and not given:
            comparable = next(set(methods[n]) for n in methods if n in sets.from_source)
            for name in set(methods) - sets.from_source:
                methods[name] = {k: v for k, v in methods[name].items() if k in comparable}
        references, leaked = {}, None
        run = _first_run(request.runs)
        splits = None if run is None else load_splits(read_config(run).data)
        if splits is not None:
            leaked = overlap(splits, request.split, len(held_out.pairs))
        if cfg.controls:
            backbone = None if run is None else load_backbone(read_config(run).backbone, best_device())
            training = None if splits is None else training_pairs(splits["train"], held_out)
            references = reference_rows(
                held_out, real, training, backbone, extractor, extras, classifier, cfg.bootstrap, request.seed,
                pattern, given,
            )  # fmt: skip
    seeds = sorted({item.seed for item in sets.items if item.seed is not None})
    curves = size_curves(seen, methods, real.features, extractors, request.seed)
    protocol = Protocol(
        num_generated=len(held_out.pairs),
        num_reference=len(real),
        split=request.split,
        resolution=size[0],
        sampler=None,
        steps=None,
        guidance_scale=None,
        source_guidance_scale=None,
        seeds=seeds,
        features=cfg.features,
        bootstrap=cfg.bootstrap,
        definitions=[*extras.definitions, *_settings(request.runs)],
        not_available=extras.not_available,
        mode=request.mode.name if request.mode else "source" if sources_given else "text",
        noise_strength=request.mode.noise_strength if request.mode else None,
        resize="none: pictures and real photos have one size",
        files="PNG",
        warnings=[*([leaked] if leaked else []), *size_warnings(len(held_out.pairs), len(real), len(seeds))],
    )
    add_infinity(methods, curves, protocol)
    table = ResultsTable(methods, protocol, references, curves)
    console.print(table.rich())  # first: whatever becomes of the files, the numbers are there
    on_garment = any(observed.on_garment for observed in seen.values())
    spectra = {n: observed.power.spectrum() for n, observed in seen.items() if observed.on_garment == on_garment}
    power = real.observed(on_garment).power
    plots = [plot_band_power(spectra, power.spectrum(), request.output / "plots" / "band_power.svg")]
    sources: list[np.ndarray | None] = [p.source for p in held_out.pairs]
    photos: list[np.ndarray | None] = [p.image for p in held_out.pairs]
    ordered = {name: sets.methods[name] for name in methods}
    grids = [prompt_grid("Same prompt and seed in every column", held_out.captions, ordered, sources, photos)]
    for name in methods:
        grids += extremes(name, seen[name].values, held_out.captions, ordered, sources, photos)[:1]
    page = Page(
        title="Comparison of " + ", ".join(methods) + (f" · {request.mode}" if request.mode else ""),
        table=table,
        command=request.command,
        summary={"Methods": str(len(methods)), "Prompts": str(len(held_out.pairs)), "Baseline": first},
        grids=grids,
        plots=[*plots, *plot_sizes(curves, request.output / "plots")],
        sheets=sheets,
    )
    report = write_page(request.output, page)
    console.print(f"report   {report}", soft_wrap=True, highlight=False)
    if on_page is not None:
        on_page(request.output, page)
    return table


def _held_out(items: Sequence[Item]) -> HeldOut:
    pairs = []
    for item in items:
        if item.real is None:
            raise ConfigError(
                f'picture {item.id} has no real photo in {METADATA} ("real"), and a comparison measures against real '
                "photos: add them, or use images=<folder> reference=<folder>."
            )
        pairs.append(Pair(item.id, item.id, item.prompt, item.real, item.source, item.mask, None, item.attributes))
    if len(pairs) < 2:
        raise ConfigError(f"there is {len(pairs)} picture to compare, distances need at least 2: give num_samples=2.")
    return HeldOut(pairs)


def _first_run(specs: Sequence[str]) -> Path | None:
    """A run whose VAE the ceiling is measured with; None where finished pictures alone are compared."""
    paths = [parse_spec(spec)[1] for spec in specs]
    return next((path for path in paths if not (path / METADATA).is_file()), None)


def _settings(specs: Sequence[str]) -> list[str]:
    """How each run draws, for the protocol."""
    found = []
    for spec in specs:
        name, path, _ = parse_spec(spec)
        if not (path / METADATA).is_file():
            s = read_config(path).sampling
            found.append(f"{name}: {s.scheduler}, {s.num_inference_steps} steps, guidance {s.guidance_scale:g}")
    return found
