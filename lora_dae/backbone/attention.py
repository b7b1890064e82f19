"""Which attention kernel each attention layer of the UNet uses, measured where it matters.

PyTorch's scaled_dot_product_attention (SDPA) is the right choice on a GPU. On a CPU it wins at many
tokens, but its bfloat16 backward loses to plain matrix products at few: several times over at the 8x8 level
and in cross-attention. So there every shape gets the faster of the two.
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from lora_dae.config import ConfigError
from lora_dae.data.catalog import say_once

PROCESSORS: dict[str, Any] = {"plain": AttnProcessor, "sdpa": AttnProcessor2_0}


class Shape(NamedTuple):
    """What the speed of an attention layer depends on."""

    tokens: int
    channels: int
    heads: int
    context: int | None  # tokens attended to, if they are not its own

    def __str__(self) -> str:
        kind = "self" if self.context is None else f"cross-{self.context}"
        return f"{kind} {self.tokens}x{self.channels}/{self.heads}"


def choose_attention(
    unet: UNet2DConditionModel,
    dtype: torch.dtype,
    latents_shape: tuple[int, ...],
    text_length: int,
    setting: str = "auto",
    memory: Path | None = None,
    device: torch.device | None = None,
) -> dict[str, str]:
    """Sets the attention processors of ``unet`` and returns which shape got which (plain or sdpa).

    ``setting`` is ``backbone.attention``. ``auto`` means sdpa on an accelerator; on a CPU one layer of
    every shape that latents of ``latents_shape`` (N, C, h, w) and texts of ``text_length`` tokens lead to
    is timed with both, forward and backward, in ``dtype`` (under autocast if the weights are of another).
    The two round differently, so the choice is kept in the JSON file ``memory`` where it can be: the next run on this
    machine takes the same one, and a seed gives the same weights again.

    ``device``: where the UNet will compute, if it is not there yet. Call it before LoRA is injected or input
    channels are added. Raises ConfigError for an unknown setting.
    """
    if setting not in (*PROCESSORS, "auto"):
        raise ConfigError(f"backbone.attention={setting} is unknown: use auto, plain or sdpa.")
    if setting == "auto" and (device or unet.device).type != "cpu":
        setting = "sdpa"
    if setting != "auto":
        unet.set_attn_processor(PROCESSORS[setting]())
        return {"all": setting}

    layers = _layers_by_shape(unet, latents_shape, text_length)
    key = f"{platform.node()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    remembered = _read(memory)
    known = remembered.setdefault(key, {})
    chosen: dict[str, str] = {}
    is_new = False
    for shape, same in layers.items():
        name = f"{latents_shape[0]} x {shape} {dtype} on {same[0].to_q.weight.dtype}"
        if known.get(name) not in PROCESSORS:
            with torch.random.fork_rng(devices=[]):  # a seed's weights must not depend on whether this was timed
                known[name] = _faster(same[0], shape, latents_shape[0], dtype)
            is_new = True
        chosen[str(shape)] = known[name]
        for layer in same:
            layer.set_processor(PROCESSORS[known[name]]())
    if memory is not None and is_new:
        _write(memory, remembered)
    return chosen


def _read(memory: Path | None) -> dict[str, dict[str, str]]:
    """What was chosen before; nothing where there is no such file, or one that cannot be read."""
    try:
        found = {} if memory is None else json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(one, dict) for one in found.values()) else {}


def _write(memory: Path, remembered: dict[str, dict[str, str]]) -> None:
    """Keep the choice; where that cannot be, as beside a run that may only be read, it holds for this time alone."""
    partial = memory.with_suffix(f".partial{os.getpid()}")  # jobs and processes share this file
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(remembered, indent=1), encoding="utf-8")
        partial.replace(memory)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        say_once(f"{memory} cannot be written ({error.strerror}): attention was timed for this time alone")


@torch.no_grad()
def _layers_by_shape(
    unet: UNet2DConditionModel, latents_shape: tuple[int, ...], text_length: int
) -> dict[Shape, list[Attention]]:
    """Runs the UNet once, on one image, to see what reaches each of its attention layers."""
    found: dict[Shape, list[Attention]] = {}

    def note(layer: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        context = kwargs.get("encoder_hidden_states")
        length = None if context is None else context.shape[1]
        shape = Shape(args[0].shape[1], layer.to_q.in_features, layer.heads, length)
        found.setdefault(shape, []).append(layer)

    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    latents = torch.zeros(1, unet.config["in_channels"], *latents_shape[2:], dtype=unet.dtype)
    text = torch.zeros(1, text_length, unet.config["cross_attention_dim"], dtype=unet.dtype)
    unet(latents, torch.zeros(1), encoder_hidden_states=text)
    for hook in hooks:
        hook.remove()
    return found


def _faster(layer: Attention, shape: Shape, batch_size: int, dtype: torch.dtype) -> str:
    weight_dtype = layer.to_q.weight.dtype
    states = torch.randn(batch_size, shape.tokens, shape.channels, dtype=weight_dtype, requires_grad=True)
    context = None
    if shape.context is not None:
        context = torch.randn(batch_size, shape.context, layer.to_k.in_features, dtype=weight_dtype)
    seconds = {}
    for name, processor in PROCESSORS.items():
        layer.set_processor(processor())
        seconds[name] = _time(layer, states, context, dtype)
    return min(seconds, key=lambda name: seconds[name])


@torch.enable_grad()  # whoever asks may only want to draw
def _time(layer: Attention, states: torch.Tensor, context: torch.Tensor | None, dtype: torch.dtype) -> float:
    """The best of three passes, in seconds, after one to warm up; just that one if it took long."""
    seconds: list[float] = []
    for _ in range(4):
        begin = time.perf_counter()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != states.dtype):
            output = layer(states, encoder_hidden_states=context)
        torch.autograd.grad(output.float().sum(), states)
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] > 0.5:
            break
    return min(seconds[1:] or seconds)
