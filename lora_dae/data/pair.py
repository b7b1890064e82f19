"""What a pair is: the one record that everything after a data source sees.

A pair is one fashion photo with its caption and, where there are any, the photo that it is drawn from and the
mask of the garment. Pixels are decoded when they are looked at and not before, so counting, splitting and
captioning a million photos touches none of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import numpy as np


@dataclass(frozen=True)
class Lazy:
    """Pixels that ``load`` decodes. ``key`` changes whenever a pixel would; ``shape`` is known beforehand."""

    load: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    key: str

    def mirrored(self) -> Lazy:
        return Lazy(lambda: self.load()[:, ::-1], self.shape, f"{self.key}-mirrored")


class Pixels:
    """A field of ``Pair``: assigned an array, a ``Lazy`` or None; read, it is the array (decoded once) or None."""

    def __init__(self, required: bool = False) -> None:
        self.required = required

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, pair: None, owner: type) -> Any: ...
    @overload
    def __get__(self, pair: Pair, owner: type) -> Any: ...
    def __get__(self, pair: Pair | None, owner: type) -> Any:
        if pair is None:  # the dataclass asks for the default
            if self.required:
                raise AttributeError(self.name)
            return None
        held = pair.__dict__[self.name]
        if isinstance(held, Lazy):
            held = pair.__dict__[self.name] = held.load()
        return held

    def __set__(self, pair: Pair, value: np.ndarray | Lazy | None) -> None:
        pair.__dict__[self.name] = value
        pair.__dict__[f"_{self.name}"] = value  # as given, for key and shape


@dataclass(frozen=True)
class Pair:
    """One example.

    =============  ========================================================================================
    ``id``         unique in its data set
    ``group_id``   what shows one garment: all of a group lies in one split
    ``caption``    what to train and draw with; the first of ``captions``
    ``image``      (H, W, 3) uint8 sRGB, the photo to learn
    ``source``     (H, W, 3) uint8 sRGB, the photo that steers it (the garment on a mannequin), or None
    ``mask``       (H, W) uint8, 255 where the garment is in ``image``, else 0, or None
    ``category``   what kind of garment, or None
    ``attributes`` more known facts (name -> word), or None
    ``captions``   every caption that an epoch may choose from; empty means ``caption`` alone
    ``mirror``     whether training may mirror it: no where text or a logo would be reversed
    ``origin``     (height, width) of the photo's file, (top, left) of the crop after scaling, or None if not known
    =============  ========================================================================================

    Image, source and mask have the same H and W, and went through the same crop. They may be given as
    ``Lazy``; then they are decoded at the first look.
    """

    id: str
    group_id: str
    caption: str
    image: Pixels = Pixels(required=True)  # noqa: RUF009 (a descriptor, not a default)
    source: Pixels = Pixels()  # noqa: RUF009
    mask: Pixels = Pixels()  # noqa: RUF009
    category: str | None = None
    attributes: dict[str, str] | None = None
    captions: tuple[str, ...] = ()
    mirror: bool = False
    origin: tuple[int, int, int, int] | None = None

    def key(self, part: str) -> str | None:
        """Names the content of ``image``, ``source`` or ``mask``; None if there is none. Decodes nothing."""
        held = self.__dict__[f"_{part}"]
        if held is None or isinstance(held, Lazy):
            return None if held is None else held.key
        return hashlib.blake2b(held.tobytes(), digest_size=16).hexdigest() + str(held.shape)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of its pixels. Decodes nothing."""
        height, width = self.__dict__["_image"].shape[:2]
        return height, width

    @property
    def size_ids(self) -> tuple[int, ...]:
        """What SDXL is told of a photo: ``origin``, then the size that it is trained at. Unknown: drawn as it is."""
        return (*(self.origin or (*self.size, 0, 0)), *self.size)

    def mirrored(self) -> Pair:
        """Image, source and mask, left and right exchanged."""

        def turn(held: Any) -> Any:
            return held.mirrored() if isinstance(held, Lazy) else None if held is None else held[:, ::-1]

        return replace_pixels(self, **{part: turn(self.__dict__[f"_{part}"]) for part in ("image", "source", "mask")})


def replace_pixels(pair: Pair, **changes: Any) -> Pair:
    """``dataclasses.replace`` that decodes nothing."""
    kept = {part: pair.__dict__[f"_{part}"] for part in ("image", "source", "mask")}
    return replace(pair, **{**kept, **changes})


class PairDataset(Protocol):
    """A split: anything with these members. ``dataset[i]`` is cheap, decoding happens in the pair.

    ``fingerprint`` identifies the content (pixels, captions, resolution, order): two data sets with the
    same fingerprint give the same pairs. With ``has_source`` (``has_mask``) every pair has a source (mask),
    without it none has.
    """

    @property
    def fingerprint(self) -> str: ...

    @property
    def has_source(self) -> bool: ...

    @property
    def has_mask(self) -> bool: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...
