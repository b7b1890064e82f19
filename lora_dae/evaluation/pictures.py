"""Pictures of several methods for the same prompts and the same noise: what judges and people compare.

A folder of pictures holds images and ``metadata.jsonl``, one line an image: ``file_name`` and ``text`` (the prompt),
and where known ``attributes`` (a mapping), ``source``, ``real`` and ``mask`` (files beside it: the garment's photo, the
real photo, where the garment is in it), ``seed``. A run is drawn into such a folder (``<run>/pictures/...``) once.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from lora_dae.backbone.precision import best_device, draws_in_bf16
from lora_dae.config import Config, ConfigError, EvaluationConfig
from lora_dae.data.decode import BadImageError, decode
from lora_dae.data.masks import decode_mask
from lora_dae.data.sources import load_split
from lora_dae.evaluation.folders import binary_mask
from lora_dae.evaluation.heldout import HeldOut, enlarged
from lora_dae.evaluation.photo_mode import PhotoMode
from lora_dae.rules import check
from lora_dae.sampling.finished import read_config
from lora_dae.sampling.load import load_run

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
    suffix: str = ".png"  # of the picture's file


@dataclass(frozen=True)
class PictureSets:
    """``methods[name][i]`` is the picture, uint8 (H, W, 3), of ``items[i]``.

    ``from_source``: the methods that were given the source photos; the others drew from the prompts alone.
    ``files``: of each, how many there are of which format, in words.
    """

    items: list[Item]
    methods: dict[str, list[np.ndarray]]
    from_source: frozenset[str] = frozenset()
    files: dict[str, str] = field(default_factory=dict)


def gather(
    specs: Sequence[str], split: str, count: int | None, console: Console, mode: PhotoMode | None = None
) -> PictureSets:
    """Pictures of every method named by ``[name=]<run or folder>[@strength]``, at most ``count`` of each.

    ``count``: None is all that finished folders hold, or ``evaluation.num_samples``'s default where a run is among the
    methods. The first method's items lead, with what only others know of them; every other must have the same prompts
    (and seeds, where given). ``mode``: the real photos are given, which is compared with nothing else. Raises
    ConfigError when a path is neither run nor folder of pictures, names repeat, or prompts, seeds or sizes differ.
    """
    if count is not None and count < 1:
        raise ConfigError(f"num_samples={count} is below 1: give at least 1.")
    folders = find_methods(specs, split, mode)
    if count is None and None in folders:
        count = EvaluationConfig().num_samples
    parsed = [parse_spec(spec) for spec in specs]
    names = [name for name, _, _ in parsed]
    items: list[Item] = []
    methods: dict[str, list[np.ndarray]] = {}
    from_source: set[str] = set()
    files: dict[str, str] = {}
    for name, folder, (_, path, strength) in zip(names, folders, parsed, strict=True):
        if folder is None:
            assert count is not None  # as this is a run
            own, images = read_pictures(*draw_pictures(path, strength, split, count, console, mode))
        else:
            own, images = read_pictures(folder, count)
            if (held := _held(folder)) > len(own):
                console.print(f"{name}: {len(own)} of {held} pictures", soft_wrap=True, highlight=False, markup=False)
        if items:
            _same(items, own, name, names[0])
            items = [_merged(a, b) for a, b in zip(items, own, strict=True)]
        else:
            items = own
        methods[name] = images
        files[name] = ", ".join(f"{n} {suffix}" for suffix, n in Counter(item.suffix for item in own).most_common())
        if all(item.source is not None for item in own):
            from_source.add(name)
    shapes = {image.shape for images in methods.values() for image in images}
    if len(shapes) > 1:
        sizes = ", ".join(f"{s[1]} x {s[0]}" for s in sorted(shapes))
        raise ConfigError(f"the pictures have different sizes ({sizes}): compare methods at one resolution.")
    return PictureSets(items, methods, frozenset(from_source), files)


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
) -> tuple[Path, int]:
    """Draw a run's held-out pictures into ``<run>/pictures/<split>_strength_<s>``, unless they are there already.

    ``mode``: from the real photos, into a folder of its own. Returns the folder and how many of its pictures were asked
    for: it may hold more.
    """
    cfg = read_config(run_dir)
    strength = drawn_strength(cfg, strength)
    if strength > 0 and (not cfg.enhancement.enabled or cfg.enhancement.placement == "none"):
        raise ConfigError(f"{run_dir} was trained without enhancement: give it without @{strength:g}, or with @0.")
    enhancement, data = replace(cfg.enhancement, strength=strength), enlarged(cfg.data, split, count)
    cfg = replace(cfg, enhancement=enhancement, data=data)
    check(cfg, trains=False)
    held_out = HeldOut.take(load_split(cfg.data, split), count, cfg.conditioning)
    if len(held_out.pairs) < count:
        found = f"{run_dir.name}: the {split} split has {len(held_out.pairs)} pairs, not the {count} asked for"
        console.print(f"{found}: all are taken", soft_wrap=True, highlight=False, markup=False)
    folder = run_dir / "pictures" / (f"{split}_strength_{strength:g}" + ("" if mode is None else mode.folder))
    device = best_device()
    bf16 = draws_in_bf16(cfg, device)
    settings = {
        "format": FORMAT, "strength": strength, "split": split, "count": len(held_out.pairs),
        "sampling": vars(cfg.sampling), "bf16": bf16,
        "pairs": [[p.caption, *(p.key(part) for part in ("image", "source", "mask"))] for p in held_out.pairs],
        "adapter": [[f.name, f.stat().st_mtime_ns] for f in sorted((run_dir / "adapter").rglob("*.safetensors"))],
    }  # fmt: skip
    if mode is not None:
        settings |= {"mode": mode.name, "noise_strength": mode.noise_strength}
    stamp = folder / SETTINGS
    if _holds(stamp, settings):
        return folder, len(held_out.pairs)
    run = load_run(run_dir, device)
    run.cfg = cfg
    with console.status(f"drawing {len(held_out.pairs)} pictures of {run_dir.name}"):
        drawer = run.drawer(bf16)
        keep = None if mode is None else mode.keep(held_out, run.backbone)
        start = None if mode is None else mode.start(held_out, run.backbone)
        images = drawer.images(held_out.captions, held_out.sources, strength, keep=keep, start=start)
    stamp.unlink(missing_ok=True)
    write_pictures(folder, _items(held_out, cfg.sampling.seed), list(images))
    stamp.write_text(json.dumps(settings, indent=1), encoding="utf-8")  # last: a killed drawing starts again
    return folder, len(held_out.pairs)


def drawn_strength(cfg: Config, strength: float | None) -> float:
    """The strength that a run is drawn with where ``strength`` is asked for; None is its own."""
    own = cfg.enhancement.strength if cfg.enhancement.enabled and cfg.enhancement.placement != "none" else 0.0
    return own if strength is None else strength


def _holds(stamp: Path, settings: dict[str, Any]) -> bool:
    """Whether what was drawn begins with the pairs of these settings: each picture has the noise of its own number."""
    if not stamp.is_file():
        return False
    asked, drawn = json.loads(json.dumps(settings)), json.loads(stamp.read_text(encoding="utf-8"))
    pairs = asked["pairs"]
    drawn["pairs"] = drawn.get("pairs", [])[: len(pairs)]
    return bool(drawn | {"count": len(pairs)} == asked)


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
    # Not splitlines(): JSON strings may hold other line separators than the newline.
    lines = (folder / METADATA).read_text(encoding="utf-8").split("\n")
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
            known["mask"] = binary_mask(_decoded(folder / row["mask"], where, decode_mask))
        attributes = row.get("attributes")
        file, seed = Path(row["file_name"]), row.get("seed")
        items.append(Item(file.stem, row["text"], attributes, **known, seed=seed, suffix=file.suffix.lower()))
    if not items:
        raise ConfigError(f"{folder} holds no picture: {METADATA} is empty.")
    return items, images


def _held(folder: Path) -> int:
    """How many pictures a folder's metadata names."""
    return sum(bool(line.strip()) for line in (folder / METADATA).read_text(encoding="utf-8").split("\n"))


def _merged(a: Item, b: Item) -> Item:
    """``a``, and what only ``b`` knows of the same prompt."""
    news = {key: getattr(b, key) for key in ("source", "real", "mask", "attributes") if getattr(a, key) is None}
    return replace(a, **news)


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
    return np.asarray(_decoded(path, where, decode))


def _decoded(path: Path, where: str, decoder: Callable[[bytes], Image.Image]) -> Image.Image:
    """As ``images=`` reads a file: upright sRGB, or a mask."""
    try:
        return decoder(path.read_bytes())
    except BadImageError as error:
        raise ConfigError(f"{where}: the picture {path.name} {error}.") from error
    except OSError as error:
        raise ConfigError(f"{where}: the picture {path.name} cannot be read ({type(error).__name__}).") from error


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
