"""A sweep's name follows from its command, so that the same command finds its own folder again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from omegaconf import OmegaConf

LENGTH = 60


def sweep_name(overrides: Sequence[str]) -> str:
    """Readable words and a hash of a sweep's overrides, in their order: jobs are numbered by it."""
    ordered = sorted(overrides, key=lambda override: (not override.startswith("experiment"), override))
    words = [f"{o.split('=')[0].rsplit('.', 1)[-1]}-{o.split('=', 1)[-1]}" for o in ordered]
    slug = re.sub(r"[^A-Za-z0-9._+-]", "", "_".join(words).replace(",", "+").replace("/", "-"))[:LENGTH].strip("._+-")
    digest = hashlib.sha256("\n".join(overrides).encode()).hexdigest()[:8]
    return f"{slug or 'sweep'}-{digest}"


def register_sweep_name() -> None:
    """``${sweep_name:${hydra.overrides.task}}`` for conf/train.yaml.

    Cached, like Hydra's ``now``: in a job's own config, which knows its own overrides alone, it still names the sweep.
    """
    OmegaConf.register_new_resolver("sweep_name", lambda given: sweep_name(list(given)), use_cache=True, replace=True)
