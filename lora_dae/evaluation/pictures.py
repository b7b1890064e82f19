"""Pictures of several methods for the same prompts and the same noise: what judges and people compare.

A folder of pictures holds images and ``metadata.jsonl``, one line an image: ``file_name`` and ``text`` (the prompt),
and where known ``attributes`` (a mapping), ``source``, ``real`` and ``mask`` (files beside it: the garment's photo, the
real photo, where the garment is in it), ``seed``. A run is drawn into such a folder (``<run>/pictures/...``) once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console

from lora_dae.backbone.precision import best_device, choose_precision
from lora_dae.config import ConfigError
from lora_dae.data.sources import load_split
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.photo_mode import PhotoMode
from lora_dae.rules import check
from lora_dae.sampling.load import load_run, read_config

METADATA = "metadata.jsonl"
SETTINGS = "settings.json"  # of a run's drawn folder
FORMAT = 2  # of a run's drawn folder; 1 had no masks


@dataclass(frozen=True)
class Item:
    """One prompt and what is known of it; images are uint8 (H, W, 3) RGB, the mask (of ``real``) uint8 (H, W)."""

    id: str
    prompt: str
    attributes: dict[str, str] | None = None
    source: np.ndarray | None = None
    real: np.ndarray | None = None
    seed: int | None = None
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class PictureSets:
    """``methods[name][i]`` is the picture, uint8 (H, W, 3), of ``items[i]``.

    ``from_source``: the methods that were given the source photos; the others drew from the prompts alone.
    """

    items: list[Item]
    methods: dict[str, list[np.ndarray]]
    from_source: frozenset[str] = frozenset()


def gather(
    specs: Sequence[str], split: str, count: int, console: Console, mode: PhotoMode | None = None
) -> PictureSets:
    """Pictures of every method named by ``[name=]<run or folder>[@strength]``, at most ``count`` of each.

    The first method's items lead; every other must have the same prompts (and seeds, where given). ``mode``: the
    real photos are given, which is compared with nothing else. Raises ConfigError when a path is
    neither run nor folder of pictures, names repeat, or prompts, seeds or sizes differ.
    """
    if count < 1:
        raise ConfigError(f"num_samples={count} is below 1: give at least 1.")
    folders = find_methods(specs, split, mode)
    parsed = [parse_spec(spec) for spec in specs]
    names = [name for name, _, _ in parsed]
    items: list[Item] = []
    methods: dict[str, list[np.ndarray]] = {}
    from_source: set[str] = set()
    for name, folder, (_, path, strength) in zip(names, folders, parsed, strict=True):
        found = folder or draw_pictures(path, strength, split, count, console, mode)
        own, images = read_pictures(found, count)
        if items:
            _same(items, own, name, names[0])
            items = [
                a if a.source is not None else replace(a, source=b.source) for a, b in zip(items, own, strict=True)
            ]
        else:
            items = own
        methods[name] = images
        if all(item.source is not None for item in own):
            from_source.add(name)
    shapes = {image.shape for images in methods.values() for image in images}
    if len(shapes) > 1:
        sizes = ", ".join(f"{s[1]} x {s[0]}" for s in sorted(shapes))
        raise ConfigError(f"the pictures have different sizes ({sizes}): compare methods at one resolution.")
    return PictureSets(items, methods, frozenset(from_source))


def find_methods(specs: Sequence[str], split: str, mode: PhotoMode | None = None) -> list[Path | None]:
    """Of every method the folder of finished pictures, None for a run; raises ``gather``'s errors, loading nothing."""
    if not specs:
        raise ConfigError(
            "runs=[] names no method: give run folders or folders of pictures, e.g. runs=[runs/a,runs/b]."
        )
    if split not in ("test", "val"):
        raise ConfigError(f"split={split} is unknown: use test or val.")
    parsed = [parse_spec(spec) for spec in specs]
    names = [name for name, _, _ in parsed]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"two methods have one name ({', '.join(names)}): tell them apart by names, \"runs=['a=runs/x',runs/y]\"."
        )
    return [_folder(path, strength, split, mode) for _, path, strength in parsed]


def parse_spec(spec: str) -> tuple[str, Path, float | None]:
    """``[name=]path[@strength]`` as (name, path, strength); the name is the folder's (and strength) by default."""
    match = re.fullmatch(r"(?:([^=/]+)=)?(.+?)(?:@([\d.]+))?", spec.strip())
    if match is None:
        raise ConfigError(f"runs: {spec!r} is no method: write path, path@strength or name=path.")
    name, path, strength = match.groups()
    try:
        number = None if strength is None else float(strength)
    except ValueError as error:
        raise ConfigError(f"runs: the strength in {spec!r} is no number: write e.g. path@0.5.") from error
    return name or Path(path).name + ("" if number is None else f" @{number:g}"), Path(path), number


def _folder(path: Path, strength: float | None, split: str, mode: PhotoMode | None) -> Path | None:
    """The folder of pictures that a path is, or None for a run; ConfigError for anything else."""
    if (path / METADATA).is_file():
        if strength is not None:
            raise ConfigError(f"{path} holds finished pictures: a strength can be given for a run only.")
        if mode is not None:
            raise ConfigError(f"{path} holds finished pictures, and mode={mode.name} draws its own: give run folders.")
        drawn = json.loads((path / SETTINGS).read_text(encoding="utf-8")) if (path / SETTINGS).is_file() else {}
        if given := drawn.get("mode"):
            raise ConfigError(
                f"{path} holds pictures of mode={given}, which are compared with no others: give runs and mode={given}."
            )
        return path
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist: give a run folder, or a folder of pictures with {METADATA}.")
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} is neither a run nor a folder of pictures (no {METADATA}): give one of these.")
    cfg = read_config(path)
    if mode is not None:
        mode.check(cfg, split)
    return None


def draw_pictures(
    run_dir: Path, strength: float | None, split: str, count: int, console: Console, mode: PhotoMode | None = None
) -> Path:
    """Draw a run's held-out pictures into ``<run>/pictures/<split>_strength_<s>``, unless they are there already.

    ``mode``: from the real photos, into a folder of its own.
    """
    cfg = read_config(run_dir)
    own = cfg.enhancement.strength if cfg.enhancement.enabled and cfg.enhancement.placement != "none" else 0.0
    strength = own if strength is None else strength
    if strength > 0 and (not cfg.enhancement.enabled or cfg.enhancement.placement == "none"):
        raise ConfigError(f"{run_dir} was trained without enhancement: give it without @{strength:g}, or with @0.")
    cfg = replace(cfg, enhancement=replace(cfg.enhancement, strength=strength))
    check(cfg, trains=False)
    held_out = HeldOut.take(load_split(cfg.data, split), count, cfg.conditioning)
    folder = run_dir / "pictures" / (f"{split}_strength_{strength:g}" + ("" if mode is None else mode.folder))
    settings = {
        "format": FORMAT, "strength": strength, "split": split, "count": len(held_out.pairs),
        "sampling": vars(cfg.sampling),
        "pairs": [[p.caption, *(p.key(part) for part in ("image", "source", "mask"))] for p in held_out.pairs],
        "adapter": [[f.name, f.stat().st_mtime_ns] for f in sorted((run_dir / "adapter").rglob("*.safetensors"))],
    }  # fmt: skip
    if mode is not None:
        settings |= {"mode": mode.name, "noise_strength": mode.noise_strength}
    stamp = folder / SETTINGS
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == json.loads(json.dumps(settings)):
        return folder
    device = best_device()
    run = load_run(run_dir, device)
    run.cfg = cfg
    with console.status(f"drawing {len(held_out.pairs)} pictures of {run_dir.name}"):
        drawer = run.drawer(choose_precision("auto", device) == "bf16-mixed")
        keep = None if mode is None else mode.keep(held_out, run.backbone)
        start = None if mode is None else mode.start(held_out, run.backbone)
        images = drawer.images(held_out.captions, held_out.sources, strength, keep=keep, start=start)
    stamp.unlink(missing_ok=True)
    write_pictures(folder, _items(held_out, cfg.sampling.seed), list(images))
    stamp.write_text(json.dumps(settings, indent=1), encoding="utf-8")  # last: a killed drawing starts again
    return folder


def _items(held_out: HeldOut, seed: int) -> list[Item]:
    return [
        Item(f"{k:04d}", p.caption, p.attributes, p.source, p.image, seed, p.mask) for k, p in enumerate(held_out.pairs)
    ]


def write_pictures(folder: Path, items: Sequence[Item], images: Sequence[np.ndarray]) -> None:
    """Write a folder of pictures (PNG) and its metadata."""
    lines = []
    for item, image in zip(items, images, strict=True):
        row: dict[str, Any] = {"file_name": f"{item.id}.png", "text": item.prompt, "seed": item.seed}
        _save(image, folder / f"{item.id}.png")
        if item.attributes is not None:
            row["attributes"] = item.attributes
        for key, known in (("source", item.source), ("real", item.real), ("mask", item.mask)):
            if known is not None:
                row[key] = f"{key}/{item.id}.png"
                _save(known, folder / row[key])
        lines.append(json.dumps(row, ensure_ascii=False))
    (folder / METADATA).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_pictures(folder: Path, count: int | None = None) -> tuple[list[Item], list[np.ndarray]]:
    """Items and pictures of a folder, in the order of metadata.jsonl; ConfigError names the line that is wrong."""
    items: list[Item] = []
    images: list[np.ndarray] = []
    lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate((line for line in lines if line.strip()), start=1):
        if count is not None and len(items) == count:
            break
        where = f"{folder / METADATA}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where} is no JSON ({error.msg}): write one object a line.") from error
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("file_name"), str)
            or not isinstance(row.get("text"), str)
        ):
            raise ConfigError(f'{where} needs "file_name" and "text" as strings.')
        if any(not isinstance(row.get(key), str | None) for key in ("source", "real", "mask")) or not isinstance(
            row.get("attributes"), dict | None
        ):
            raise ConfigError(f'{where}: "source", "real" and "mask" must be file names, "attributes" an object.')
        images.append(_load(folder / row["file_name"], where))
        known = {key: _load(folder / row[key], where) if row.get(key) else None for key in ("source", "real")}
        if row.get("mask"):
            known["mask"] = _load(folder / row["mask"], where).max(axis=2)
        attributes = row.get("attributes")
        items.append(Item(Path(row["file_name"]).stem, row["text"], attributes, **known, seed=row.get("seed")))
    if not items:
        raise ConfigError(f"{folder} holds no picture: {METADATA} is empty.")
    return items, images


def _same(items: Sequence[Item], other: Sequence[Item], name: str, first: str) -> None:
    if len(items) != len(other):
        raise ConfigError(f"{name} has {len(other)} pictures and {first} {len(items)}: give the same prompts to both.")
    for a, b in zip(items, other, strict=True):
        if a.prompt != b.prompt:
            raise ConfigError(
                f"{name} and {first} differ in prompt {b.id} ({b.prompt!r}, {a.prompt!r}): draw both anew."
            )
        if a.real is not None and b.real is not None and not np.array_equal(a.real, b.real):
            raise ConfigError(f"{name} and {first} have another real photo for {b.id}: draw both from the same data.")
        if None not in (a.seed, b.seed) and a.seed != b.seed:
            raise ConfigError(f"{name} was drawn with seed {b.seed}, {first} with {a.seed}: draw both with one seed.")


def _load(path: Path, where: str) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{where}: the picture {path.name} cannot be read ({type(error).__name__}).") from error


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
