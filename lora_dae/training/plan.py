"""``plan=true``: what a run would train, write and need, without loading a weight.

Memory is that of one real step of the real model on fake tensors (sizes without contents), counted by PeakMemory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_dae.adapter.inject import inject, make_full_finetune, trainable_parameters
from lora_dae.adapter.source_input import attach_source_input
from lora_dae.adapter.table import adapter_table
from lora_dae.adapter.text import inject_text
from lora_dae.backbone import pooled
from lora_dae.backbone.family import FAMILIES
from lora_dae.backbone.hub import REPOSITORIES
from lora_dae.backbone.int8 import to_int8
from lora_dae.backbone.layout import CONFIGS, inspect_backbone
from lora_dae.backbone.load import WEIGHTS, encode_batch
from lora_dae.backbone.recompute import recompute
from lora_dae.config import Config
from lora_dae.data.buckets import parse_buckets
from lora_dae.data.sources import check_source, load_splits
from lora_dae.enhancement.module import build_enhancement
from lora_dae.training.memory import PeakMemory, materialize
from lora_dae.training.stages import planned_stages

_HUB_CONFIGS = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


@dataclass(frozen=True)
class Plan:
    """Numbers of a run to come; sizes in bytes."""

    family: str
    trainable: int  # parameters
    stages: list[tuple[str, int, int]]  # name, steps and batch size of what trains, in order
    images: int  # photos of the training split; 0: no data.root is given
    cache: int  # at most, captions that repeat are kept once; without data.root of one photo
    adapter_file: int
    checkpoint: int
    encoding_peak: int  # while VAE and text encoders fill the cache
    resting: int  # VAE and text encoders, which no step needs: beside it on a CPU, else on the host
    step_peak: int  # one training step
    libraries: int  # this process without any model: interpreter and libraries, which a run has as well
    process: int  # a run on a CPU at its largest: all of this together
    table: str


@dataclass(frozen=True)
class _Shapes:
    """What a plan needs to know of a backbone."""

    family: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, dict[str, Any]]  # the text encoders' configs, by component
    text_length: int


def make_plan(cfg: Config) -> Plan:
    """Builds the models of ``cfg`` from their configs alone. Raises ConfigError as the run itself would."""
    shapes = _shapes(cfg)
    images, has_source = _images(cfg)
    latents = _latents_shape(cfg, shapes)
    unet, vae, encoders = _meta_unet(cfg, shapes), _meta_vae(shapes), _meta_encoders(cfg, shapes)
    live = encoders if cfg.adapter.trains_text else {}
    trainable = sum(p.numel() for model in (unet, *live.values()) for p in trainable_parameters(model).values())
    extra: dict[str, nn.Module] = dict(live)
    enhancement = build_enhancement(cfg.enhancement, int(shapes.unet["out_channels"]), cfg.conditioning)
    if enhancement is not None:
        extra["enhancement"] = enhancement
        trainable += sum(p.numel() for p in extra["enhancement"].parameters())
    table = adapter_table(unet, extra)
    text_size = 4 * sum(p.numel() for encoder in encoders.values() for p in encoder.parameters())
    resting = 4 * sum(p.numel() for p in vae.parameters()) + (0 if live else text_size)
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        _encode(vae, cfg)
    encoding_peak = memory.peak + text_size
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        materialize(unet, WEIGHTS[cfg.backbone.weights])
        for encoder in live.values():
            materialize(encoder, torch.float32)
        _step(unet, live, cfg, shapes, latents)
    step_peak = memory.peak
    libraries = psutil.Process().memory_info().rss
    frozen = sum(p.numel() * p.element_size() for p in unet.parameters())
    sample = 2 * latents[1] * latents[2] * latents[3]
    arrays = (1 if shapes.vae["_class_name"] == "AutoencoderTiny" else 2) + int(has_source)
    text = 2 * shapes.text_length * int(shapes.unet["cross_attention_dim"])
    if live:  # tokens instead, two numbers for each
        text = 2 * 2 * len(encoders) * (shapes.text_length - int(shapes.family == "sdxl"))
    return Plan(
        family=shapes.family,
        trainable=trainable,
        stages=planned_stages(cfg, enhancement),
        images=images,
        cache=max(images, 1) * (arrays * sample + text),
        adapter_file=4 * trainable,
        checkpoint=10 * trainable,  # weights; Adam's two moments and the moving average in 2 bytes each (compact.py)
        encoding_peak=encoding_peak,
        resting=resting,
        step_peak=step_peak,
        libraries=libraries,
        process=libraries + max(encoding_peak + frozen, resting + step_peak),
        table=table,
    )


def print_plan(cfg: Config, plan: Plan, console: Console) -> None:
    """The plan as a person reads it."""
    console.print(plan.table, highlight=False)
    table = Table(title=f"Plan of {cfg.name}", show_header=False)
    square = f"{cfg.data.resolution} x {cfg.data.resolution}"
    at_once = encode_batch(cfg.data.resolution**2)
    steps = [f"{count} of {batch} photos" for _, count, batch in plan.stages]
    if plan.images:
        passes = plan.stages[0][1] * plan.stages[0][2] / plan.images
        steps[0] += f" ({passes:.1f} passes over {plan.images})"
    how = f"{cfg.trainer.get('precision', 'auto')}, batch {cfg.data.batch_size}, {square}"
    if cfg.backbone.gradient_checkpointing:
        how += ", gradient checkpointing" + ("" if cfg.backbone.gradient_checkpointing is True else " of attention")
    rows = {
        "backbone": f"{FAMILIES[plan.family]}, weights {cfg.backbone.weights}",
        **{f"steps, {name}": text for (name, *_), text in zip(plan.stages, steps, strict=True)},
        "cache": f"at most {_size(plan.cache)}{'' if plan.images else ' a photo (data.root is not given)'}",
        "adapter file": f"{_size(plan.adapter_file)} (checkpoint while training {_size(plan.checkpoint)})",
        "memory, encoding": f"{_size(plan.encoding_peak)} ({at_once} photos of {square} at once)",
        "memory, one step": f"{_size(plan.step_peak)} ({how})",
        "memory, at rest": f"{_size(plan.resting)} (VAE, text encoder: beside the step on a CPU, else on the host)",
        "memory, process": f"{_size(plan.process)} on a CPU ({_size(plan.libraries)} of it Python and its libraries)",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(
        "Memory: tensors alive at the peak. Measured error (steps of the shipped backbone on a CPU, batches 4 and 16,\n"
        "float32, bf16, int8): a step's tensors within .2 %; the plan of the whole process 7 to 14 % too low, as the\n"
        "allocator leaves gaps between what steps freed: allow 1.2 times as much.",
        highlight=False,
    )


def _shapes(cfg: Config) -> _Shapes:
    """From the backbone's configs; those in the package where a hub model is not there yet."""
    hub = cfg.backbone.path is None and cfg.backbone.repo is None and cfg.backbone.name in REPOSITORIES
    if hub:
        path, family = CONFIGS / _HUB_CONFIGS[cfg.backbone.name], _HUB_CONFIGS[cfg.backbone.name]
        vae_path = path / "vae"
    else:
        folder = inspect_backbone(cfg.backbone, cfg.data.resolution)
        path, family, vae_path = folder.path, folder.family, folder.vae_path
    encoders = [p for p in (path / "text_encoder", path / "text_encoder_2") if (p / "config.json").is_file()]
    configs = [_read(p / "config.json") for p in encoders]
    return _Shapes(
        family,
        _read(path / "unet" / "config.json"),
        _read(vae_path / "config.json"),
        {encoder.name: config for encoder, config in zip(encoders, configs, strict=True)},
        int(configs[0].get("max_position_embeddings", 77)) * cfg.backbone.text_chunks + int(family == "sdxl"),
    )


def _images(cfg: Config) -> tuple[int, bool]:
    """Photos to train on (0 without data.root), and whether they have a source."""
    if cfg.data.name == "studio":
        return cfg.data.train_size, cfg.conditioning == "source"
    if cfg.data.root is None:
        return 0, cfg.conditioning == "source"
    train = load_splits(cfg.data)["train"]
    check_source(cfg, train)
    return len(train), cfg.conditioning == "source"


def _latents_shape(cfg: Config, shapes: _Shapes) -> tuple[int, int, int, int]:
    widths = shapes.vae.get("block_out_channels") or shapes.vae.get("encoder_block_out_channels") or [64] * 4
    factor = 2 ** (len(widths) - 1)
    buckets = parse_buckets(cfg.data.buckets, cfg.data.resolution, cfg.data.bucket_step)
    # Of buckets that were named the largest; of all (auto) a photo takes one of about the square's area.
    named = buckets if cfg.data.buckets != ["auto"] else []
    width, height = max(named, key=lambda b: b[0] * b[1], default=(cfg.data.resolution, cfg.data.resolution))
    return cfg.data.batch_size, int(shapes.vae.get("latent_channels", 4)), height // factor, width // factor


def _meta_unet(cfg: Config, shapes: _Shapes) -> UNet2DConditionModel:
    """The UNet as Training sets it up, on the meta device."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(shapes.unet)
    unet.requires_grad_(False)
    if cfg.backbone.weights == "int8":
        to_int8(unet)
    pooled.hook_into(unet, 1)
    recompute(unet, cfg.backbone.gradient_checkpointing, preserve_rng_state=False)
    unet.set_attn_processor(AttnProcessor() if cfg.backbone.attention == "plain" else AttnProcessor2_0())
    if cfg.adapter.full_finetune:
        make_full_finetune(unet)
    else:
        inject(unet, cfg.adapter)
    if cfg.conditioning == "source":
        attach_source_input(unet)
    return unet


def _meta_vae(shapes: _Shapes) -> nn.Module:
    vae_class: Any = AutoencoderTiny if shapes.vae["_class_name"] == "AutoencoderTiny" else AutoencoderKL
    with torch.device("meta"):
        return vae_class.from_config(shapes.vae).requires_grad_(False)


def _meta_encoders(cfg: Config, shapes: _Shapes) -> dict[str, nn.Module]:
    """The text encoders by component, with an adapter where they train."""
    encoders: dict[str, nn.Module] = {}
    for component, config in shapes.text.items():
        kind: Any = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
        with torch.device("meta"):
            encoders[component] = kind(CLIPTextConfig.from_dict(config)).requires_grad_(False)
    if cfg.adapter.trains_text:
        with torch.device("meta"):
            inject_text(encoders, cfg.adapter)
    return encoders


def _step(
    unet: UNet2DConditionModel,
    encoders: dict[str, nn.Module],
    cfg: Config,
    shapes: _Shapes,
    latents: tuple[int, int, int, int],
) -> None:
    """Forward, backward and the optimizer's memory, on zeros; of ``encoders`` too, if there are any."""
    trained = [p for model in (unet, *encoders.values()) for p in trainable_parameters(model).values()]
    kept = [torch.zeros_like(p) for p in trained for _ in range(3)]  # Adam's two, average
    batch = latents[0]
    x = torch.zeros(latents)
    if cfg.conditioning == "source":
        x = torch.cat([x, torch.zeros_like(x)], dim=1)
    x = x.contiguous(memory_format=torch.channels_last)
    with _autocast(cfg):
        text = _text(encoders, cfg, shapes, batch)
        output = unet(x, torch.zeros(batch, dtype=torch.long), encoder_hidden_states=text, return_dict=False)[0]
        loss = (output.float() - torch.zeros_like(output, dtype=torch.float32)).square().mean()
    loss.backward()
    del kept


def _text(encoders: dict[str, nn.Module], cfg: Config, shapes: _Shapes, batch: int) -> Tensor:
    """Embeddings as Backbone.embed_tokens gives them, of the batch and the empty caption; zeros without encoders."""
    if not encoders:
        return torch.zeros(batch, shapes.text_length, int(shapes.unet["cross_attention_dim"]))
    pooled_row = int(shapes.family == "sdxl")
    chunks = cfg.backbone.text_chunks
    tokens = torch.zeros((batch + 1) * chunks, (shapes.text_length - pooled_row) // chunks, dtype=torch.long)
    states = [encoder(tokens, output_hidden_states=True).hidden_states[-2] for encoder in encoders.values()]
    text = torch.cat(states, dim=-1).float().reshape(batch + 1, shapes.text_length - pooled_row, -1)
    return torch.cat([text, text[:, :pooled_row]], dim=1)[:batch]


def _encode(vae: Any, cfg: Config) -> None:
    materialize(vae, torch.float32)
    photos = torch.zeros(encode_batch(cfg.data.resolution**2), 3, cfg.data.resolution, cfg.data.resolution)
    with torch.no_grad(), _autocast(cfg):
        vae.encode(photos)


@contextmanager
def _autocast(cfg: Config) -> Iterator[None]:
    """As Lightning does it for ``trainer.precision``; auto counts as 32-true, which needs most."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(cfg.trainer.get("precision", "auto")))
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
        yield


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
