"""From ``data.*`` to the three splits, whatever the source."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from rich.console import Console

from lora_dae.config import Config, ConfigError, DataConfig
from lora_dae.data.captions import prepare_captions
from lora_dae.data.catalog import BadFile, Catalog, Facts, check_bad, check_shape, say_once
from lora_dae.data.entry import Entry
from lora_dae.data.formats import shards
from lora_dae.data.masks import add_masks
from lora_dae.data.pair import PairDataset
from lora_dae.data.photos import Fit, PhotoPairs
from lora_dae.data.splits import FactsById, check_splits, count_shared, split_entries, spread
from lora_dae.data.square import Framing
from lora_dae.data.studio.dataset import StudioDataset

FRAMED = 64  # training photos that tell how most are framed
ALIKE = 0.9  # of them; below it is said that they were not
console = Console(stderr=True)


def load_splits(cfg: DataConfig) -> dict[str, PairDataset]:
    """train, val and test. The studio is rendered if its cache is empty; photos are checked file by file."""
    if cfg.name == "shards":
        check_outside(cfg, Path(cfg.cache_dir), "data.cache_dir")
        return shards.load(cfg)
    if cfg.name != "studio":
        return dict(load_photos(cfg))
    return {split: _studio(cfg, split) for split in ("train", "val", "test")}


def load_split(cfg: DataConfig, name: str) -> PairDataset:
    """One of ``load_splits``; for it the studio renders no other."""
    return _studio(cfg, name) if cfg.name == "studio" else load_splits(cfg)[name]


def _studio(cfg: DataConfig, split: str) -> StudioDataset:
    size = {"train": cfg.train_size, "val": cfg.val_size, "test": cfg.test_size}[split]
    return StudioDataset(cfg.cache_dir, "target", split, size, cfg.seed, cfg.resolution, cfg.difficulty)


def list_entries(cfg: DataConfig) -> list[Entry]:
    """What the source lists, as it lists it. Raises ConfigError, in one sentence, at what is wrong."""
    layout = None if cfg.name == "studio" else import_module(f"lora_dae.data.formats.{cfg.name}")
    if layout is None or not hasattr(layout, "read"):
        raise ConfigError(f"data={cfg.name} has no list of files to work on: do this with the data it was made of.")
    if licence_notice(cfg):
        say_once(f"licence  {licence_notice(cfg)}")
    return layout.read(cfg)[: cfg.max_images]


def licence_notice(cfg: DataConfig) -> str | None:
    """On what terms the publisher gives the data, where we know."""
    if cfg.name == "studio":
        return None
    return getattr(import_module(f"lora_dae.data.formats.{cfg.name}"), "NOTICE", None)


def read_entries(cfg: DataConfig) -> list[Entry]:
    """What the source lists, captions prepared, a mask for all or none, a split for all or none, ids that differ.

    Without ``data.missing_source=drop`` some may have a source photo and others none.
    """
    entries = add_masks(prepare_captions(_drop_missing(list_entries(cfg), cfg), cfg), cfg)
    without = [entry for entry in entries if entry.mask is None]
    if without and len(without) < len(entries):
        raise ConfigError(f"{without[0].where} has no mask but other lines do: give one to all lines or none.")
    check_splits(entries)
    if len({entry.id for entry in entries}) < len(entries):
        twice = next(id for id, count in Counter(entry.id for entry in entries).items() if count > 1)
        raise ConfigError(f"data.root={cfg.root} has two photos with the id {twice}: ids must differ.")
    return entries


def load_photos(cfg: DataConfig) -> dict[str, PhotoPairs]:
    """The splits ``train``, ``val`` and ``test`` of a source of photos.

    Every file is read and decoded here, or was before (``data.catalog``). What cannot be is left out and told;
    more than ``data.max_bad_fraction`` of that raises ConfigError, as everything does that is wrong.
    """
    fit = Fit.of(cfg)
    check_outside(cfg, Path(cfg.cache_dir), "data.cache_dir")
    entries, ignored = _all_or_no_source(read_entries(cfg))
    usable = check_files(entries, cfg)
    listed, facts = [entry for entry, _ in usable], {entry.id: f for entry, f in usable}
    splits = split_entries(listed, cfg.val_fraction, cfg.test_fraction, cfg.seed, facts)
    groups = _tell_garments(listed, splits, facts)
    if not all(splits.values()):
        raise ConfigError(
            f"data.root={cfg.root} has too few different photos ({groups}) to train, validate and test on: "
            "at least 3 are needed, and some in each published split."
        )
    leaking = len(usable) - sum(map(len, splits.values()))
    if leaking:
        console.print(f"{leaking} photos are left out: their garments are also in a published split that is held out")
    _tell([f["image"] for f in facts.values()], fit)
    splits["train"] = [entry for entry in splits["train"] for _ in range(entry.repeats)]
    splits |= {name: spread(splits[name]) for name in ("val", "test")}  # training shuffles by itself
    # Held-out photos are compared with drawn ones, so they have the one size that is drawn; the validation loss is
    # taken on them as they would be trained on.
    square = replace(fit, buckets=())
    return {
        name: PhotoPairs(
            part,
            [facts[entry.id] for entry in part],
            fit if name == "train" else square,
            mirror=cfg.flip and name == "train",
            trained=fit,
            ignored_sources=ignored,
        )
        for name, part in splits.items()
    }


def check_outside(cfg: DataConfig, path: Path, name: str) -> None:
    """Nothing is ever written into the data folder: raises ConfigError if ``path`` lies in it."""
    if cfg.root is None:
        return
    root = Path(cfg.root).expanduser()
    if root.is_dir() and path.expanduser().resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{name}={path} lies in data.root={cfg.root}, which is only read: choose another folder.")


def check_files(entries: list[Entry], cfg: DataConfig) -> list[tuple[Entry, dict[str, Facts]]]:
    """The entries all of whose files are readable, with what is known about these; tells about the others."""
    parts = [(i, part) for i, e in enumerate(entries) for part in ("image", "source", "mask") if getattr(e, part)]
    blobs = [getattr(entries[i], part) for i, part in parts]
    known: list[dict[str, Facts]] = [{} for _ in entries]
    for (i, part), facts in zip(parts, Catalog(cfg.cache_dir).facts(blobs), strict=True):
        known[i][part] = facts
    known = [check_shape(facts) for facts in known]
    bad: dict[str, BadFile] = {}
    for entry, facts_of in zip(entries, known, strict=True):
        for part, facts in facts_of.items():
            if facts.reason:
                name = getattr(entry, part).name
                reason = f"{facts.reason} (named by {entry.where})" if facts.reason == "is missing" else facts.reason
                bad[name] = BadFile(name, reason)
    table = check_bad(
        list(bad.values()),
        len(set(b.name for b in blobs)),
        cfg.max_bad_fraction,
        f"data.root={cfg.root}",
        cfg.cache_dir,
    )
    usable = [(e, f) for e, f in zip(entries, known, strict=True) if not any(x.reason for x in f.values())]
    if table is not None:
        console.print(
            f"{len(bad)} files cannot be used, so {len(entries) - len(usable)} of {len(entries)} pairs are left out: "
            f"see {table}",
            soft_wrap=True,
        )
    return usable


def check_source(cfg: Config, train: PairDataset) -> None:
    """conditioning=source needs pairs."""
    if cfg.conditioning == "source" and isinstance(train, PhotoPairs) and train.ignored_sources:
        raise ConfigError(
            f"conditioning=source needs a source photo per image, which only {len(train.ignored_sources)} in "
            f"{cfg.data.root} have: give the others one, leave them out by data.missing_source=drop, or use "
            "conditioning=none."
        )
    if cfg.conditioning == "source" and not train.has_source:
        raise ConfigError(
            f"conditioning=source needs a source photo per image, which {cfg.data.root} does not have: add a source "
            "column or folder, or use conditioning=none."
        )


def check_mask(cfg: Config, train: PairDataset) -> None:
    """objective.garment_weight needs to know where the garment is."""
    if cfg.objective.garment_weight != 1 and not train.has_mask:
        raise ConfigError(
            f"objective.garment_weight={cfg.objective.garment_weight:g} needs garment masks, which {cfg.data.root} "
            "does not have: add a mask column or folder, or leave it at 1."
        )


def framing_of(train: PairDataset) -> Framing:
    """How most photos of a split become squares, and their sources with them: by FRAMED from all over it.

    Rendered pairs are squares, and buckets hardly cut: there, a source photo stays whole.
    """
    if not isinstance(train, PhotoPairs | shards.ShardPairs):
        return Framing()
    background = train.fit.background
    found: list[bool] = []
    if train.fit.buckets:
        return Framing(background=background)
    for index in range(0, len(train), -(-len(train) // FRAMED)):
        try:
            pairs, row = (train, index) if isinstance(train, PhotoPairs) else train.find(index)
            found.append(pairs.keeps_whole(row))
        except (ConfigError, OSError):  # trained from the cache, and gone since: no reason to lose a training
            continue
    if not found:
        say_once("the training photos cannot be read any more: source photos will be padded and not cropped")
        return Framing(background=background)
    share = sum(found) / len(found)
    alike = max(share, 1 - share)
    return Framing(share >= 0.5, background, "" if alike >= ALIKE else f"{alike:.0%}")


def _drop_missing(entries: list[Entry], cfg: DataConfig) -> list[Entry]:
    """``data.missing_source``: without the entries that have no source photo, where any has one."""
    kept = [entry for entry in entries if entry.source is not None]
    if cfg.missing_source != "drop" or len(kept) in (0, len(entries)):
        return entries
    say_once(
        f"{len(entries) - len(kept)} of {len(entries)} photos have no source photo and are left out "
        "(data.missing_source=drop)"
    )
    return kept


def _all_or_no_source(entries: list[Entry]) -> tuple[list[Entry], frozenset[str]]:
    """Entries that all have a source photo, or none of them; and the ids whose source photo is ignored for that."""
    without = [entry for entry in entries if entry.source is None]
    if len(without) in (0, len(entries)):
        return entries, frozenset()
    say_once(
        f"{len(without)} of {len(entries)} photos have no source photo (the first: {without[0].where}), so those of "
        "the others are ignored; data.missing_source=drop leaves the photos without one out"
    )
    ignored = frozenset(entry.id for entry in entries if entry.source is not None)
    return [replace(entry, source=None) for entry in entries], ignored


def _tell_garments(listed: list[Entry], splits: dict[str, list[Entry]], facts: FactsById) -> int:
    """How many groups were split; says what the files themselves tell of garments and the groups do not."""
    groups = Counter(entry.group_id for part in splits.values() for entry in part)
    before = len({entry.group_id for entry in listed})
    if len(groups) < before:
        name, largest = groups.most_common(1)[0]
        say_once(
            f"photos of different groups are the same file or have the same source photo, so {before} groups are split "
            f"as {len(groups)} garments (the largest has {largest} photos, {name}); a published split decides instead"
        )
    shared = count_shared(splits, facts)
    if shared:
        say_once(
            f"{shared} of {len(splits['train'])} training photos are the same file as a held-out photo or have the "
            "same source photo: published splits are kept as they are, so not all garments that are measured are new "
            "(one group_id for both leaves such a photo out of training)"
        )
    return len(groups)


def _tell(photos: list[Facts], fit: Fit) -> None:
    """What a person should know about photos that are used: enlarged ones, first frames, converted colors."""
    if fit.buckets:
        say_once(
            f"trained in the sizes of data.buckets, drawn and measured in squares of {fit.resolution} x "
            f"{fit.resolution}: there, oblong photos are cropped or padded"
        )
    enlarged = 0
    for photo in photos:
        width, height = fit.size(photo)
        enlarged += photo.width < width and photo.height < height
    if enlarged:
        say_once(f"{enlarged} of {len(photos)} photos are smaller than they are trained at, and are enlarged")
    for remark, count in Counter(photo.remark for photo in photos if photo.remark).most_common(5):
        say_once(f"{count} of {len(photos)} photos: {remark}")
