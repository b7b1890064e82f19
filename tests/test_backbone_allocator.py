"""Freed memory stays: a large block is handed out again without the kernel mapping its pages anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from lora_dae.backbone.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    blocks = [torch.ones(2**21) for _ in range(8)]  # 8 MB each
for _ in range(10):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_freed_memory_is_used_again() -> None:
    # glibc's own starting value, fixed: left alone it adapts, and whether it then keeps the blocks is chance
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}

    def faults(what: str) -> int:
        command = [sys.executable, "-c", SCRIPT, what]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    assert faults("keep") < 0.1 * faults("leave")
