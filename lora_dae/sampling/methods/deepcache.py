"""DeepCache: most steps reuse the deep features of the last whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lora_dae.sampling.method import Method

SHALLOW = 0.2  # of a whole call's multiply-adds, at most, in the layers below: a test counts them for every family


class DeepCache(Method):
    """Ma et al. 2023 (arXiv 2312.00858): one network call in ``interval`` is whole, beginning with the first.

    The others run the outermost branch alone, which is the authors' default: conv_in, the last layer of the last up
    block and conv_out. What reaches that layer from the deeper ones is as in the last whole call. 1 is the network as
    it is.
    """

    def __init__(self, interval: float) -> None:
        self.interval = int(interval)
        self._call = -1

    @property
    def _shallow(self) -> bool:
        return self._call % self.interval > 0

    def whole_calls(self, steps: int) -> float:
        whole = -(-steps // self.interval)
        return whole + SHALLOW * (steps - whole)

    @contextmanager
    def around(self, unet: Any) -> Iterator[None]:
        if self.interval == 1:
            yield
            return
        last = unet.up_blocks[-1]
        width = unet.config.block_out_channels[0]  # of the skip connection that the last layer takes
        deep: Tensor | None = None

        def count(*_: Any) -> None:
            self._call += 1

        def remember(_: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal deep
            if not self._shallow:
                deep = args[0][:, :-width]

        def outermost(plain: Any, *args: Any, **kwargs: Any) -> Any:
            """The up block's own code on its last layer."""
            lists = {name: getattr(last, name) for name in ("resnets", "attentions") if hasattr(last, name)}
            shown = {"hidden_states": deep, "res_hidden_states_tuple": kwargs["res_hidden_states_tuple"][:1]}
            try:
                for name, layers in lists.items():
                    setattr(last, name, layers[-1:])
                return plain(*args, **{**kwargs, **shown})
            finally:
                for name, layers in lists.items():
                    setattr(last, name, layers)

        def down(block: Any) -> Any:
            skips = len(block.resnets) + len(block.downsamplers or ())
            return lambda _, hidden_states, **kwargs: (hidden_states, (hidden_states,) * skips)

        replaced: dict[Any, Any] = {block: down(block) for block in unet.down_blocks}
        for block in (unet.mid_block, *unet.up_blocks[:-1]):
            if block is not None:
                replaced[block] = lambda _, *args, **kwargs: args[0] if args else kwargs["hidden_states"]
        replaced[last] = outermost
        hooks = [unet.register_forward_pre_hook(count), last.resnets[-1].register_forward_pre_hook(remember)]
        for block, instead in replaced.items():
            block.forward = self._either(block.forward, instead)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block in replaced:
                del block.forward  # the class's own shows again

    def _either(self, plain: Any, instead: Any) -> Any:
        """A block's forward: as it is in whole calls, ``instead`` in shallow ones."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return instead(plain, *args, **kwargs) if self._shallow else plain(*args, **kwargs)

        return forward
