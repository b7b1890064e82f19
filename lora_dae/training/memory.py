"""Peak memory of a computation by its tensors, real or fake."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lora_dae.backbone.int8 import is_int8


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of every storage that operations inside the context give out, while it lives.

    ``now`` and ``peak`` are bytes. Under FakeTensorMode nothing is allocated and nothing computed, and the numbers
    are those of a real run: sizes and lifetimes of tensors do not depend on values. What an operator takes as
    scratch inside (a convolution's workspace) and what an allocator rounds up is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count what was there before, which operations would otherwise show as new by giving out views of it."""
        for tensor in tensors:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def materialize(module: nn.Module, frozen: torch.dtype) -> None:
    """Give a module of the meta device weights on the CPU, in place: what is frozen as ``frozen``, the rest as it is.

    Frozen convolutions get theirs in channels_last, as a run has them: which copies are made depends on it.
    Values are whatever the memory holds. Under FakeTensorMode the weights are fake. (Building a model under that mode
    in the first place would not do: ``Module.to`` then swaps tensors, which those that are watched do not allow.)
    """
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                kept = parameter.requires_grad or (is_int8(part) and name != "bias")
                dtype = parameter.dtype if kept else frozen
                last = parameter.ndim == 4 and not parameter.requires_grad
                layout = torch.channels_last if last else torch.contiguous_format
                weight = torch.empty(parameter.shape, dtype=dtype, device="cpu", memory_format=layout)
                part._parameters[name] = nn.Parameter(weight, requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
