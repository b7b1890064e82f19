"""``plan=true``: what a run would train, write and need, without loading a weight.

Memory is that of one real step of the real model on fake tensors (sizes without contents), counted by PeakMemory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lora_dae.adapter.inject import inject, make_full_finetune, trainable_parameters
from lora_dae.adapter.source_input import attach_source_input
from lora_dae.adapter.table import adapter_table
from lora_dae.backbone import pooled
from lora_dae.backbone.family import FAMILIES
from lora_dae.backbone.hub import REPOSITORIES
from lora_dae.backbone.layout import CONFIGS, inspect_backbone
from lora_dae.backbone.load import WEIGHTS, encode_batch
from lora_dae.config import Config
from lora_dae.data.sources import check_source, load_splits
from lora_dae.enhancement.module import build_enhancement
from lora_dae.training.memory import PeakMemory, materialize

_HUB_CONFIGS = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


@dataclass(frozen=True)
class Plan:
    """Numbers of a run to come; sizes in bytes."""

    family: str
    trainable: int  # parameters
    steps: int
    images: int  # photos of the training split
    cache: int  # at most; captions that repeat are kept once
    adapter_file: int
    checkpoint: int
    encoding_peak: int  # while VAE and text encoders fill the cache
    step_peak: int  # one training step
    table: str


@dataclass(frozen=True)
class _Shapes:
    """What a plan needs to know of a backbone."""

    family: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_length: int
    text_parameters: int


def make_plan(cfg: Config) -> Plan:
    """Builds the models of ``cfg`` from their configs alone. Raises ConfigError as the run itself would."""
    shapes = _shapes(cfg)
    images, has_source = _images(cfg)
    latents = _latents_shape(cfg, shapes)
    unet, extra = _meta_unet(cfg, shapes)
    table = adapter_table(unet, extra)  # type: ignore[arg-type]
    trainable = sum(p.numel() for p in trainable_parameters(unet).values())
    enhancement = sum(p.numel() for m in extra.values() for p in m.parameters())
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        materialize(unet, WEIGHTS[cfg.backbone.weights])
        _step(unet, cfg, shapes, latents)
    step_peak = memory.peak
    with FakeTensorMode(allow_non_fake_inputs=True), PeakMemory() as memory:
        _encode(cfg, shapes)
    encoding_peak = memory.peak + 4 * shapes.text_parameters
    sample = 2 * latents[1] * latents[2] * latents[3]
    arrays = (1 if shapes.vae["_class_name"] == "AutoencoderTiny" else 2) + int(has_source)
    text = 2 * shapes.text_length * int(shapes.unet["cross_attention_dim"])
    return Plan(
        family=shapes.family,
        trainable=trainable + enhancement,
        steps=int(cfg.trainer.get("max_steps", 500)),
        images=images,
        cache=images * (arrays * sample + text),
        adapter_file=4 * (trainable + enhancement),
        checkpoint=4 * 4 * (trainable + enhancement),  # weights, Adam's two moments, moving average
        encoding_peak=encoding_peak,
        step_peak=step_peak,
        table=table,
    )


def print_plan(cfg: Config, plan: Plan, console: Console) -> None:
    """The plan as a person reads it."""
    console.print(plan.table, highlight=False)
    table = Table(title=f"Plan of {cfg.name}", show_header=False)
    square = f"{cfg.data.resolution} x {cfg.data.resolution}"
    at_once = encode_batch(cfg.data.resolution**2)
    passes = plan.steps * cfg.data.batch_size / plan.images
    how = f"{cfg.trainer.get('precision', 'auto')}, batch {cfg.data.batch_size}, {square}"
    if cfg.backbone.gradient_checkpointing:
        how += ", gradient checkpointing"
    rows = {
        "backbone": f"{FAMILIES[plan.family]}, weights {cfg.backbone.weights}",
        "steps": f"{plan.steps} of {cfg.data.batch_size} photos ({passes:.1f} passes over {plan.images})",
        "cache": f"at most {_size(plan.cache)}",
        "adapter file": f"{_size(plan.adapter_file)} (checkpoint while training {_size(plan.checkpoint)})",
        "memory, encoding": f"{_size(plan.encoding_peak)} ({at_once} photos of {square} at once)",
        "memory, one step": f"{_size(plan.step_peak)} ({how})",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.print(
        "Memory: tensors alive at the peak, without the operators' own scratch and what the process itself needs.\n"
        "Measured error: a real CPU step of the shipped backbone (batch 16, float32) grew the process by 573 MB where\n"
        "this count has 404 MB of activations: allow 1.4 times the difference to the weights on a CPU.",
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
        int(configs[0].get("max_position_embeddings", 77)) + int(family == "sdxl"),
        sum(_text_parameters(c) for c in configs),
    )


def _text_parameters(config: dict[str, Any]) -> int:
    """Of a CLIP text encoder: embeddings, then per layer four projections, two of the MLP and two norms."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    embeddings = (int(config["vocab_size"]) + int(config.get("max_position_embeddings", 77))) * width
    projection = width * int(config.get("projection_dim", 0)) if "WithProjection" in str(config["architectures"]) else 0
    return embeddings + int(config["num_hidden_layers"]) * layer + 2 * width + projection


def _images(cfg: Config) -> tuple[int, bool]:
    """Photos to train on, and whether they have a source."""
    if cfg.data.name == "studio":
        return cfg.data.train_size, cfg.conditioning == "source"
    train = load_splits(cfg.data)["train"]
    check_source(cfg, train)
    return len(train), cfg.conditioning == "source"


def _latents_shape(cfg: Config, shapes: _Shapes) -> tuple[int, int, int, int]:
    widths = shapes.vae.get("block_out_channels") or shapes.vae.get("encoder_block_out_channels") or [64] * 4
    side = cfg.data.resolution // 2 ** (len(widths) - 1)
    return cfg.data.batch_size, int(shapes.vae.get("latent_channels", 4)), side, side


def _meta_unet(cfg: Config, shapes: _Shapes) -> tuple[UNet2DConditionModel, dict[str, torch.nn.Module]]:
    """The UNet as Training sets it up, on the meta device, and what trains beside it."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(shapes.unet)
    unet.requires_grad_(False)
    pooled.hook_into(unet, 1)
    if cfg.backbone.gradient_checkpointing:
        # fake tensors have no random state to keep
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    unet.set_attn_processor(AttnProcessor() if cfg.backbone.attention == "plain" else AttnProcessor2_0())
    if cfg.adapter.full_finetune:
        make_full_finetune(unet)
    else:
        inject(unet, cfg.adapter)
    if cfg.conditioning == "source":
        attach_source_input(unet)
    extra: dict[str, torch.nn.Module] = {}
    module = build_enhancement(cfg.enhancement, int(shapes.unet["out_channels"]), cfg.conditioning)
    if module is not None:
        extra["enhancement"] = module
    return unet, extra


def _step(unet: UNet2DConditionModel, cfg: Config, shapes: _Shapes, latents: tuple[int, int, int, int]) -> None:
    """Forward, backward and the optimizer's memory, on zeros."""
    kept = [torch.zeros_like(p) for p in trainable_parameters(unet).values() for _ in range(3)]  # Adam's two, average
    batch = latents[0]
    x = torch.zeros(latents)
    if cfg.conditioning == "source":
        x = torch.cat([x, torch.zeros_like(x)], dim=1)
    text = torch.zeros(batch, shapes.text_length, int(shapes.unet["cross_attention_dim"]))
    with _autocast(cfg):
        output = unet(x, torch.zeros(batch, dtype=torch.long), encoder_hidden_states=text, return_dict=False)[0]
        loss = (output.float() - torch.zeros_like(output, dtype=torch.float32)).square().mean()
    loss.backward()
    del kept


def _encode(cfg: Config, shapes: _Shapes) -> None:
    vae_class: Any = AutoencoderTiny if shapes.vae["_class_name"] == "AutoencoderTiny" else AutoencoderKL
    with torch.device("meta"):
        vae = vae_class.from_config(shapes.vae).requires_grad_(False)
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
