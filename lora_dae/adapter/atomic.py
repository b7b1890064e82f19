"""Files and folders that appear complete or not at all, and safetensors read with one sentence for a damaged file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_dae.config import ConfigError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a name beside ``path`` to write a file or folder to; it gets its own name when the block ends well.

    Otherwise what was half written goes, what stood at ``path`` stays, and a full disk or a missing permission
    is raised as ConfigError.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        yield partial
        if partial.is_dir() and path.is_dir():
            old = path.with_name(f".{path.name}.old{os.getpid()}")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise ConfigError(
            f"cannot write {path} ({reason}): nothing was left there; free space or choose another place."
        ) from error
    finally:
        _remove(partial)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str]) -> Path:
    """One safetensors file, atomically; tensors may lie on any device in any memory format."""
    path = Path(path)
    with atomic(path) as partial:
        # channels_last weights are not contiguous, and safetensors takes nothing else
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata=dict(metadata))
    return path


def load_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, header) of a safetensors file, on the CPU; ConfigError with ``remedy`` if it is damaged."""
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            return {key: opened.get_tensor(key) for key in opened.keys()}, header  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {remedy}.") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():  # unlink(missing_ok=True) would raise where a parent is a file
        path.unlink()
