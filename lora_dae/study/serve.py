"""Start the server of a study."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from lora_dae.config import ConfigError
from lora_dae.study.store import StudyStore


@dataclass
class ServeRequest:
    """The keys of ``python -m lora_dae.study serve``."""

    study: str = "study"
    host: str = "127.0.0.1"
    port: int = 8000


def serve_study(request: ServeRequest) -> None:
    """Serve until interrupted. Raises ConfigError without the extra or the study."""
    if not 0 < request.port < 65536:
        raise ConfigError(f"port={request.port} is none: give 1024 to 65535.")
    store = StudyStore(Path(request.study))
    try:
        import uvicorn

        from lora_dae.study.app import build_app
    except ImportError as error:
        raise ConfigError("the study's server needs its packages: pip install 'lora-dae[study]'.") from error
    print(f"serving {request.study} on http://{request.host}:{request.port} (Ctrl-C stops)", flush=True)
    # uvicorn raises the signal again once it has shut down: by itself, SIGTERM would end the process there.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        # No access log: it would hold every rater's link.
        uvicorn.run(
            build_app(store),
            host=request.host,
            port=request.port,
            access_log=False,
            log_level="warning",
            server_header=False,
        )
    finally:
        store.close()  # all votes are in study.db alone then, which may be copied
