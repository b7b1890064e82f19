"""A finished run on anybody's Stable Diffusion pipeline of diffusers, and off again.

    pipe = lora_dae.attach(pipe, "runs/<run>/adapter", strength=0.6)
    image = pipe("a red plaid shirt", source=Image.open("mannequin.jpg"), enhancement_strength=0.8).images[0]
    lora_dae.detach(pipe)

The pipeline becomes an instance of a subclass of its own class whose ``__call__`` enhances the scheduler that it
has at that moment, for that call alone. So schedulers may be swapped in between, nothing global changes, and two
pipelines do not know of each other.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_dae.adapter.files import FILE_NAME, check_adapter
from lora_dae.adapter.fused import fuse, merged_once
from lora_dae.adapter.other import FILE_NAME as OTHER_FILE
from lora_dae.adapter.source_input import FILE_NAME as SOURCE_FILE
from lora_dae.adapter.source_input import detach_source_input, load_framing, load_source_input
from lora_dae.adapter.text import COMPONENTS
from lora_dae.config import ConfigError
from lora_dae.data.square import Framing
from lora_dae.enhancement.files import load_enhancement
from lora_dae.enhancement.hook import enhance_scheduler
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.registration import RegisteredSource, for_images

ENHANCEMENT_FILE = "enhancement.safetensors"
_NAME = "lora_dae"  # of the adapter in the pipeline


@dataclass
class Attached:
    """What attach() added to a pipeline."""

    module: EnhancementModule | None
    strength: float
    placement: str
    has_source: bool
    merged: bool
    framing: Framing


def attach(
    pipe: Any, adapter: str | Path, strength: float = 1.0, placement: str | None = None, merged: bool = False
) -> Any:
    """Load a run's ``adapter`` folder into a pipeline with a UNet, in place; returns the pipeline.

    LoRA, source input and enhancement, as far as the folder has them. Calls then take two more arguments:
    ``enhancement_strength`` (>= 0, instead of ``strength``) and, for runs with conditioning=source, ``source``: one
    photo, or one per prompt. The source is guided together with the text, by ``guidance_scale``. ``placement``: None is
    what the module learned to edit (files that do not say: ``prediction``). ``merged``: each call adds the LoRA into a
    copy of the weights that it changes and takes its steps with that, faster by the LoRA's own cost, and rounded
    differently. Raises ConfigError for a folder without an adapter, one of another backbone, and a pipeline that has
    one already.
    """
    folder = Path(adapter)
    if getattr(pipe, "unet", None) is None or getattr(pipe, "scheduler", None) is None:
        raise ConfigError(f"{type(pipe).__name__} has no UNet and scheduler; use a Stable Diffusion pipeline.")
    if isinstance(pipe, _AttachedPipeline):
        raise ConfigError("this pipeline has a run attached already: call lora_dae.detach(pipe) first.")
    if getattr(pipe.unet, "peft_config", None):
        raise ConfigError("this pipeline carries other adapters: fuse_lora() and unload_lora_weights() them first.")
    files = {name: (folder / name).is_file() for name in (FILE_NAME, ENHANCEMENT_FILE, SOURCE_FILE)}
    for name in ("unet", OTHER_FILE):
        if (folder / name).exists():
            raise ConfigError(
                f"{folder} holds no LoRA but {name}, which no pipeline loads: make a whole model of it by "
                "export.py format=merged."
            )
    if not files[FILE_NAME]:
        raise ConfigError(f"there is no adapter in {folder}: give the adapter folder of a finished run.")
    module = load_enhancement(folder / ENHANCEMENT_FILE).eval() if files[ENHANCEMENT_FILE] else None
    if placement is None:
        placement = "prediction" if module is None else module.placement
    if module is not None:
        enhance_scheduler(pipe.scheduler, module, strength, placement)  # refuses what cannot be enhanced
        module.requires_grad_(False)
    check_adapter(pipe.unet, folder / FILE_NAME, _text_encoders(pipe))
    framing = load_framing(folder / SOURCE_FILE)
    try:
        if files[SOURCE_FILE]:
            dtype, device = pipe.unet.dtype, pipe.unet.device
            load_source_input(pipe.unet, folder / SOURCE_FILE)
            source_input = pipe.unet.source_input.requires_grad_(False).to(dtype)
            if device.type != "meta":  # sequential offloading is applied again with the LoRA, and takes it along
                source_input.to(device)
        pipe.load_lora_weights(folder, weight_name=FILE_NAME, adapter_name=_NAME)
        if merged:
            fuse(pipe.unet)
            pipe.unet.eval()  # diffusers adds layers in training mode, in which no merged weight is kept
    except BaseException:
        _take_off(pipe)
        raise
    pipe._lora_dae = Attached(module, strength, placement, files[SOURCE_FILE], merged, framing)
    pipe.__class__ = _attached_class(type(pipe))  # type: ignore[arg-type]
    return pipe


def detach(pipe: Any) -> Any:
    """Undo attach() in place; returns the pipeline, which draws bit for bit as before. Does nothing to a plain one."""
    if isinstance(pipe, _AttachedPipeline):
        pipe.__class__ = type(pipe).plain_class
        del pipe._lora_dae
        _take_off(pipe)
    return pipe


def _take_off(pipe: Any) -> None:
    detach_source_input(pipe.unet)
    pipe.unload_lora_weights()


def _text_encoders(pipe: Any) -> dict[str, Any]:
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: encoder for name, encoder in found.items() if encoder is not None}


class _AttachedPipeline:
    """Mixin of every pipeline with a run attached."""

    plain_class: type
    _lora_dae: Attached


@functools.cache
def _attached_class(plain: Any) -> type:
    """A subclass under the plain class's own name, so that it is saved as what it is."""
    signature = inspect.signature(plain.__call__)

    @functools.wraps(plain.__call__)
    def call(
        self: Any, *args: Any, enhancement_strength: float | None = None, source: Any = None, **kwargs: Any
    ) -> Any:
        state: Attached = self._lora_dae
        strength = state.strength if enhancement_strength is None else enhancement_strength
        if state.module is None and enhancement_strength:
            raise ConfigError("this run was trained without enhancement: leave enhancement_strength out, or give 0.")
        once = merged_once(self.unet) if state.merged else nullcontext()
        given = signature.bind_partial(self, *args, **kwargs).arguments
        perturbed = signature.parameters.get("pag_scale")
        if source is not None and perturbed is not None and given.get("pag_scale", perturbed.default) > 0:
            raise ConfigError("source does not go with perturbed-attention guidance: give pag_scale=0, or no source.")
        photos = _photos(self, state, source, given)
        latents = None if photos is None else _encode(self, photos)
        trust, placed = _Trust(state.module, latents), None
        if state.module is not None and photos is not None and latents is not None:
            placed = state.module.registering(photos, latents, functools.partial(_encode, self))
        seen = latents if placed is None else placed
        shown = photos if placed is None else placed
        with once, _enhanced(self, state, strength, seen, trust), _refined(self, state, strength, shown, trust):
            with _with_source(self, latents):
                return plain.__call__(self, *args, **kwargs)

    namespace = {"__call__": call, "plain_class": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_AttachedPipeline, plain), namespace)


@dataclass
class _Trust:
    """In the sources of one call, by the captions that its first step shows the UNet."""

    module: EnhancementModule | None
    latents: Tensor | None
    value: Tensor | None = None  # (B,): one per image

    @property
    def asked(self) -> bool:
        """Whether there is something to ask that has not been answered yet."""
        unanswered = self.value is None and self.latents is not None
        return unanswered and self.module is not None and self.module.agreement is not None

    def read(self, text: Tensor, guided: bool) -> None:
        """``text`` as pipelines batch it: the unconditional half first where there is guidance."""
        shown = text.chunk(2)[-1] if guided else text
        assert self.module is not None
        with torch.no_grad():
            self.value = self.module.trust(shown, for_images(self.latents, shown))


@contextmanager
def _enhanced(
    pipe: Any, state: Attached, strength: float, source: Tensor | RegisteredSource | None, trust: _Trust
) -> Iterator[None]:
    if state.module is None or strength == 0:
        yield
        return
    plain = pipe.scheduler
    scheduler = enhance_scheduler(plain, state.module, strength, state.placement, source)

    def after(_unet: Any, inputs: tuple[Any, ...], call: dict[str, Any], output: Any) -> None:
        if trust.asked:
            text = inputs[2] if len(inputs) > 2 else call["encoder_hidden_states"]
            trust.read(text, bool(pipe.do_classifier_free_guidance))
            scheduler.enhancement.trust = trust.value
        scheduler.set_conditional(output[0])

    hook = pipe.unet.register_forward_hook(after, with_kwargs=True)
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        hook.remove()
        pipe.scheduler = plain


@contextmanager
def _refined(
    pipe: Any, state: Attached, strength: float, source: Tensor | RegisteredSource | None, trust: _Trust
) -> Iterator[None]:
    """The decoder stage behind the VAE, for one call."""
    if state.module is None or state.module.decoder is None or strength == 0 or state.placement == "none":
        yield
        return
    module, plain = state.module, pipe.vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        result = plain(*args, **kwargs)
        images = result[0].float() / 2 + 0.5
        photos = source.moved if isinstance(source, RegisteredSource) else source
        trusted = source.trusted(trust.value) if isinstance(source, RegisteredSource) else trust.value
        photos, trusted = for_images(photos, images), for_images(trusted, images)
        refined = (module.refine(images.clamp(0, 1), photos, strength, trusted) * 2 - 1).to(result[0].dtype)
        return (refined, *result[1:]) if isinstance(result, tuple) else type(result)(sample=refined)

    pipe.vae.decode = decode
    try:
        yield
    finally:
        del pipe.vae.decode  # the class's own shows again


@contextmanager
def _with_source(pipe: Any, latents: Tensor | None) -> Iterator[None]:
    if latents is None:
        yield
        return

    def add(unet: Any, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sample = args[0] if args else call["sample"]
        shown = _for_batch(latents.to(sample), len(sample), bool(pipe.do_classifier_free_guidance))
        widened = torch.cat([sample, shown], dim=1)
        return ((widened, *args[1:]), call) if args else (args, {**call, "sample": widened})

    hook = pipe.unet.register_forward_pre_hook(add, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _for_batch(latents: Tensor, batch: int, guided: bool) -> Tensor:
    """(S, C, h, w) for a batch as pipelines order it: unconditional half (no source, so zeros), then conditional."""
    rows = batch // 2 if guided else batch
    if rows % len(latents):
        raise ConfigError(f"source has {len(latents)} photos for {rows} images: give one, or one per prompt.")
    shown = latents.repeat_interleave(rows // len(latents), dim=0)
    return torch.cat([torch.zeros_like(shown), shown]) if guided else shown


def _photos(pipe: Any, state: Attached, source: Any, given: dict[str, Any]) -> Tensor | None:
    """PIL images or uint8 (H, W, 3) arrays as (S, 3, H, W) in [0, 1], framed as in training for the image's square."""
    if source is None:
        return None
    if not state.has_source:
        raise ConfigError("this run was trained on captions alone: leave source out.")
    height, width = _size(pipe, given)
    if height != width:
        raise ConfigError(f"source needs a square image, not {height} x {width}: give the same height and width.")
    photos = source if isinstance(source, list | tuple) else [source]
    squares = [state.framing.fit(_picture(photo), height) for photo in photos]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255


def _size(pipe: Any, given: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of what a call with these arguments draws: as asked for, as its image, or the UNet's own.

    Only inpainting leaves its image out of this.
    """
    usual = pipe.unet.config.sample_size * pipe.vae_scale_factor
    height, width = given.get("height"), given.get("width")
    if height is None and width is None and given.get("image") is not None and "mask_image" not in given:
        image = pipe.image_processor.preprocess(given["image"])  # latents come back as they are
        factor = pipe.vae_scale_factor if image.shape[1] == pipe.image_processor.config.vae_latent_channels else 1
        height, width = (side * factor for side in image.shape[-2:])
    return height or usual, width or usual


@torch.no_grad()
def _encode(pipe: Any, photos: Tensor) -> Tensor:
    """Scaled latents of photos."""
    vae, dtype = pipe.vae, pipe.vae.dtype
    if dtype == torch.float16 and vae.config.get("force_upcast"):  # overflows in half precision
        vae.to(torch.float32)
    encoded = vae.encode((photos * 2 - 1).to(pipe._execution_device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    vae.to(dtype)
    return (latents.float() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def _picture(photo: Any) -> Image.Image:
    if isinstance(photo, Image.Image):
        return photo
    if isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.ndim == 3:
        return Image.fromarray(photo)
    raise ConfigError(f"source is a {type(photo).__name__}: give PIL images or uint8 arrays (H, W, 3).")
