"""``evaluate.py runs=[runs/a,runs/b]``: one page over several methods, same prompts and seeds, against a baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import best_device
from lora_dae.config import ConfigError, DataConfig, EvaluationConfig
from lora_dae.data.pair import Pair, PairDataset
from lora_dae.data.sources import load_splits
from lora_dae.evaluation.attributes.labels import studio_classifier
from lora_dae.evaluation.heldout import HeldOut, enlarged, overlap, training_pairs
from lora_dae.evaluation.metrics.extras import load_extras
from lora_dae.evaluation.metrics.features import load_features, stack_images
from lora_dae.evaluation.metrics.measure import build_reference
from lora_dae.evaluation.metrics.pattern import pattern_distance
from lora_dae.evaluation.metrics.sizes import add_infinity, size_curves
from lora_dae.evaluation.photo_mode import PhotoMode
from lora_dae.evaluation.pictures import METADATA, SETTINGS, Item, drawn_strength, find_methods, gather, parse_spec
from lora_dae.evaluation.references import reference_rows
from lora_dae.evaluation.report.examples import extremes, prompt_grid
from lora_dae.evaluation.report.page import OnPage, Page, check_writable, publish
from lora_dae.evaluation.report.plots import plot_sizes
from lora_dae.evaluation.report.protocol import ON_VALIDATION, Protocol, of_pairs, sampling_words, size_warnings
from lora_dae.evaluation.report.sheets import judges_sheets, people_sheets
from lora_dae.evaluation.report.table import ResultsTable
from lora_dae.evaluation.side_by_side import measure_methods, plot_texture
from lora_dae.sampling.finished import read_config


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
    num_samples: int | None = None  # pictures of each; None: all of finished folders, the usual number of runs


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
    sheets = [] if request.vqa is None else judges_sheets(request.vqa, names)
    sheets += [] if request.study is None else people_sheets(request.study, names)
    extractor = load_features(cfg.features).to(best_device())  # what cannot be had costs no drawing
    sets = gather(request.runs, request.split, request.num_samples, console, request.mode)
    held_out = _held_out(sets.items)
    size, count = held_out.pairs[0].image.shape, len(held_out.pairs)
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
    ordered = {name: sets.methods[name] for name in sorted(names, key=lambda n: n != first)}
    with console.status("measuring"):
        methods, seen = measure_methods(
            ordered, held_out, real, extractor, extras, from_source=sets.from_source, given=given,
            classifier=classifier, pattern=pattern, bootstrap=cfg.bootstrap, seed=request.seed,
        )  # fmt: skip
        references = {}
        trained = _trained_on(request, count)
        leaks = [(runs, overlap(splits, request.split, count)) for runs, splits in trained]
        if cfg.controls:
            run = _first_run(request.runs)
            backbone = None if run is None else load_backbone(read_config(run).backbone, best_device())
            training = training_pairs(trained[0][1]["train"], held_out) if trained else None
            references = reference_rows(
                held_out, real, training, backbone, extractor, extras, classifier, cfg.bootstrap, request.seed,
                pattern, given,
            )  # fmt: skip
    seeds = sorted({item.seed for item in sets.items if item.seed is not None})
    curves = size_curves(seen, methods, real.features, extractors, request.seed)
    split = _split(request)
    mode = request.mode.name if request.mode else "source" if sources_given else "text"
    warnings = [f"{runs}: {found}" for runs, found in leaks if found]
    if "val" in split:
        warnings.append(ON_VALIDATION)
    protocol = Protocol(
        num_generated=count,
        num_reference=len(real),
        split=split,
        resolution=size[0],
        sampler=None,
        steps=None,
        guidance_scale=None,
        source_guidance_scale=None,
        seeds=seeds,
        features=cfg.features,
        bootstrap=cfg.bootstrap,
        definitions=[*extras.definitions, *of_pairs(mode), *_settings(request.runs)],
        not_available=extras.not_available,
        mode=mode,
        noise_strength=request.mode.noise_strength if request.mode else None,
        resize="none: pictures and real photos have one size",
        files="; ".join(f"{name}: {found}" for name, found in sets.files.items()),
        warnings=[*warnings, *size_warnings(count, len(real), len(seeds))],
    )
    add_infinity(methods, curves, protocol)
    table = ResultsTable(methods, protocol, references, curves)
    console.print(table.rich())  # first: whatever becomes of the files, the numbers are there
    plots = [plot_texture(seen, real, request.output / "plots"), *plot_sizes(curves, request.output / "plots")]
    sources: list[np.ndarray | None] = [p.source for p in held_out.pairs]
    photos: list[np.ndarray | None] = [p.image for p in held_out.pairs]
    grids = [prompt_grid("Same prompt and seed in every column", held_out.captions, ordered, sources, photos)]
    for name in methods:
        grids += extremes(name, seen[name].values, held_out.captions, ordered, sources, photos)[:1]
    page = Page(
        title="Comparison of " + ", ".join(methods) + (f" · {request.mode}" if request.mode else ""),
        table=table,
        command=request.command,
        summary={"Methods": str(len(methods)), "Prompts": str(count), "Baseline": first},
        grids=grids,
        plots=plots,
        sheets=sheets,
    )
    publish(request.output, page, console, on_page)
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


def _trained_on(request: CompareRequest, count: int) -> list[tuple[str, dict[str, PairDataset]]]:
    """The data of all runs, each once, the first one's first: names of its runs, and its splits."""
    found: dict[str, tuple[DataConfig, list[str]]] = {}
    for spec in request.runs:
        name, path, _ = parse_spec(spec)
        if not (path / METADATA).is_file():
            data = enlarged(read_config(path).data, request.split, count)
            found.setdefault(repr(data), (data, []))[1].append(name)
    return [(", ".join(names), load_splits(data)) for data, names in found.values()]


def _split(request: CompareRequest) -> str:
    """Of which split the pictures are, where runs or folders that one was drawn into say it; anybody's do not."""
    known = set()
    for spec in request.runs:
        path = parse_spec(spec)[1]
        if not (path / METADATA).is_file():
            known.add(request.split)
        elif (path / SETTINGS).is_file():
            known.add(str(json.loads((path / SETTINGS).read_text(encoding="utf-8")).get("split", "given")))
    return " and ".join(sorted(known)) or "given"


def _settings(specs: Sequence[str]) -> list[str]:
    """How each run draws, for the protocol."""
    found = []
    for spec in specs:
        name, path, strength = parse_spec(spec)
        if not (path / METADATA).is_file():
            cfg = read_config(path)
            s = cfg.sampling
            source = s.source_guidance_scale if cfg.conditioning == "source" else None
            words = sampling_words(s.scheduler, s.num_inference_steps, s.guidance_scale, source, s.method)
            found.append(f"{name}: {words}, strength {drawn_strength(cfg, strength):g}")
    return found
