"""Loading a backbone: the process never holds its weights twice, whatever they are loaded from and as."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_models import FAMILIES
from diffusers import UNet2DConditionModel
from family_models import WIDTHS, write_backbone, write_single_file

WAYS = {
    "folder": {"weights": "fp32"},
    "folder, bf16": {"weights": "bf16"},
    "folder, int8": {"weights": "int8"},
    "file": {"weights": "fp32"},
    "file, bf16": {"weights": "bf16"},
}
# The kernel's own mark of the most resident memory, mapped files included; a small model first, for the libraries.
MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path

from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which + ":"))

small, ways = json.loads(sys.argv[1])
for settings in small:
    load_backbone(BackboneConfig(**settings))
found = {}
for name, settings in ways.items():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    backbone = load_backbone(BackboneConfig(**settings))
    found[name] = resident("VmHWM") - before
    del backbone
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc/self/clear_refs")
def test_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """A UNet of 80 MB: at most 1.9 times what the files hold, and their pages are counted where they are mapped."""
    small = write_backbone(tmp_path / "small", "sd15")
    large = write_backbone(tmp_path / "large", "sd15")
    settings = {**FAMILIES["sd15"], "block_out_channels": (128, 384), "cross_attention_dim": WIDTHS["sd15"][0]}
    UNet2DConditionModel(**{**settings, "attention_head_dim": 8, "norm_num_groups": 32}).save_pretrained(large / "unet")
    folders = (small, large)
    files = [write_single_file(folder.with_suffix(".safetensors"), folder) for folder in folders]

    def way(name: str, number: int) -> dict[str, str]:
        if name.startswith("file"):
            return {"name": "file", "path": str(files[number]), "configs": str(folders[number]), **WAYS[name]}
        return {"path": str(folders[number]), **WAYS[name]}

    request = json.dumps([[way(name, 0) for name in WAYS], {name: way(name, 1) for name in WAYS}])
    done = subprocess.run([sys.executable, "-c", MEASURE, request], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    stored = files[1].stat().st_size
    assert stored > 60e6
    for name, peak in json.loads(done.stdout.splitlines()[-1]).items():
        assert 0.2 * stored < peak < 1.9 * stored, (name, peak / stored)
