"""Folders of anybody's pictures: what is in them, and everything that would make a number of them mean nothing."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from lora_dae.config import ConfigError
from lora_dae.data.decode import BadImageError, decode, open_image, upright_size
from lora_dae.data.masks import decode_mask
from lora_dae.data.square import fit_mask, fit_square

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
LOSSY = (".jpg", ".jpeg", ".webp")
GRAY = ("1", "L", "LA", "I", "I;16", "F")
LEAST = 2
AHEAD = 64  # pictures that are decoded while others are measured
WORKERS = 4
ALIKE = 1.02  # aspect ratios that are no further apart count as one: sizes are rounded to pixels


@dataclass(frozen=True)
class PictureFolder:
    """Files of one folder, in natural order of their names; ``size`` (width, height) of all, or None: they differ."""

    option: str  # how the user named it, for messages: images, reference, train
    path: Path
    files: list[Path]
    size: tuple[int, int] | None
    sizes: list[tuple[int, int]]
    gray: list[Path]  # one channel

    def __len__(self) -> int:
        return len(self.files)

    @property
    def where(self) -> str:
        return f"{self.option}={self.path}"


def scan(option: str, path: Path, least: int = LEAST) -> PictureFolder:
    """The pictures directly in a folder, headers read. Raises ConfigError: no folder, too few, unreadable ones."""
    if not path.is_dir():
        raise ConfigError(f"{option}={path} is no folder: give a folder of pictures.")
    files = sorted((f for f in path.iterdir() if f.suffix.lower() in SUFFIXES), key=_natural)
    if not files:
        below = any(f.suffix.lower() in SUFFIXES for f in path.rglob("*"))
        advice = "pictures are in its subfolders, name one of these" if below else "give a folder of pictures"
        raise ConfigError(f"{option}={path} holds no picture ({', '.join(SUFFIXES)}): {advice}.")
    if len(files) < least:
        raise ConfigError(
            f"{option}={path} holds {len(files)} picture(s), a distance needs at least {least}: add some."
        )
    sizes, gray = [], []
    for file in files:
        try:
            photo = open_image(file.read_bytes())
            sizes.append(upright_size(photo))
        except (BadImageError, OSError) as error:
            raise ConfigError(f"{file} {_reason(error)}: replace it or take it out.") from error
        if photo.mode in GRAY:
            gray.append(file)
    different = set(sizes)
    return PictureFolder(option, path, files, sizes[0] if len(different) == 1 else None, sizes, gray)


def check_pictures(images: PictureFolder, reference: PictureFolder, resolution: int | None) -> list[str]:
    """Raises ConfigError where numbers would mean nothing; returns warnings for what only makes them say less."""
    _no_grids(images)
    _one_kind(reference)
    if resolution is None:
        for folder in (images, reference):
            if folder.size is None:
                some = ", ".join(f"{w} x {h}" for (w, h), _ in Counter(folder.sizes).most_common(3))
                raise ConfigError(
                    f"{folder.where} holds pictures of {len(set(folder.sizes))} sizes ({some}): give resolution=256, "
                    "say, to scale all of them (Lanczos) and pad them to squares."
                )
        if images.size != reference.size:
            raise ConfigError(
                f"{images.where} is {_size(images.size)}, {reference.where} is {_size(reference.size)}: measure both "
                "at one resolution, resolution=256, say."
            )
    for one, other in ((images, reference), (reference, images)):
        if one.gray and not other.gray:
            raise ConfigError(
                f"{one.where} holds {len(one.gray)} grayscale picture(s) ({one.gray[0].name}), {other.where} none: "
                "a distance would measure the missing color; take them out, or make both gray."
            )
    return [*_about_files(images, reference), *_about_shape(images, reference, resolution)]


def check_names(images: PictureFolder, reference: PictureFolder) -> PictureFolder:
    """For paired=true: ``reference`` (or masks) in the order of the images. ConfigError where a name has no partner."""
    for one in (images, reference):
        twice = [stem for stem, count in Counter(file.stem for file in one.files).items() if count > 1]
        if twice:
            raise ConfigError(f"{one.where} has two files called {twice[0]}: with paired=true names must differ.")
    known = {file.stem: k for k, file in enumerate(reference.files)}
    stems = [file.stem for file in images.files]
    alone = [(s, images, reference) for s in stems if s not in known]
    alone += [(s, reference, images) for s in sorted(set(known) - set(stems))]
    for stem, folder, other in alone[:1]:
        raise ConfigError(
            f"{folder.where} has {stem} and {other.where} has not: with paired=true every picture needs a partner of "
            "its name in the other folder."
        )
    order = [known[stem] for stem in stems]
    files, sizes = [reference.files[k] for k in order], [reference.sizes[k] for k in order]
    return PictureFolder(reference.option, reference.path, files, reference.size, sizes, reference.gray)


def check_aspects(images: PictureFolder, reference: PictureFolder) -> None:
    """For paired=true at a resolution, partners in order. Raises ConfigError where two would not lie on each other."""
    for file, (w, h), partner, (x, y) in zip(images.files, images.sizes, reference.files, reference.sizes, strict=True):
        if abs(w * y - h * x) > max(w + h, x + y):  # more than a pixel on each side
            raise ConfigError(
                f"{file} is {w} x {h}, its partner {partner} {x} x {y}: padded to squares they would "
                "not lie on each other; crop one as the other."
            )


def check_masks(images: PictureFolder, masks: PictureFolder) -> PictureFolder:
    """Masks in the order of the images. Raises ConfigError where one is missing or of another size than its picture."""
    masks = check_names(images, masks)
    for file, size, picture in zip(masks.files, masks.sizes, images.sizes, strict=True):
        if size != picture:
            raise ConfigError(f"{file} is {_size(size)}, its picture {_size(picture)}: make masks as large as these.")
    return masks


def check_overlap(folder: PictureFolder, train: PictureFolder) -> None:
    """Raises ConfigError when pictures of ``folder`` are among the training pictures, told by their pixels."""
    trained = {contents: file for file, contents in _contents(train)}
    both = [(file, trained[contents]) for file, contents in _contents(folder) if contents in trained]
    if both:
        raise ConfigError(
            f"{len(both)} pictures of {folder.where} are in {train.where} too ({both[0][0].name} is "
            f"{both[0][1].name}): a reference must not have been trained on, take them out."
        )


def read(folder: PictureFolder, index: Sequence[int], resolution: int | None) -> Iterator[np.ndarray]:
    """The pictures at ``index`` as uint8 (H, W, 3) RGB, scaled and padded to a square where a resolution is given.

    Decoded a little ahead by threads; memory does not grow with their number. Raises ConfigError for a broken file.
    """

    def one(k: int) -> np.ndarray:
        photo = _decode(folder.files[k])
        return np.asarray(photo) if resolution is None else fit_square(photo, resolution, whole=True)

    return _ahead(one, index)


def read_masks(folder: PictureFolder, index: Sequence[int], resolution: int | None) -> Iterator[np.ndarray]:
    """The masks at ``index`` as uint8 (H, W) of 0 and 255 on the garment, scaled and padded as pictures are."""

    def one(k: int) -> np.ndarray:
        mask = _decode(folder.files[k], decode_mask)
        return binary_mask(mask) if resolution is None else fit_mask(mask, mask, resolution, whole=True)

    return _ahead(one, index)


def binary_mask(mask: Image.Image) -> np.ndarray:
    """What ``decode_mask`` gives as uint8 (H, W) of 0 and 255 on the garment."""
    return np.where(np.asarray(mask.convert("L")) >= 128, 255, 0).astype(np.uint8)


def _ahead(one: Callable[[int], np.ndarray], index: Sequence[int]) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor(WORKERS) as pool:
        rest = iter(index)
        waiting = [pool.submit(one, k) for k in islice(rest, AHEAD)]
        while waiting:
            picture = waiting.pop(0).result()
            waiting += [pool.submit(one, k) for k in islice(rest, 1)]
            yield picture


def described(images: PictureFolder, resolution: int | None) -> str:
    """For the protocol: the size at which both sets are measured."""
    return f"{_size(images.size) if resolution is None else f'{resolution} x {resolution}'} pixels"


def resizing(resolution: int | None) -> str:
    """For the protocol: how they came to that size."""
    if resolution is None:
        return "none: measured as they are"
    return f"Lanczos to {resolution} pixels on the long side, padded to a square with the edge's color, both sets alike"


def formats(*folders: PictureFolder) -> str:
    """For the protocol: which file formats each folder has."""
    return "; ".join(
        f"{f.option}: " + ", ".join(f"{n} {s}" for s, n in Counter(x.suffix.lower() for x in f.files).most_common())
        for f in folders
    )


def _no_grids(images: PictureFolder) -> None:
    usual, count = Counter(images.sizes).most_common(1)[0]
    for file, size in zip(images.files, images.sizes, strict=True):
        named = re.search(r"(^|[^a-z])(grid|contact_?sheet|collage)([^a-z]|$)", file.stem.lower())
        cells = [s / u for s, u in zip(size, usual, strict=True)]
        # Whole multiples of what the others are, up to a margin around each cell.
        large = 2 * count > len(images) and max(cells) >= 2 and all(c >= 1 and c % 1 < 0.1 * c for c in cells)
        if named or large:
            why = "by its name" if named else f"{_size(size)} where the others are {_size(usual)}"
            raise ConfigError(f"{file} is a grid of pictures ({why}): take it out, or name a folder of single ones.")


def _one_kind(reference: PictureFolder) -> None:
    """Dress Code keeps models (_0) and garments (_1) in one folder."""
    stems = {file.stem for file in reference.files}
    both = [s for s in stems if s.endswith("_0") and s[:-1] + "1" in stems]
    if len(both) > 0.25 * len(stems):
        raise ConfigError(
            f"{reference.where} holds two photos of each item ({both[0]} and {both[0][:-1]}1; in Dress Code the model "
            "and the garment): compare with one kind only, in a folder of its own."
        )


def _about_files(images: PictureFolder, reference: PictureFolder) -> list[str]:
    lossy = [any(f.suffix.lower() in LOSSY for f in folder.files) for folder in (images, reference)]
    if lossy == [False, False]:
        return []
    which = "both sets" if all(lossy) else images.where if lossy[0] else reference.where
    found = [f"{which}: lossy files (JPEG, WebP): compression alone moves distances and texture metrics"]
    return found if all(lossy) else [f"{found[0]}, and the other set is lossless"]


def _about_shape(images: PictureFolder, reference: PictureFolder, resolution: int | None) -> list[str]:
    found = []
    side = images.size
    if resolution is None and side is not None and side[0] != side[1]:
        found.append("the pictures are not square: feature networks squash them; resolution=256, say, pads them")
    if side is not None and max(side) >= 2 * min(side):
        found.append(f"{images.where} is {_size(side)}: if these are grids or pairs, cut them first")
    if resolution is not None:
        enlarged = sum(max(s) < resolution for s in images.sizes), sum(max(s) < resolution for s in reference.sizes)
        if any(enlarged):
            found.append(f"{sum(enlarged)} pictures are smaller than {resolution} pixels and are enlarged (blurred)")
        middle = [median(w / h for w, h in folder.sizes) for folder in (images, reference)]
        if max(middle) > ALIKE * min(middle):
            found.append(
                f"{images.where} has pictures of aspect ratio {middle[0]:.2f} (median), {reference.where} of "
                f"{middle[1]:.2f}: a distance measures how much is padding, too; crop both alike"
            )
    if len(images) != len(reference):
        found.append(f"{len(images)} against {len(reference)} pictures: compare only with the same two numbers")
    return found


def _contents(folder: PictureFolder) -> Iterator[tuple[Path, bytes]]:
    for k, pixels in enumerate(read(folder, range(len(folder)), None)):
        head = repr(pixels.shape).encode()
        yield folder.files[k], hashlib.blake2b(head + pixels.tobytes(), digest_size=16).digest()


def _decode(file: Path, decoder: Callable[[bytes], Image.Image] = decode) -> Image.Image:
    try:
        return decoder(file.read_bytes())
    except (BadImageError, OSError) as error:
        raise ConfigError(f"{file} {_reason(error)}: replace it or take it out.") from error


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, BadImageError) else f"cannot be read ({error})"


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _size(size: tuple[int, int] | None) -> str:
    return "of mixed sizes" if size is None else f"{size[0]} x {size[1]}"
