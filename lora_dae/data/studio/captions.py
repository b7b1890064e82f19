"""A look in natural words."""

from __future__ import annotations

import numpy as np

from lora_dae.data.studio.attributes import Look

_PATTERN_WORDS = {
    "solid": "{color} {kind}",
    "stripes": "{color} striped {kind}",
    "gingham": "{color} gingham {kind}",
    "plaid": "{color} plaid {kind}",
    "dots": "{color} polka dot {kind}",
    "herringbone": "{color} herringbone {kind}",
    "houndstooth": "{color} houndstooth {kind}",
    "knit": "{color} knit {kind}",
    "floral": "{color} floral {kind}",
    "denim": "{color} denim {kind}",
}
_HAIR = {
    "long": "long {color} hair",
    "bob": "a {color} bob",
    "bun": "{color} hair in a bun",
    "curly": "curly {color} hair",
    "short": "short {color} hair",
    "buzzed": "buzzed {color} hair",
}
_NECK = {"v-neck": "v-neck ", "turtleneck": "turtleneck ", "scoop": "scoop neck "}


def article(words: str) -> str:
    """Put "a" or "an" before the words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(look: Look, rng: np.random.Generator) -> str:
    """Describe ``look``; color, pattern and garment are always named, the rest mostly."""
    g = look.garment
    kind = _NECK.get(g.neckline, "") + g.kind if rng.uniform() < 0.8 else g.kind
    if g.kind in ("shirt", "dress") and g.sleeve in ("short", "long") and rng.uniform() < 0.8:
        kind = f"{g.sleeve} sleeve {kind}"
    if g.kind in ("dress", "skirt") and rng.uniform() < 0.8:
        kind = f"{g.length} {kind}"
    words = _PATTERN_WORDS[g.pattern].format(color=g.color, kind=kind)
    if look.view == "flat":
        text = f"flat lay of {article(words)}"
    elif look.view == "mannequin":
        text = f"{article(words)} on a mannequin"
    else:
        p = look.person
        hair = _HAIR[p.hair_style].format(color=p.hair_color)
        who = f"{p.gender} with {hair}" if rng.uniform() < 0.6 else f"{p.gender}"
        text = f"a {who} wearing {article(words)}"
    return f"{text}, {look.background} background"
