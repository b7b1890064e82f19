"""report.html of a run: one file without outside parts, for a browser, a mail or an archive."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from lora_dae.config import ConfigError
from lora_dae.evaluation.table import ResultsTable, format_name

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".svg": "image/svg+xml"}
WIDE = 400  # pixels: a picture at least this wide gets a row of its own


def write_report(
    run_dir: Path,
    title: str,
    summary: Mapping[str, str],
    table: ResultsTable,
    images: Sequence[tuple[str, Path]],
    plots: Sequence[Path],
    config_yaml: str,
    usage: str,
) -> Path:
    """Write ``run_dir/report.html`` and return its path.

    ``summary``: label -> short value, the key figures under the title (adapter size, steps, ...). ``images``:
    (caption, path of a png or jpg) in reading order; pictures 400 pixels wide or more (grids) take a whole
    row. ``plots``: svg or png files. ``usage``: a few lines of code. The protocol comes with the table.
    Raises ConfigError when a picture is missing or of another kind.
    """
    environment = Environment(
        loader=PackageLoader("lora_dae.evaluation", "."),
        autoescape=select_autoescape(["html", "j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        title=title,
        date=datetime.date.today().isoformat(),
        summary=summary,
        table=table,
        format_name=format_name,
        pictures=[_picture(caption, path) for caption, path in images],
        plots=[{"alt": path.stem.replace("_", " "), "uri": data_uri(path)} for path in plots],
        config_yaml=config_yaml,
        usage=usage,
    )
    output = run_dir / "report.html"
    output.write_text(html, encoding="utf-8")
    return output


def data_uri(path: Path) -> str:
    """A picture file as a base64 data URI; raises ConfigError when it is missing or not png, jpg or svg."""
    mime = MIME.get(path.suffix.lower())
    if mime is None or not path.is_file():
        raise ConfigError(f"{path} is not a png, jpg or svg file that exists; the report needs it.")
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _picture(caption: str, path: Path) -> dict[str, str | int | bool]:
    uri = data_uri(path)
    with Image.open(path) as picture:
        width, height = picture.size
    return {"caption": caption, "uri": uri, "width": width, "height": height, "wide": width >= WIDE}
