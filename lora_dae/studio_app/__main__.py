"""``python -m lora_dae.studio_app [run=runs/<run>] [host=127.0.0.1] [port=7860] [vae=<folder>]``

Without ``run``: the newest finished one under runs/, or else the shipped backbone alone. ``vae``: another one of the
same latents, such as a TAESD, draws quicker.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_dae.config import ConfigError


@dataclass
class PreviewRequest:
    """The keys of the command line."""

    run: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    vae: str | None = None


def main(arguments: list[str] | None = None) -> None:
    try:
        serve(_request(sys.argv[1:] if arguments is None else arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def serve(request: PreviewRequest) -> None:
    """Serve until interrupted. Raises ConfigError without the extra, for a folder that is no run, for a taken port."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ConfigError("the preview page needs Gradio: pip install 'lora-dae[app]'.") from error
    from lora_dae.studio_app.page import build_page, serve_page
    from lora_dae.studio_app.preview import Preview, newest_run

    run = newest_run(Path("runs")) if request.run is None else Path(request.run)
    preview = Preview.load(run, vae=request.vae)
    print(f"showing {preview.title} on http://{request.host}:{request.port} (Ctrl-C stops)", flush=True)
    try:
        serve_page(build_page(preview), request.host, request.port)
    except OSError as error:
        raise ConfigError(
            f"port={request.port} of {request.host} cannot be served ({error}): choose another."
        ) from error


def _request(arguments: list[str]) -> PreviewRequest:
    for word in arguments:
        if "=" not in word:
            raise ConfigError(f"{word!r} is no key=value: use run, host, port, vae.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(PreviewRequest), OmegaConf.from_dotlist(arguments))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{str(error).splitlines()[0]}: the keys are run, host, port, vae.") from error


if __name__ == "__main__":
    main()
