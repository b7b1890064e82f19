"""``python -m lora_dae.data inspect``: what will be trained on, in numbers; ``sheet.py`` shows it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from lora_dae.config import ConfigError, DataConfig
from lora_dae.data.buckets import MAX_CROP, cut_share
from lora_dae.data.catalog import Facts, examine
from lora_dae.data.entry import RowBlob, pixels_as_file
from lora_dae.data.formats.shards import ShardPairs
from lora_dae.data.pair import Pair, PairDataset
from lora_dae.data.photos import PhotoPairs
from lora_dae.data.sources import load_splits

NEAR_BITS = 4  # of 64: a hash that differs in more is another photo
NEAR_LEVELS = 6.0  # mean absolute difference, of 255, of what is compared pixel by pixel then
OUTLIER = 8.0  # median absolute deviations (scaled to sigmas) from the median
TOKENS_PER_WORD = 1.35  # of CLIP's tokenizer on captions, for the estimate without a backbone
STOP_WORDS = frozenset("a an and the of in on with is are to for from at by wearing photo image".split())


@dataclass(frozen=True)
class Item:
    """One pair as it lies in its split; decodes nothing."""

    split: str
    index: int
    id: str
    caption: str
    facts: Facts
    size: tuple[int, int]  # H, W that it is trained in
    masked: bool
    paired: bool  # also where the source photo is not used, as others have none


@dataclass
class Survey:
    """What ``survey`` found; every list is in the order of the data."""

    items: list[Item]
    duplicates: list[tuple[Item, Item]] = field(default_factory=list)  # across splits
    outliers: list[tuple[Item, str]] = field(default_factory=list)
    empty_masks: list[Item] = field(default_factory=list)  # without a pixel of a garment
    words: list[tuple[str, int]] = field(default_factory=list)

    def of(self, split: str) -> list[Item]:
        return [item for item in self.items if item.split == split]

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(item.split for item in self.items))


def survey(cfg: DataConfig, splits: dict[str, PairDataset] | None = None) -> Survey:
    """Counts everything once. Raises ConfigError as training would."""
    splits = load_splits(cfg) if splits is None else splits
    found = Survey([item for name, pairs in splits.items() for item in _items(name, pairs)])
    found.duplicates = _duplicates(found, splits)
    found.outliers = _outliers(found.items)
    found.empty_masks = _empty_masks(found.items, splits)
    said = Counter(w for i in found.items for w in re.findall(r"[^\W_]+(?:-\w+)*", i.caption.lower()))
    found.words = [(word, count) for word, count in said.most_common(60) if word not in STOP_WORDS][:24]
    return found


def check_duplicates(found: Survey) -> None:
    """Raises ConfigError if a training photo is also validated or tested on."""
    leaks = [(a, b) for a, b in found.duplicates if a.split == "train"]
    if leaks:
        a, b = leaks[0]
        raise ConfigError(
            f"{len(leaks)} photos of the training split are in another split too ({a.id} of {a.split} = {b.id} of "
            f"{b.split}): give such photos one group_id, take them out, or accept it with --allow-duplicates."
        )


def print_survey(found: Survey, console: Console) -> None:
    """The table that people read first."""
    table = Table("", *found.splits, title="What will be trained on")
    rows: dict[str, list[str]] = defaultdict(list)
    for split in found.splits:
        items = found.of(split)
        sides = [(i.facts.width, i.facts.height) for i in items]
        words = [len(i.caption.split()) for i in items]
        rows["pairs"].append(str(len(items)))
        rows["width x height, median"].append("x".join(str(int(v)) for v in np.median(sides, axis=0)))
        rows["smallest, largest side"].append(f"{min(map(min, sides))}, {max(map(max, sides))}")
        rows["enlarged"].append(_count([i for i in items if _enlarged(i)], items))
        rows["cut above 5 % or filled"].append(_count([i for i in items if _cut(i) > MAX_CROP], items))
        rows["with source"].append(_count([i for i in items if i.paired], items))
        masked, empty = [i for i in items if i.masked], [i for i in found.empty_masks if i.split == split]
        rows["with mask"].append(_count(masked, items))
        rows["masks without a garment"].append(_count(empty, masked))
        rows["caption, words: median, most"].append(f"{np.median(words):.0f}, {max(words)}")
        long = [i for i, n in zip(items, words, strict=True) if n * TOKENS_PER_WORD + 2 > 77]
        rows["captions likely above 77 tokens"].append(_count(long, items))
        rows["different captions"].append(str(len({i.caption for i in items})))
        rows["with a remark (animated, CMYK, ...)"].append(_count([i for i in items if i.facts.remark], items))
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)
    sizes = Counter(i.size for i in found.items)
    console.print("sizes, width x height: " + ", ".join(f"{w}x{h} {n}" for (h, w), n in sizes.most_common(12)))
    console.print("words: " + ", ".join(f"{word} {count}" for word, count in found.words))
    console.print(f"the same photo in two splits: {len(found.duplicates)}; unusual in brightness or color: ", end="")
    console.print(f"{len(found.outliers)}")


def _count(some: list[Item], of: list[Item]) -> str:
    return f"{len(some)} ({len(some) / len(of):.0%})" if some else "0"


def _enlarged(item: Item) -> bool:
    return max(item.facts.width / item.size[1], item.facts.height / item.size[0]) < 1


def _cut(item: Item) -> float:
    return cut_share((item.facts.width, item.facts.height), (item.size[1], item.size[0]))


def _items(split: str, pairs: PairDataset) -> Iterator[Item]:
    ignored: frozenset[str] = pairs.ignored_sources if isinstance(pairs, PhotoPairs) else frozenset()
    for index in range(len(pairs)):
        pair = pairs[index]
        facts = _facts(pairs, index, pair)
        masked, paired = pair.key("mask") is not None, pair.key("source") is not None or pair.id in ignored
        yield Item(split, index, pair.id, pair.caption, facts, pair.size, masked, paired)


def _facts(pairs: PairDataset, index: int, pair: Pair) -> Facts:
    if isinstance(pairs, ShardPairs):
        return pairs.facts(index)["image"]
    if isinstance(pairs, PhotoPairs):
        return pairs.facts[index]["image"]
    pixels = pixels_as_file(pair.image)  # rendered: there is no file
    return examine(RowBlob(pair.id, "", lambda: pixels))


def _duplicates(found: Survey, splits: dict[str, PairDataset]) -> list[tuple[Item, Item]]:
    """Pairs of items of two splits that show the same photo, perhaps encoded or scaled anew.

    Hashes and mean colors say which may be alike; then their bytes, or their pixels, decide.
    """
    codes = np.array([int(item.facts.hash, 16) for item in found.items], np.uint64)
    colors = np.array([(item.facts.red, item.facts.green, item.facts.blue) for item in found.items], np.float32)
    close: list[tuple[int, int]] = []
    for split in found.splits[1:]:  # a split's items lie together: each is compared with those of the splits before
        first = next(k for k, item in enumerate(found.items) if item.split == split)
        for later in range(first, first + len(found.of(split))):
            near = np.flatnonzero(np.bitwise_count(codes[:first] ^ codes[later]) <= NEAR_BITS)
            alike = np.abs(colors[near] - colors[later]).max(axis=1, initial=0) < NEAR_LEVELS
            close += [(int(earlier), later) for earlier in near[alike]]
    tiny: dict[int, np.ndarray] = {}

    def pixels(position: int) -> np.ndarray:
        if position not in tiny:
            item = found.items[position]
            image = splits[item.split][item.index].image
            rows, columns = (np.linspace(0, side - 1, 48).round().astype(int) for side in image.shape[:2])
            tiny[position] = image[rows][:, columns].astype(np.float32)
        return tiny[position]

    same = []
    for a, b in sorted(close):
        one, other = found.items[a], found.items[b]
        if one.facts.digest == other.facts.digest or np.abs(pixels(a) - pixels(b)).mean() < NEAR_LEVELS:
            same.append((one, other))
    return same


def _empty_masks(items: list[Item], splits: dict[str, PairDataset]) -> list[Item]:
    """Items whose mask, as it is trained on, has no pixel of a garment; every mask is decoded."""

    def shows(item: Item) -> bool:
        mask = splits[item.split][item.index].mask
        return mask is not None and bool(mask.any())

    masked = [item for item in items if item.masked]
    with ThreadPoolExecutor() as pool:
        return [item for item, garment in zip(masked, pool.map(shows, masked), strict=True) if not garment]


def _outliers(items: list[Item]) -> list[tuple[Item, str]]:
    """Items far from the others in mean brightness or in one of two color axes."""
    if len(items) < 8:
        return []
    red, green, blue = (np.array([getattr(i.facts, c) for i in items]) for c in ("red", "green", "blue"))
    axes = {"brightness": (red + green + blue) / 3, "red against green": red - green, "blue against yellow": blue - red}
    found = []
    for name, values in axes.items():
        middle = np.median(values)
        spread = 1.4826 * np.median(np.abs(values - middle))
        for i in np.flatnonzero(np.abs(values - middle) > OUTLIER * max(spread, 1.0)):
            found.append((items[int(i)], f"{name} {values[i]:.0f}, usually {middle:.0f}"))
    return found
