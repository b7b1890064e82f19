"""``evaluate.py images=<folder> reference=<folder>``: anybody's pictures against anybody's real photos.

Pictures are read, looked at and forgotten batch by batch. Under torchrun every process takes every W-th picture; the
numbers are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lora_dae.backbone.precision import best_device
from lora_dae.config import ConfigError, EvaluationConfig
from lora_dae.evaluation import folders
from lora_dae.evaluation.controls import blurred, over_sharpened
from lora_dae.evaluation.folders import PictureFolder
from lora_dae.evaluation.metrics import feature_cache
from lora_dae.evaluation.metrics.extras import load_extras
from lora_dae.evaluation.metrics.features import load_features, stack_images
from lora_dae.evaluation.metrics.measure import BATCH, summarize
from lora_dae.evaluation.metrics.observe import Batch, Meters, Observed, gathered, observe, share
from lora_dae.evaluation.metrics.sizes import add_infinity, size_curves
from lora_dae.evaluation.references import FLOOR
from lora_dae.evaluation.report.examples import EXTREMES, PictureGrid, prompt_grid, rows_that_fit
from lora_dae.evaluation.report.page import OnPage, Page, check_writable, publish
from lora_dae.evaluation.report.plots import plot_band_power, plot_sizes
from lora_dae.evaluation.report.protocol import Protocol, of_pairs, size_warnings
from lora_dae.evaluation.report.table import MetricValue, ResultsTable

Make = Callable[[np.ndarray], np.ndarray]
DAMAGED: dict[str, Make] = {"reference, blurred": blurred, "reference, over-sharpened": over_sharpened}


@dataclass(frozen=True)
class FolderRequest:
    """``paired``: pictures of one name show one thing; ``train``: what was trained on (overlap, floor).

    ``masks``: bright where the garment of that name is; only with ``paired``.
    """

    images: Path
    reference: Path
    train: Path | None
    masks: Path | None
    paired: bool
    resolution: int | None
    cache_dir: Path
    seed: int
    output: Path
    command: str


def evaluate_folder(
    request: FolderRequest, cfg: EvaluationConfig, console: Console, on_page: OnPage | None = None
) -> ResultsTable | None:
    """Measure, write the page into ``request.output``, and return the table (None on all processes but the first).

    Raises ConfigError before anything is measured: folders that are empty, too small, of mixed or different sizes, hold
    grids, gray pictures, two kinds of photos or names without partner, a reference that was trained on.
    """
    images, reference, train, masks, warnings = _check(request, cfg)
    check_writable(request.output)
    start_processes()
    if dist.is_initialized() and dist.get_world_size() > min(len(images), len(reference)):
        raise ConfigError(f"{dist.get_world_size()} processes are more than there are pictures: start fewer.")
    resolution = request.resolution or min(images.size or (0, 0))
    extractor = load_features(cfg.features).to(best_device())
    extras = load_extras(cfg, resolution, None, request.paired)
    extractors = (extractor, *extras.more)
    plain, full = Meters(extractors), Meters(extractors, perceptual=extras.perceptual if request.paired else {})
    first, not_kept = rank() == 0, ""
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not first) as progress:

        def look(
            label: str,
            folder: PictureFolder,
            meters: Meters,
            target: PictureFolder | None,
            make: Make,
            inside: PictureFolder | None,
        ) -> Observed:
            task = progress.add_task(label, total=len(share(len(folder))))
            batches = _batches(folder, target, inside, request.resolution, make, lambda k: progress.advance(task, k))
            return gathered(observe(batches, meters))

        def real_side(label: str, folder: PictureFolder, inside: PictureFolder | None) -> Observed:
            nonlocal not_kept
            how, files = f"{request.resolution}:{'whole' if inside is None else 'garment'}", folder.files
            files = files if inside is None else [*files, *inside.files]
            path = feature_cache.cache_path(request.cache_dir, files, extractors, how)
            kept = feature_cache.load(path, extractors)
            if not agreed(kept is not None) or kept is None:
                kept = look(label, folder, plain, None, _as_is, inside)
                if first:
                    try:
                        feature_cache.store(path, kept)
                    except ConfigError as error:  # costs the next evaluation time, and this one nothing
                        not_kept = f"features of real pictures are not kept for the next time: {error}"
            return kept

        target = reference if request.paired else None
        real = real_side("reference", reference, masks)
        seen = look("images", images, full, target, _as_is, masks)
        others: dict[str, tuple[Observed, Observed, bool]] = {}
        if train is not None and len(train) >= len(images):  # a distance depends on the number of images
            some = torch.linspace(0, len(train) - 1, len(images)).round().long()
            # Of these no garment is known: whole pictures against whole ones.
            whole = real if masks is None else real_side("reference, whole", reference, None)
            others[FLOOR] = (real_side("training photos", train, None).take(some), whole, False)
        if cfg.controls:
            for name, make in DAMAGED.items():
                others[name] = (look(name, reference, full, target, make, masks), real, True)
    if not first:
        return None
    if not_kept:
        console.print(not_kept, soft_wrap=True, highlight=False, markup=False)
    name = request.images.name or "images"
    methods: dict[str, dict[str, MetricValue]] = {
        name: summarize(seen, real, extractors, cfg.bootstrap, request.seed, request.paired)
    }
    references = {
        row: summarize(other, against, extractors, cfg.bootstrap, request.seed, together)
        for row, (other, against, together) in others.items()
    }
    protocol = _protocol(
        request, cfg, images, reference, [*warnings, *size_warnings(len(images), len(reference), 0)],
        extras.definitions, extras.not_available,
    )  # fmt: skip
    curves = size_curves({name: seen}, methods, real.features, extractors, request.seed)
    add_infinity(methods, curves, protocol)
    table = ResultsTable(methods, protocol, references, curves)
    console.print(table.rich())  # first: whatever becomes of the files, the numbers are there
    spectra = {
        name: seen.power.spectrum(),
        **{row: other.power.spectrum() for row, (other, against, _) in others.items() if against is real},
    }
    plots = [plot_band_power(spectra, real.power.spectrum(), request.output / "plots" / "band_power.svg")]
    page = Page(
        title=f"{name} against {request.reference.name}",
        table=table,
        command=request.command,
        summary={"Images": str(request.images), "Reference": str(request.reference)},
        grids=_grids(request, name, images, reference, seen.values),
        plots=[*plots, *plot_sizes(curves, request.output / "plots")],
    )
    publish(request.output, page, console, on_page)
    return table


def start_processes() -> None:
    """Join the others where torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def agreed(known: bool) -> bool:
    """Whether all processes say so (each may have a disk of its own): else one would wait for others in vain."""
    if not dist.is_initialized():
        return known
    said: list[bool | None] = [None] * dist.get_world_size()
    dist.all_gather_object(said, known)
    return all(said)


def _check(
    request: FolderRequest, cfg: EvaluationConfig
) -> tuple[PictureFolder, PictureFolder, PictureFolder | None, PictureFolder | None, list[str]]:
    if request.resolution is not None and request.resolution < 16:
        raise ConfigError(f"resolution={request.resolution} is below 16: give e.g. 256.")
    for option in ("lpips", "dists"):
        if not request.paired and getattr(cfg, option):
            raise ConfigError(f"{option} compares pictures one by one: give paired=true, or leave it out.")
    if request.masks is not None and not request.paired:
        raise ConfigError("masks say where the garment is in both pictures of one name: give paired=true with them.")
    images = folders.scan("images", request.images)
    reference = folders.scan("reference", request.reference)
    if request.images.resolve() == request.reference.resolve():
        raise ConfigError(f"images and reference are one folder ({request.images}): name two.")
    warnings = folders.check_pictures(images, reference, request.resolution)
    if request.paired:
        reference = folders.check_names(images, reference)
        if request.resolution is not None:
            folders.check_aspects(images, reference)
    masks = None if request.masks is None else folders.check_masks(images, folders.scan("masks", request.masks))
    train = None
    if request.train is not None:
        train = folders.scan("train", request.train)
        if request.resolution is None and train.size != reference.size:
            raise ConfigError(f"{train.where} has not the reference's size: give resolution=256, say.")
        folders.check_overlap(reference, train)
    return images, reference, train, masks, warnings


def _as_is(image: np.ndarray) -> np.ndarray:
    return image


def _batches(
    folder: PictureFolder,
    target: PictureFolder | None,
    masks: PictureFolder | None,
    resolution: int | None,
    make: Make,
    told: Callable[[int], None],
) -> Iterator[Batch]:
    """This process's share of a folder, in batches."""
    index = list(share(len(folder)))
    pictures = folders.read(folder, index, resolution)
    partners = None if target is None else folders.read(target, index, resolution)
    garments = None if masks is None else folders.read_masks(masks, index, resolution)
    for start in range(0, len(index), BATCH):
        count = len(index[start : start + BATCH])
        images = stack_images([make(next(pictures)) for _ in range(count)]).float() / 255
        real = None if partners is None else stack_images([next(partners) for _ in range(count)]).float() / 255
        inside = None if garments is None else torch.from_numpy(np.stack([next(garments) for _ in range(count)]))
        yield Batch(images, real, masks=None if inside is None else (inside > 127).float())
        told(count)


def _grids(
    request: FolderRequest, name: str, images: PictureFolder, reference: PictureFolder, values: dict[str, Tensor]
) -> list[PictureGrid]:
    """The first pictures, beside their partners where they have some, and the best and worst."""
    side = request.resolution or (images.size or (256, 256))[0]
    if not request.paired:
        count = rows_that_fit(2, side * side)
        made, real = (list(folders.read(f, range(min(count, len(f))), request.resolution)) for f in (images, reference))
        rows = min(len(made), len(real))
        return [
            prompt_grid(
                "The first pictures of both folders (not of one thing)",
                [images.files[k].name for k in range(rows)],
                {name: made[:rows]},
                [None] * rows,
                list(real[:rows]),
                range(rows),
            )
        ]
    metric = "lpips_alex" if "lpips_alex" in values else "ssim"
    order = values[metric].argsort(descending=metric == "ssim").tolist()
    count = min(EXTREMES, len(order) // 2)
    extreme = [*order[:count], *order[::-1][:count]]
    notes = [f"{'best' if i < count else 'worst'}: {values[metric][k]:.3g}" for i, k in enumerate(extreme)]
    first = list(range(min(len(images), rows_that_fit(2, side * side))))
    found = []
    for title, chosen, said in (
        ("Pictures of one name, beside each other", first, None),
        (f"Best and worst by {metric}", extreme, notes),
    ):
        made, real = (list(folders.read(f, chosen, request.resolution)) for f in (images, reference))
        captions, none = [images.files[k].name for k in chosen], [None] * len(chosen)
        found.append(prompt_grid(title, captions, {name: made}, none, list(real), range(len(chosen)), said))
    return found


def _protocol(
    request: FolderRequest,
    cfg: EvaluationConfig,
    images: PictureFolder,
    reference: PictureFolder,
    warnings: list[str],
    definitions: list[str],
    not_available: dict[str, str],
) -> Protocol:
    mode = "paired" if request.paired else "sets"
    return Protocol(
        num_generated=len(images),
        num_reference=len(reference),
        split="given",
        resolution=request.resolution or (images.size or (0, 0))[0],
        sampler=None,
        steps=None,
        guidance_scale=None,
        source_guidance_scale=None,
        seeds=[],
        features=cfg.features,
        bootstrap=cfg.bootstrap,
        definitions=[*definitions, *of_pairs(mode)],
        not_available=dict(not_available),
        mode=mode,
        resize=folders.resizing(request.resolution),
        pixels=folders.described(images, request.resolution),
        files=folders.formats(images, reference),
        warnings=warnings,
    )
