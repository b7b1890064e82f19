"""What every benchmark does: run in turns, take medians, show a table, keep the numbers."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_dae.backbone.allocator import keep_freed_memory

console = Console()


def timings(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function's runs, in turns so that drift hits all alike; one warm-up each."""
    keep_freed_memory()  # as the commands do
    for f in functions.values():
        f()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - start)
    return times


def interleaved(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, run in turns."""
    return {name: statistics.median(t) for name, t in timings(functions, repeats).items()}


def show(results: dict[str, Any], output: Path) -> None:
    """Print a number a line, and write them to ``output`` as JSON."""
    table = Table("measured", "value")
    for name, value in results.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
