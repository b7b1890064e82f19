"""Paired conditioning: the source latent enters through extra, zero-initialized input channels of conv_in.

A convolution over concatenated channels is a sum (InstructPix2Pix, Brooks et al. 2023, section 3.2):

    conv_in([x_t, source]) = conv_in(x_t) + source_input(source)

Only the second term is new. It lives as a child module ``unet.source_input`` (so that ``unet.to``,
``parameters`` and ``deepcopy`` carry it along), while ``unet.conv_in`` stays the backbone's own layer with
its own name: LoRA files that target conv_in keep loading elsewhere. ``unet.config.in_channels`` keeps
counting the latent channels alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_dae.adapter.atomic import atomic, load_tensors, save_tensors
from lora_dae.config import ConfigError
from lora_dae.data.catalog import say_once
from lora_dae.data.square import Framing

FILE_NAME = "source_input.safetensors"
FRAMING_FILE = "framing.json"
_KEY = "conv_in.source.weight"
_KIND = "lora_dae.source_input"


class SourceInput(nn.Module):
    """The new input channels: source (N, C, h, w) -> what it adds to conv_in's output (N, width, h, w).

    Zero at initialization, and without a bias, so a zero source always means "no source".
    """

    def __init__(self, latent_channels: int, conv_in: nn.Conv2d) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.conv = nn.Conv2d(
            latent_channels,
            conv_in.out_channels,
            conv_in.kernel_size,  # type: ignore[arg-type]
            padding=conv_in.padding,  # type: ignore[arg-type]
            bias=False,
            device=conv_in.weight.device,
        )
        nn.init.zeros_(self.conv.weight)
        self._split_handle: RemovableHandle | None = None
        self._add_handle: RemovableHandle | None = None
        self._source: Tensor | None = None

    def forward(self, source: Tensor) -> Tensor:
        return self.conv(source.to(self.conv.weight.dtype))

    def hook_into(self, unet: UNet2DConditionModel) -> None:
        """Let the UNet accept [x_t, source] as its sample."""
        self._split_handle = unet.register_forward_pre_hook(self._split, with_kwargs=True)

    def unhook(self) -> None:
        """Undo hook_into."""
        if self._split_handle is not None:
            self._split_handle.remove()
            self._split_handle = None

    def _split(
        self, unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._add_handle is not None:  # left over from a forward that raised before conv_in
            self._add_handle.remove()
            self._add_handle = None
        sample = args[0] if args else kwargs["sample"]
        channels = sample.shape[1]
        if channels == self.latent_channels:
            return None
        if channels != 2 * self.latent_channels:
            raise ConfigError(
                f"The UNet got a sample of {channels} channels; give it {self.latent_channels} (noisy "
                f"latents) or {2 * self.latent_channels} (noisy latents, then the source latents)."
            )
        latents, source = sample.chunk(2, dim=1)
        self._source = source  # used after conv_in, when an offloaded UNet is where it computes
        # Hooked anew in every forward: whatever layer conv_in is by now (plain, or wrapped by PEFT), the
        # source is added to its final output, so the order of attaching and injecting does not matter.
        self._add_handle = unet.conv_in.register_forward_hook(self._add)
        if args:
            return (latents, *args[1:]), kwargs
        return args, {**kwargs, "sample": latents}

    def _add(self, conv_in: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self._add_handle is not None and self._source is not None
        self._add_handle.remove()
        source, self._add_handle, self._source = self._source, None, None
        return output + self(source.to(output.device)).to(output.dtype)


def get_source_input(unet: UNet2DConditionModel) -> SourceInput | None:
    """The attached SourceInput, or None."""
    return getattr(unet, "source_input", None)


def attach_source_input(unet: UNet2DConditionModel) -> SourceInput:
    """Give the UNet trainable input channels for a source latent; before and after inject() are the same.

    Afterwards its sample is ``torch.cat([x_t, source], dim=1)`` (N, 2C, h, w); x_t alone (N, C, h, w) still
    works and equals a zero source. The new weights are float32 zeros with requires_grad; no other parameter
    is touched. Raises ConfigError if one is attached already.
    """
    if get_source_input(unet) is not None:
        raise ConfigError("The UNet already has a source input; detach it first (detach_source_input).")
    conv_in = getattr(unet.conv_in, "base_layer", unet.conv_in)
    source_input = SourceInput(int(unet.config["in_channels"]), conv_in)
    unet.source_input = source_input
    source_input.hook_into(unet)
    return source_input


def detach_source_input(unet: UNet2DConditionModel) -> SourceInput | None:
    """Give back the UNet as it was before attach_source_input; returns what was attached."""
    source_input = get_source_input(unet)
    if source_input is not None:
        source_input.unhook()
        del unet.source_input
    return source_input


def save_source_input(unet: UNet2DConditionModel, path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write the source channels to ``path`` (or FILE_NAME in it, if it is a folder), atomically; returns the file."""
    source_input = get_source_input(unet)
    if source_input is None:
        raise ConfigError("The UNet has no source input to save; it was set up with conditioning=none.")
    return save_tensors(
        {_KEY: source_input.conv.weight}, _file(path), {**(metadata or {}), "format": "pt", "kind": _KIND}
    )


def load_source_input(unet: UNet2DConditionModel, path: str | Path) -> dict[str, str]:
    """Attach the source channels of a file (or of a folder with FILE_NAME in it); returns its metadata.

    Raises ConfigError if the file is missing, is of another kind, or was trained on another backbone.
    """
    file = _file(path)
    if not file.is_file():
        raise ConfigError(f"There is no source input at {file}; it is written by runs with conditioning=source.")
    tensors, metadata = load_tensors(file, f"give the {FILE_NAME} of a run")
    weight = tensors.get(_KEY)
    if metadata.get("kind") != _KIND or weight is None:
        raise ConfigError(f"{file} does not hold a source input; give the {FILE_NAME} of a run.")
    if not bool(weight.isfinite().all()):
        raise ConfigError(f"{file} holds weights that are not finite: it is damaged, or training diverged.")
    conv_in = getattr(unet.conv_in, "base_layer", unet.conv_in)
    if weight.shape != conv_in.weight.shape:
        raise ConfigError(
            f"The source input in {file} has shape {tuple(weight.shape)}, but conv_in of this backbone has "
            f"{tuple(conv_in.weight.shape)}; load the backbone that it was trained on."
        )
    source_input = get_source_input(unet) or attach_source_input(unet)
    if source_input.conv.weight.is_meta:  # as conv_in under sequential offloading: a copy into it would be lost
        source_input.to_empty(device="cpu")
    with torch.no_grad():
        source_input.conv.weight.copy_(weight)
    return {key: value for key, value in metadata.items() if key not in ("format", "kind")}


def save_framing(framing: Framing, folder: Path) -> Path:
    """Write it alone, where the source's channels are in the UNet itself, fully fine-tuned; returns the path."""
    with atomic(folder / FRAMING_FILE) as partial:
        partial.write_text(json.dumps(framing.header()), encoding="utf-8")
    return folder / FRAMING_FILE


def load_framing(path: str | Path) -> Framing:
    """How training framed source photos, as a file (or folder) of save_source_input tells in its header, or of
    save_framing.

    Where training framed them in two ways, that is said. The default where there is no file, as in runs on captions.
    """
    file = _file(path)
    alone = file.with_name(FRAMING_FILE)
    if file.is_file():
        header = load_tensors(file, f"give the {FILE_NAME} of a run")[1]
    elif alone.is_file():
        header = json.loads(alone.read_text(encoding="utf-8"))
    else:
        return Framing()
    framing = Framing.of(header)
    if framing.mixed:
        way, other = ("padded", "cropped") if framing.whole else ("cropped", "padded")
        say_once(
            f"to become squares, {framing.mixed} of the training photos were {way} and the others {other}, their "
            f"source photos alike: a source photo that is given now is {way}"
        )
    return framing


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE_NAME if path.is_dir() or not path.suffix else path
