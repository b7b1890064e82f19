"""A disk that is full while anything is written: one sentence, what stood there stays, and no half file."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapter_models import randomize, tiny_unet

from lora_dae.adapter.atomic import atomic
from lora_dae.adapter.files import save_adapter, save_merged
from lora_dae.adapter.inject import inject
from lora_dae.adapter.source_input import attach_source_input, save_source_input
from lora_dae.config import AdapterConfig, ConfigError
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.training.callbacks import Checkpoint


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 600 bytes: the system itself refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def writers() -> dict[str, Callable[[Path], Path]]:
    unet = tiny_unet()
    attach_source_input(unet)
    inject(unet, AdapterConfig(rank=2))
    randomize(unet)
    return {
        "adapter": lambda folder: save_adapter(unet, folder / "adapter.safetensors"),
        "source input": lambda folder: save_source_input(unet, folder / "source.safetensors"),
        "enhancement": lambda folder: save_enhancement(EnhancementModule(), folder / "enhancement.safetensors"),
        "merged": lambda folder: save_merged(unet, folder / "unet"),
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["adapter", "source input", "enhancement", "merged"])
def test_nothing_half_is_left(name: str, tmp_path: Path) -> None:
    write = writers()[name]
    with full_disk(), pytest.raises(ConfigError, match="cannot write .*nothing was left there"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    before = contents(tmp_path)
    with full_disk(), pytest.raises(ConfigError, match="cannot write"):
        write(tmp_path)
    assert contents(tmp_path) == before
    write(tmp_path)  # and with room again, over what stands there
    assert contents(tmp_path).keys() == before.keys()


def test_checkpoint_keeps_the_last_good_one(tmp_path: Path) -> None:
    path = tmp_path / "adapter.ckpt"

    def save(file: Path) -> None:
        torch.save(torch.zeros(1000), file)

    trainer: Any = SimpleNamespace(global_step=1, is_global_zero=True, save_checkpoint=save)
    callback = Checkpoint(path, 1)
    callback.on_train_end(trainer, None)
    before = contents(tmp_path)
    assert list(before) == ["adapter.ckpt"]
    trainer.global_step = 2
    with full_disk(), pytest.raises((OSError, RuntimeError)):
        callback.on_train_end(trainer, None)
    assert contents(tmp_path) == before


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write"), atomic(tmp_path / "file" / "a.safetensors") as partial:
        partial.write_text("never")
