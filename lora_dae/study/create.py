"""Make a study: pictures under random names, trials of every rater, links."""

from __future__ import annotations

import math
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageFilter
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.data.formats.files import read_jsonl
from lora_dae.evaluation.pictures import METADATA, PictureSets, find_methods, gather, parse_spec
from lora_dae.evaluation.report.page import check_writable
from lora_dae.sampling.finished import read_config
from lora_dae.study.exclude import Rules
from lora_dae.study.plan import CLEAR, DEGRADED, REFERENCE, plan
from lora_dae.study.store import FILE, create_database, hashed

ENOUGH_VOTES = 3  # on each comparison


@dataclass
class CreateRequest:
    """The keys of ``python -m lora_dae.study create``."""

    runs: list[str] = field(default_factory=list)
    output: str = "study"  # a new folder
    title: str = "Fashion pictures"
    split: str = "test"
    num_samples: int = 32  # prompts
    raters: int = 20
    pairs: int = 30  # comparisons a rater; of two runs that draw from captions alone there are num_samples
    opinions: int = 10  # single pictures a rater
    seed: int = 0  # of sides and order
    url: str = "http://127.0.0.1:8000"  # what the links begin with


def create_study(request: CreateRequest, console: Console) -> Path:
    """Write ``output``: study.db, pictures/ and links.txt.

    Raises ConfigError before anything is drawn or written, and when the disk takes no more: nothing is left then.
    """
    output = Path(request.output)
    if output.exists():
        raise ConfigError(f"output={output} exists: a study is never overwritten, give a new folder.")
    origin = _origin(request.url)
    names = [parse_spec(spec)[0] for spec in request.runs]
    sourced = _has_sources(request)
    plan(request.num_samples, names, request.raters, request.pairs, request.opinions, sourced, request.seed)
    check_writable(output.parent)  # before hours of drawing
    sets = gather(request.runs, request.split, request.num_samples, console)
    methods = list(sets.methods)
    sources = [item.source for item in sets.items]
    trials = plan(
        len(sets.items), methods, request.raters, request.pairs, request.opinions,
        all(source is not None for source in sources), request.seed,
    )  # fmt: skip
    tokens = [secrets.token_urlsafe(24) for _ in range(request.raters)]
    admin = secrets.token_urlsafe(24)
    meta = {
        "title": request.title, "methods": methods, "seed": request.seed, "created": time.time(),
        "admin": hashed(admin), "rules": asdict(Rules()), "runs": request.runs, "origin": origin,
    }  # fmt: skip
    url = request.url.rstrip("/")
    links = [f"rater {k + 1:03d}  {url}/r/{token}" for k, token in enumerate(tokens)]
    with _building(output) as folder:
        pictures = _write_pictures(sets, folder / "pictures")
        create_database(folder / FILE, meta, [i.prompt for i in sets.items], pictures, tokens, trials)
        path = folder / "links.txt"
        path.touch(mode=0o600)  # who has a link can vote
        path.write_text("\n".join([f"admin      {url}/admin/{admin}", *links]) + "\n", encoding="utf-8")
    comparisons = len(sets.items) * math.comb(len(methods), 2) * (2 if all(s is not None for s in sources) else 1)
    votes_each = request.raters * request.pairs / max(comparisons, 1)
    if request.pairs and votes_each < ENOUGH_VOTES:
        console.print(
            f"warning  each comparison gets {votes_each:.1f} votes on average, {ENOUGH_VOTES} to 5 are usual: give "
            "fewer prompts (num_samples), or more raters or pairs",
            soft_wrap=True,
        )
    console.print(f"study    {output}: {request.raters} raters, {len(trials[0])} trials each", soft_wrap=True)
    console.print(f"links    {output / 'links.txt'}  (one for each rater; keep the file private)", soft_wrap=True)
    return output


@contextmanager
def _building(output: Path) -> Iterator[Path]:
    """A folder that becomes ``output`` when the block ends well; ConfigError when the disk takes no more."""
    building = output.with_name(output.name + ".part")  # a killed `create` leaves no half study under the name
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        yield building
        building.rename(output)
    except (OSError, sqlite3.Error) as error:
        shutil.rmtree(building, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{output} cannot be written ({reason}): make room there, or name another folder.") from error


def _origin(url: str) -> str:
    """What browsers call the origin of a page at ``url``; ConfigError if that is no address."""
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).netloc
    except ValueError:
        scheme = host = ""
    if scheme not in ("http", "https") or not host:
        raise ConfigError(f"url={url} is no address: give what raters see, such as https://study.example.")
    return f"{scheme}://{host}".lower().removesuffix(":443" if scheme == "https" else ":80")


def _has_sources(request: CreateRequest) -> bool:
    """Whether pictures come with the garment's photos, which one method that has them brings for all."""
    for spec, folder in zip(request.runs, find_methods(request.runs, request.split), strict=True):
        if folder is None:
            found = read_config(parse_spec(spec)[1]).conditioning == "source"
        else:
            rows = [row for _, row in read_jsonl(folder / METADATA)][: request.num_samples]
            found = all(row.get("source") for row in rows)
        if found:
            return True
    return False


def degraded(image: np.ndarray) -> np.ndarray:
    """A picture that nobody could take for a photo: sixteen blocks a side, blurred, half the contrast. uint8 RGB."""
    picture = Image.fromarray(image)
    small = picture.resize((16, 16), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)
    blurred = np.asarray(small.filter(ImageFilter.GaussianBlur(picture.width / 64))).astype(float)
    return (0.5 * blurred + 64).round().astype(np.uint8)


def _write_pictures(sets: PictureSets, folder: Path) -> dict[str, tuple[int, str]]:
    """PNG files under random names, without metadata; returns name -> (item, method)."""
    known: dict[str, tuple[int, str]] = {}
    folder.mkdir()

    def save(image: np.ndarray, item: int, method: str) -> None:
        name = f"{secrets.token_hex(12)}.png"
        Image.fromarray(image).save(folder / name)
        known[name] = (item, method)

    for k, item in enumerate(sets.items):
        for method, images in sets.methods.items():
            save(images[k], k, method)
        clear = item.real if item.real is not None else next(iter(sets.methods.values()))[k]
        save(clear, k, CLEAR)
        save(degraded(clear), k, DEGRADED)
        if item.source is not None:
            save(item.source, k, REFERENCE)
    return known
