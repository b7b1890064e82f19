"""Tiny random models with the structure of SD 1.5, SD 2.1 and SDXL, for the adapter's tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

TEXT_DIM = 16
_SD15: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_DIM,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_SD21 = {**_SD15, "use_linear_projection": True, "attention_head_dim": (2, 4)}
_SDXL = {
    **_SD21,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_DIM,
}
FAMILIES = {"sd15": _SD15, "sd21": _SD21, "sdxl": _SDXL}


def tiny_unet(family: str = "sd15", channels: int = 4, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(in_channels=channels, out_channels=channels, **FAMILIES[family]).eval()


def randomize(module: nn.Module, std: float = 0.2, seed: int = 1) -> None:
    """Stand-in for training: give every trainable weight a random value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * std)


def predict(unet: UNet2DConditionModel, channels: int = 4, family: str = "sd15") -> Tensor:
    """The UNet's output on fixed inputs whose sample has ``channels`` channels."""
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(2, channels, 8, 8, generator=generator)
    text = torch.randn(2, 3, TEXT_DIM, generator=generator)
    added = {"text_embeds": text[:, 0], "time_ids": torch.ones(2, 6)} if family == "sdxl" else None
    with torch.no_grad():
        return unet(sample, 500, text, added_cond_kwargs=added).sample


def plain_pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of diffusers around the UNet; it takes prompt embeddings."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(4,), norm_num_groups=4, latent_channels=unet.config["in_channels"]),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline) -> Tensor:
    """Latents (1, C, 8, 8): guidance 3, two steps, fixed noise and text."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 3, TEXT_DIM, generator=generator)
    return pipeline(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=generator,
        output_type="latent",
    ).images
