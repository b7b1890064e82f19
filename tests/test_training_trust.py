"""When a run trusts its source photos: learned at its end, judged on pairs as they are drawn with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compose import config
from torch import Tensor

from lora_dae.enhancement.files import load_enhancement
from lora_dae.training import finish
from lora_dae.training import run as training


def test_a_run_learns_when_to_trust_and_keeps_what_tells(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("data.val_size=16", "enhancement.gain=false", "enhancement.decoder=false", "trainer.max_steps=1")
    training.train(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options))
    said = " ".join(capsys.readouterr().out.split())
    assert "captions and source photos: right and swapped validation pairs told apart in" in said
    module = load_enhancement(tmp_path / "run" / "adapter" / "enhancement.safetensors")
    assert module.texture is not None and module.gain is None and module.decoder is None
    assert (module.agreement is None) == ("so the sources are trusted always" in said)


@pytest.mark.parametrize("buckets", [[], ["48x64", "64x64"]], ids=["squares", "buckets"])
def test_trust_is_judged_on_pairs_as_they_are_drawn_with(buckets: list[str]) -> None:
    """Where training has buckets the validation pairs it sees are oblong; drawing encodes squares."""
    pairs = [SimpleNamespace(source=np.full((8, 8, 3), k, np.uint8), caption=f"number {k}") for k in range(5)]
    cached = {"source": torch.full((1, 3, 4, 2), 9.0), "text": torch.full((1, 2, 3), 9.0)}

    def encode(images: np.ndarray) -> tuple[Tensor, Tensor]:
        latents = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        return latents, latents

    def some(name: str, most: int) -> Iterator[dict[str, Tensor]]:
        yield cached

    words = SimpleNamespace(
        some=some, batch_size=2,
        encode_text=lambda captions: torch.tensor([float(c[-1]) for c in captions])[:, None, None].expand(-1, 2, 3),
    )  # fmt: skip
    trained: Any = SimpleNamespace(
        splits={"val": pairs}, data=words, device=torch.device("cpu"), backbone=SimpleNamespace(encode_images=encode),
        cfg=SimpleNamespace(data=SimpleNamespace(buckets=buckets)),
        module=SimpleNamespace(with_text=lambda batch: (batch, torch.zeros(2, 3))),
    )  # fmt: skip
    batches = [batch for batch, _ in finish._drawn(trained, 3)]
    if not buckets:
        assert len(batches) == 1 and torch.equal(batches[0]["source"], cached["source"])
        return
    assert [len(batch["source"]) for batch in batches] == [2, 1]  # every second one: three at most
    for name in ("source", "text"):
        found = torch.cat([batch[name].flatten(1)[:, 0] for batch in batches])
        assert found.tolist() == [0.0, 2.0, 4.0]
    assert batches[0]["source"].shape == (2, 3, 8, 8)
