"""The module's file gives back the same module, and refuses everything else in one sentence."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_dae.config import ConfigError
from lora_dae.enhancement import EnhancementModule, load_enhancement, save_enhancement


@pytest.fixture
def saved(tmp_path):
    module = EnhancementModule(levels=2, hidden=8, max_log_gain=0.3)
    torch.nn.init.normal_(module.gain.output.weight)
    return module, save_enhancement(module, tmp_path / "new" / "enhancement.safetensors")


def test_round_trip_gives_the_same_delta(saved):
    module, path = saved
    x0, sample = torch.randn(2, 1, 4, 8, 8)
    expected = module(x0, x0, sample, 0.8, 0.6, 0.1)
    assert torch.equal(load_enhancement(path)(x0, x0, sample, 0.8, 0.6, 0.1), expected)
    assert float(expected.detach().abs().max()) > 0


def test_it_says_what_its_gain_learned_to_edit(tmp_path):
    module = EnhancementModule(placement="direction")
    path = save_enhancement(module, tmp_path / "a.safetensors")
    assert load_enhancement(path).placement == "direction"
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert told.pop("placement") == "direction"
    save_file(module.state_dict(), path, told)  # as files before this were
    assert load_enhancement(path).placement == "prediction"


def test_missing_foreign_and_broken_files_are_refused(saved, tmp_path):
    _, path = saved
    with pytest.raises(ConfigError, match="no enhancement file"):
        load_enhancement(tmp_path / "nowhere.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        load_enhancement(garbage)
    adapter = tmp_path / "adapter.safetensors"
    save_file({"lora_A": torch.zeros(1)}, adapter)
    with pytest.raises(ConfigError, match="no enhancement module"):
        load_enhancement(adapter)


@pytest.mark.parametrize("change", [{"version": "99"}, {"levels": "3"}, {"hidden": "many"}])
def test_files_that_do_not_fit_their_description_are_refused(saved, tmp_path, change):
    _, path = saved
    metadata = {"format": "lora-dae-enhancement", "version": "5", "levels": "2", "hidden": "8"}
    metadata |= {"max_log_gain": "0.3", "source_channels": "0", "decoder": "0"} | change
    other = tmp_path / "other.safetensors"
    save_file(load_file(path), other, metadata=metadata)
    with pytest.raises(ConfigError, match="version 99|damaged"):
        load_enhancement(other)
