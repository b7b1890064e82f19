"""report.html and the files beside it: one page without outside parts, for a browser, a mail or a printer."""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.types import Quote, QuotedString
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image
from rich.console import Console

from lora_dae.config import ConfigError
from lora_dae.evaluation.report.examples import PictureGrid
from lora_dae.evaluation.report.protocol import environment
from lora_dae.evaluation.report.table import REFERENCES, ResultsTable, format_name
from lora_dae.evaluation.report.table_files import csv_text, latex

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
PLAIN = re.compile(r"[A-Za-z0-9_./@-]+")  # words that Hydra reads as they are


@dataclass(frozen=True)
class Sheet:
    """A table from elsewhere (judges, people): ``rows`` of text, the first cell names the row."""

    title: str
    notes: list[str]
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Page:
    """What a page shows. ``summary``: label -> short value; ``plots``: svg or png files; empty parts are left out."""

    title: str
    table: ResultsTable
    command: str  # that makes the page again
    summary: Mapping[str, str] = field(default_factory=dict)
    grids: Sequence[PictureGrid] = ()
    plots: Sequence[Path] = ()
    sheets: Sequence[Sheet] = ()
    config_yaml: str = ""
    usage: str = ""


OnPage = Callable[[Path, Page], None]  # told of a page once it is written: its folder, and what it shows


def write_page(folder: Path, page: Page) -> Path:
    """Write ``report.html`` (its path is returned), metrics.json and table.md, .csv and .tex into ``folder``.

    Raises ConfigError when a plot is missing or of another kind, and when the disk has no room.
    """
    texts = {
        "metrics.json": json.dumps(
            {**page.table.as_dict(), "environment": environment(), "command": page.command},
            indent=2,
            ensure_ascii=False,
        )
        + "\n",
        "table.md": page.table.markdown(),
        "table.csv": csv_text(page.table),
        "table.tex": latex(page.table),
        "report.html": page_html(page),  # last: where it is, the numbers are
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}): make room there, or name another folder."
        ) from error
    return folder / "report.html"


def publish(folder: Path, page: Page, console: Console, on_page: OnPage | None) -> None:
    """``write_page``, say where it is, and tell ``on_page``."""
    report = write_page(folder, page)
    console.print(f"report   {report}", soft_wrap=True, highlight=False)
    if on_page is not None:
        on_page(folder, page)


def override(name: str, value: Any) -> str:
    """``name=value`` in a page's command: Hydra reads the same value out of it, and the shell is quoted for."""
    return shlex.quote(f"{name}={_for_hydra(value)}")


def _for_hydra(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_for_hydra, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)


def check_writable(folder: Path) -> None:
    """Raises ConfigError where ``write_page`` could not write: told before anything is drawn."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}): name another folder.") from error


def page_html(page: Page) -> str:
    """The page as HTML, pictures and plots inside."""
    loader = Environment(
        loader=PackageLoader("lora_dae.evaluation.report", "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return loader.get_template("page.html.j2").render(
        page=page,
        table=page.table,
        date=datetime.date.today().isoformat(),
        references_title=REFERENCES,
        format_name=format_name,
        uri=picture_uri,
        plots=[{"alt": path.stem.replace("_", " "), "uri": data_uri(path)} for path in page.plots],
        environment=environment(),
    )


def picture_uri(picture: np.ndarray) -> str:
    """A uint8 (H, W, 3) picture as a PNG data URI: every pixel as it is."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def data_uri(path: Path) -> str:
    """A picture file as a base64 data URI; raises ConfigError when it is missing or not png, jpg or svg."""
    mime = MIME.get(path.suffix.lower())
    if mime is None or not path.is_file():
        raise ConfigError(f"{path} is not a png, jpg or svg file that exists; the report needs it.")
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
