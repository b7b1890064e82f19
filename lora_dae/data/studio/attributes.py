"""What is known about a studio photo, and how it is drawn from (seed, index).

Every part of a picture has a random stream of its own (``stream``), so that a change in, say, the hair
never changes the garment: pairs stay pairs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

GARMENTS = ("t-shirt", "shirt", "sweater", "jacket", "dress", "skirt")
PATTERNS = (
    "solid", "stripes", "gingham", "plaid", "dots", "herringbone", "houndstooth", "knit", "floral", "denim",
)  # fmt: skip
COARSE_PATTERNS = ("solid", "stripes", "gingham", "plaid", "dots", "floral")
FINE_PATTERNS = PATTERNS[1:]
COLORS: dict[str, tuple[int, int, int]] = {
    "black": (30, 30, 34),
    "white": (240, 240, 236),
    "gray": (134, 136, 140),
    "red": (196, 30, 40),
    "orange": (238, 122, 24),
    "yellow": (244, 206, 52),
    "green": (36, 128, 62),
    "blue": (42, 92, 196),
    "purple": (118, 54, 160),
    "pink": (240, 140, 176),
    "brown": (108, 66, 38),
    "beige": (214, 190, 150),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 243),
    "gray": (186, 188, 192),
    "cream": (236, 224, 200),
    "blue": (176, 202, 226),
    "pink": (238, 206, 208),
    "green": (190, 212, 190),
}
SKIN_TONES = ((246, 214, 192), (232, 188, 160), (212, 160, 124), (172, 118, 82), (126, 82, 56), (88, 56, 40))
HAIR_COLORS: dict[str, tuple[int, int, int]] = {
    "black": (28, 24, 24),
    "brown": (82, 52, 34),
    "blond": (206, 164, 96),
    "red": (148, 68, 34),
    "gray": (158, 156, 154),
}
HAIR_STYLES = {"woman": ("long", "bob", "bun", "curly"), "man": ("short", "buzzed", "curly")}
SLEEVES = {
    "t-shirt": ("short",),
    "shirt": ("long", "short"),
    "sweater": ("long",),
    "jacket": ("long",),
    "dress": ("none", "short", "long"),
    "skirt": ("none",),
}
LENGTHS = {"dress": ("mini", "knee", "midi"), "skirt": ("mini", "knee", "midi")}
NECKLINES = {
    "t-shirt": ("crew", "v-neck"),
    "shirt": ("collar",),
    "sweater": ("crew", "v-neck", "turtleneck"),
    "jacket": ("lapel",),
    "dress": ("crew", "v-neck", "scoop"),
    "skirt": ("none",),
}
VIEWS = ("flat", "mannequin", "model")


def stream(seed: int, index: int, part: str) -> np.random.Generator:
    """The random stream of one part of one picture; parts are independent of each other."""
    tag = int.from_bytes(part.encode().ljust(8, b"\0")[:8], "little")
    return np.random.default_rng((seed, index, tag))


@dataclass(frozen=True)
class Garment:
    """One piece of clothing: all that a second photo of it must agree with."""

    kind: str
    color: str
    pattern: str
    sleeve: str
    length: str
    neckline: str
    period: float  # of the pattern, in head heights
    phase: tuple[float, float]
    shade: tuple[float, float, float]  # small offset of the color, in 8-bit units
    ease: float  # how loose it is, in head heights
    seed: int  # of everything else about the cloth (which flowers, which tartan)


@dataclass(frozen=True)
class Person:
    gender: str
    skin: int
    hair_style: str
    hair_color: str
    seed: int


@dataclass(frozen=True)
class Look:
    """All attributes of one studio item; ``view`` and ``background`` belong to the target photo."""

    garment: Garment
    person: Person
    view: str
    background: str

    def words(self) -> dict[str, str]:
        """The attributes as words, for captions, classifiers and questions."""
        g = self.garment
        named = {k: str(v) for k, v in asdict(g).items() if k in ("color", "pattern", "sleeve", "length", "neckline")}
        return {
            "garment": g.kind,
            **named,
            "gender": self.person.gender,
            "view": self.view,
            "background": self.background,
        }


def _pick(rng: np.random.Generator, options: tuple[str, ...] | list[str]) -> str:
    return str(options[int(rng.integers(len(options)))])


def draw_garment(seed: int, index: int, patterns: tuple[str, ...], coarse: bool) -> Garment:
    """Draw one garment; ``coarse`` makes the pattern about twice as large."""
    rng = stream(seed, index, "garment")
    kind = _pick(rng, GARMENTS)
    pattern = _pick(rng, patterns)
    color = _pick(rng, list(COLORS))
    if pattern == "denim":
        color = _pick(rng, ["blue", "black", "gray", "white"])
    base = {"stripes": 0.27, "gingham": 0.30, "plaid": 0.62, "dots": 0.25, "herringbone": 0.30}
    base |= {"houndstooth": 0.27, "knit": 0.40, "floral": 0.62, "denim": 0.10, "solid": 0.3}
    period = base[pattern] * float(rng.uniform(0.9, 1.25)) * (1.8 if coarse else 1.0)
    return Garment(
        kind=kind,
        color=color,
        pattern=pattern,
        sleeve=_pick(rng, SLEEVES[kind]),
        length=_pick(rng, LENGTHS.get(kind, ("hip",))),
        neckline=_pick(rng, NECKLINES[kind]),
        period=period,
        phase=(float(rng.uniform()), float(rng.uniform())),
        shade=(float(rng.normal(0, 6)), float(rng.normal(0, 6)), float(rng.normal(0, 6))),
        ease=float(rng.uniform(0.04, 0.14)),
        seed=int(rng.integers(2**31)),
    )


def draw_person(seed: int, index: int, garment: Garment) -> Person:
    rng = stream(seed, index, "person")
    gender = "woman" if garment.kind in ("dress", "skirt") else _pick(rng, ["woman", "man"])
    return Person(
        gender=gender,
        skin=int(rng.integers(len(SKIN_TONES))),
        hair_style=_pick(rng, HAIR_STYLES[gender]),
        hair_color=_pick(rng, list(HAIR_COLORS)),
        seed=int(rng.integers(2**31)),
    )


def draw_look(seed: int, index: int, domain: str) -> Look:
    """Draw item ``index`` of domain ``base`` (for the backbone) or ``target`` (for fine-tuning).

    BASE: 35 % flat-lays, 20 % mannequins, 45 % models, in solid cloth and coarse patterns (every tenth
    in any pattern, so that the words are known). TARGET: models in finely textured garments.
    """
    rng = stream(seed, index, "look")
    if domain == "target":
        garment = draw_garment(seed, index, FINE_PATTERNS, coarse=False)
        view = "model"
    else:
        any_pattern = rng.uniform() < 0.15
        garment = draw_garment(seed, index, PATTERNS if any_pattern else COARSE_PATTERNS, coarse=True)
        view = str(rng.choice(VIEWS, p=[0.35, 0.2, 0.45]))
    return Look(garment, draw_person(seed, index, garment), view, _pick(rng, list(BACKGROUNDS)))
