"""By what kind of work a step spends its time, from torch's own profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

KINDS = ("convolution", "matmul", "attention", "norms", "elementwise + copies", "other")
_NORMS = ("group_norm", "groupnorm", "layer_norm", "layernorm", "normalize")
_ATTENTION = ("bmm", "softmax", "scaled_dot_product")
_CONVOLUTION = ("conv",)
_MATMUL = ("mm", "linear", "matmul")
# Names for the same memory, new memory, and what only calls others.
_NO_WORK = (
    "empty", "view", "reshape", "transpose", "permute", "expand", "as_strided", "slice", "select", "squeeze", "detach",
    "alias", "chunk", "split", "narrow", "aten::t", "result_type", "set_", "resize",
)  # fmt: skip


def kind(name: str, around: tuple[str, ...] = ()) -> str:
    """Of an event of the profiler, by its name and those of the events ``around`` it, the innermost first.

    Whatever runs inside a norm is the norm's, so that one written in torch's own operators is counted as one.
    """
    if any(word in outer.lower() for outer in (name, *around) for word in _NORMS):
        return "norms"
    if not name.startswith(("aten::", "mkldnn::", "onednn::")):
        return "other"  # autograd's own work and Python's
    if any(word in name for word in _ATTENTION):
        return "attention"
    if any(word in name for word in _CONVOLUTION):
        return "convolution"
    if any(word in name for word in _MATMUL):
        return "matmul"
    return "other" if any(word in name for word in _NO_WORK) else "elementwise + copies"


def shares(step: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Share of each of KINDS in some calls of ``step``; they sum to 1. Call it once before, to warm up."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            step()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in found.events():
        seconds[kind(event.name, _around(event))] += event.self_cpu_time_total
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()}


def _around(event: Any) -> tuple[str, ...]:
    names: list[str] = []
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    return tuple(names)
