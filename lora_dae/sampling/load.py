"""A finished run's folder: what is in it, and its parts back in memory.

config.yaml                      the resolved config
adapter/pytorch_lora_weights.safetensors   LoRA, for any diffusers pipeline (or adapter/unet: full fine-tuning)
adapter/peft_adapter.safetensors           LoHa or LoKr in its place
adapter/learned_embeds.safetensors         or the words of a textual inversion
adapter/source_input.safetensors           the extra input channels of conditioning=source; header: photos' framing
adapter/enhancement.safetensors            the enhancement module
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from lora_dae.adapter.files import FILE_NAME, load_adapter
from lora_dae.adapter.other import FILE_NAME as OTHER_FILE
from lora_dae.adapter.other import load_other
from lora_dae.adapter.source_input import load_source_input
from lora_dae.adapter.words import FILE_NAME as WORDS_FILE
from lora_dae.adapter.words import load_words
from lora_dae.backbone.attention import choose_attention
from lora_dae.backbone.group_norm import quicken_group_norms
from lora_dae.backbone.load import Backbone, load_backbone
from lora_dae.backbone.pooled import hook_into
from lora_dae.config import Config
from lora_dae.data.catalog import say_once
from lora_dae.enhancement.files import load_enhancement
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.finished import ENHANCEMENT_FILE, finished_config

SOURCE_FILE = "source_input.safetensors"


@dataclass
class LoadedRun:
    """A run's config and trained parts; the UNet inside ``backbone`` carries the adapter."""

    directory: Path
    cfg: Config
    backbone: Backbone
    enhancement: EnhancementModule | None

    def drawer(self, bf16: bool) -> Drawer:
        cfg = self.cfg
        return Drawer(
            self.backbone, self.enhancement, cfg.enhancement.placement, cfg.conditioning, cfg.data.resolution,
            cfg.sampling, bf16,
        )  # fmt: skip


def load_run(
    run_dir: Path,
    device: str | torch.device = "cpu",
    weights: str | None = None,
    vae: str | None = None,
    draws: bool = True,
) -> LoadedRun:
    """Load backbone, adapter, source input and enhancement of a run, frozen, in eval mode.

    ``weights`` (fp32, bf16, fp16 or int8) instead of the run's own ``backbone.weights``, ``vae`` instead of its
    ``backbone.vae_path``: a folder with one of the same latents, such as a TAESD for previews. ``draws``: False for who
    wants the weights alone, for which nothing is timed or laid out. Raises ConfigError, before weights load, for what
    ``finished_config`` refuses.
    """
    cfg = finished_config(run_dir)
    adapter = run_dir / "adapter"
    own = cfg.backbone
    backbone = load_backbone(replace(own, weights=weights or own.weights, vae_path=vae or own.vae_path), device)
    if (adapter / "unet").is_dir():
        unet = UNet2DConditionModel.from_pretrained(adapter / "unet", torch_dtype=torch.float32, use_safetensors=True)
        hook_into(unet, backbone.vae_scale_factor)
        backbone.unet = unet.to(device)
    if draws:
        prepare_unet(backbone, cfg)
    if not (adapter / "unet").is_dir():
        if (adapter / SOURCE_FILE).is_file():
            load_source_input(backbone.unet, adapter)
        if (adapter / FILE_NAME).is_file():
            load_adapter(backbone.unet, adapter, backbone.text_encoders)
        if (adapter / OTHER_FILE).is_file():
            load_other(backbone.unet, adapter, cfg.adapter)
        if (adapter / WORDS_FILE).is_file():
            load_words(backbone, adapter)
    backbone.unet.to(device).requires_grad_(False).eval()
    module = None
    if (adapter / ENHANCEMENT_FILE).is_file():
        module = load_enhancement(adapter / ENHANCEMENT_FILE).to(device).requires_grad_(False).eval()
    return LoadedRun(run_dir, cfg, backbone, module)


def prepare_unet(backbone: Backbone, cfg: Config, device: torch.device | None = None) -> str:
    """channels_last, quick norms and the fastest attention, before anything is injected; returns what was chosen.

    ``device``: where the UNet will compute, if it is not there yet.
    """
    if (device or backbone.unet.device).type == "cpu" and backbone.unet.dtype == torch.float16:
        # Autocast computes in bfloat16 there, in which norms of float16 cannot.
        say_once("backbone.weights=fp16: a CPU holds them as bfloat16, in which it computes")
        backbone.unet.to(torch.bfloat16)
    backbone.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    backbone.vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    quicken_group_norms(backbone.unet)
    size = cfg.data.resolution // backbone.vae_scale_factor
    shape = (cfg.data.batch_size, backbone.latent_channels, size, size)
    chosen = choose_attention(
        backbone.unet,
        torch.bfloat16,
        shape,
        backbone.text_length,
        cfg.backbone.attention,
        Path(cfg.data.cache_dir) / "attention.json",
        device,
    )
    return ", ".join(sorted(set(chosen.values())))
