"""The networks that the benchmarks take steps with, and the ways of laying them out that are compared."""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from diffusers import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from lora_dae.adapter.inject import inject
from lora_dae.backbone.attention import choose_attention
from lora_dae.backbone.group_norm import quicken_group_norms
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import round_frozen
from lora_dae.config import AdapterConfig, BackboneConfig, Config
from lora_dae.training.module import LoraDae
from lora_dae.training.trainer import quiet


def arranged(unet: UNet2DConditionModel, shape: tuple[int, ...], text_length: int) -> UNet2DConditionModel:
    """torch's and diffusers' own kernels as they are fastest: channels_last, and SDPA or plain attention by shape."""
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    choose_attention(unet, torch.bfloat16, shape, text_length, "auto")
    return unet


def prepared(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """What a run does to an ``arranged`` network before anything is injected (sampling.load.prepare_unet)."""
    quicken_group_norms(unet)
    return unet


def as_trained(unet: UNet2DConditionModel, adapter: AdapterConfig | None, in_place: bool) -> UNet2DConditionModel:
    """An ``arranged`` network as training.stages.Training has it in bf16-mixed; None: without anything that trains.

    Unless ``in_place``, rows that share its weights keep theirs.
    """
    prepared(unet)
    if adapter is not None:
        inject(unet, adapter)
    if not in_place:
        for layer in (m for m in unet.modules() if type(m) in (nn.Linear, nn.Conv2d)):
            for name, weight in layer.named_parameters(recurse=False):
                if not weight.requires_grad:
                    setattr(layer, name, nn.Parameter(weight.data, requires_grad=False))
    round_frozen(unet, "bf16-mixed")
    return unet


def training_optimizer(unet: UNet2DConditionModel) -> torch.optim.Optimizer:
    """The one that train.py's adapter stage makes for what trains in ``unet``, from that stage's own code."""
    module = LoraDae(
        SimpleNamespace(unet=unet, scheduler=None),  # type: ignore[arg-type]
        Config(run_dir="", conditioning="none"), None, torch.zeros(1, 1), "adapter",
    )  # fmt: skip
    module.trainer = trainer = lightning.Trainer(  # held, as the module keeps a weak reference
        max_steps=350, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    found = module.configure_optimizers()["optimizer"]
    del trainer
    return found


@dataclass
class Parts:
    """One model's networks, and a batch. ``alone``: only one row is made, so the weights are laid out in place."""

    unet: UNet2DConditionModel
    vae: Any
    text_encoder: Any
    latents: Tensor  # (B, C, size, size)
    images: Tensor
    tokens: Tensor
    text: Tensor  # (B, L, D), as the cache holds it
    alone: bool = False
    _kept: dict[str, Any] = field(default_factory=dict)

    def as_it_comes(self) -> UNet2DConditionModel:
        """Contiguous float32 weights, SDPA."""
        return sharing(self.unet)

    def arranged(self) -> UNet2DConditionModel:
        """On one set of weights, with one choice of attention, for all rows that ask."""
        if "arranged" not in self._kept:
            # All but the convolutions' weights, which are what channels_last changes.
            unet = self.unet if self.alone else sharing(self.unet, lambda p: p.ndim != 4)
            self._kept["arranged"] = arranged(unet, tuple(self.latents.shape), self.text.shape[1])
        return sharing(self._kept["arranged"])

    def cast(self, name: str, dtype: torch.dtype) -> Any:
        """A part with its weights in ``dtype``, as diffusers' example holds what it freezes."""
        part = getattr(self, name)
        if dtype == torch.float32:
            return sharing(part)
        if (name, dtype) not in self._kept:
            self._kept[name, dtype] = (part if self.alone else copy.deepcopy(part)).to(dtype)  # type: ignore[index]
        return sharing(self._kept[name, dtype])  # type: ignore[index]


def sharing(module: Any, which: Any = lambda _: True) -> Any:
    """A copy on the same weights, or on those of them that ``which`` holds for."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if which(p)})


def build(model: str, batch: int, size: int) -> Parts:
    """The shipped studio backbone, or SD 1.5's architecture with random weights."""
    quiet()
    torch.manual_seed(0)
    vae: Any
    if model == "studio":
        backbone = load_backbone(BackboneConfig())
        unet, vae, text_encoder = backbone.unet, backbone.vae, backbone.text_encoder
        factor, length = backbone.vae_scale_factor, backbone.text_length
    else:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
        factor, length = 8, 77
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval()
    channels, width = unet.config["in_channels"], unet.config["cross_attention_dim"]
    return Parts(
        unet, vae, text_encoder,
        torch.randn(batch, channels, size, size), torch.rand(batch, 3, factor * size, factor * size) * 2 - 1,
        torch.randint(0, 400, (batch, length)), torch.randn(batch, length, width),
    )  # fmt: skip


def machine() -> str:
    """Processor, threads and torch, in words."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"
