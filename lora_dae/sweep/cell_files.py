"""One small JSON file per measured cell: what it is, what it cost, and its numbers.

    <results>/<digest>.json   {"what", "by", "metrics", "protocol", "adapter_mb", "network_calls", "seconds"}

Bootstrap replicates, which paired tests need, are in it too: the first ``KEPT``, rounded to half precision.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_dae.evaluation.report.protocol import Protocol
from lora_dae.evaluation.report.table import MetricValue
from lora_dae.sweep.files import read_json, write_json

KEPT = 200  # of a standard deviation it says 5 %


@dataclass(frozen=True)
class MeasuredCell:
    """What a file says; ``seconds`` of drawing and measuring, ``precision`` in which it was drawn ("" of old files)."""

    what: dict[str, Any]
    metrics: dict[str, MetricValue]
    protocol: Protocol
    adapter_mb: float
    network_calls: float
    seconds: float
    precision: str = ""


def cell_file(results: Path, digest: str) -> Path:
    return results / f"{digest}.json"


def write_cell(results: Path, digest: str, by: str, cell: MeasuredCell) -> None:
    """Whole or not at all; ``by`` names who wrote it."""
    metrics = {name: {**value.as_dict(), "replicates": pack(value)} for name, value in cell.metrics.items()}
    told = {
        "what": cell.what, "by": by, "metrics": metrics, "protocol": asdict(cell.protocol),
        "adapter_mb": cell.adapter_mb, "network_calls": cell.network_calls, "seconds": cell.seconds,
        "precision": cell.precision,
    }  # fmt: skip
    write_json(cell_file(results, digest), told)


def read_cell(results: Path, digest: str) -> MeasuredCell | None:
    """None where there is no such file, or no whole one."""
    told = read_json(cell_file(results, digest))
    if not told:
        return None
    metrics = {}
    for name, found in told["metrics"].items():
        value = np.nan if found["value"] is None else found["value"]
        metrics[name] = MetricValue(value, found["low"], found["high"], found["better"], unpack(value, found))
    return MeasuredCell(
        told["what"], metrics, Protocol(**told["protocol"]), told["adapter_mb"], told["network_calls"],
        told["seconds"], told.get("precision", ""),
    )  # fmt: skip


def is_measured(results: Path, digest: str, lpips: bool) -> bool:
    """Whether there is a whole file, with ``lpips`` if that is asked for and the pictures have photos to be held to."""
    cell = read_cell(results, digest)
    return cell is not None and not (lpips and "psnr" in cell.metrics and "lpips_alex" not in cell.metrics)


def pack(metric: MetricValue) -> dict[str, Any] | None:
    """Replicates as half-precision multiples of their spread around the value, base64."""
    if metric.replicates is None or len(metric.replicates) == 0:
        return None
    apart = metric.replicates[:KEPT].double().cpu() - metric.value
    spread = float(apart[apart.isfinite()].abs().max()) if bool(apart.isfinite().any()) else 0.0
    scaled = (apart / (spread or 1.0)).numpy().astype("<f2")
    return {"spread": spread, "data": base64.b64encode(scaled.tobytes()).decode("ascii")}


def unpack(value: float, found: Mapping[str, Any]) -> Tensor | None:
    """What ``pack`` packed, float64 (KEPT,)."""
    packed = found["replicates"]
    if packed is None:
        return None
    scaled = np.frombuffer(base64.b64decode(packed["data"]), dtype="<f2").astype(np.float64)
    return torch.from_numpy(value + scaled * packed["spread"])
