"""diffusers' text-to-image LoRA example (train_text_to_image_lora.py of its examples), rebuilt on its public API.

As its documentation and defaults describe it: frozen parts in the precision it is told, LoRA of PEFT on the attention
projections with Gaussian init, datasets' imagefolder with transforms in the main process, VAE and text encoder in the
loop, plain MSE, AdamW, gradient clipping, a learning rate schedule, all through accelerate. What differs: torchvision's
transforms are done by Pillow and torch, the same operations; a backbone with a TAESD has no posterior to draw from; a
last batch that is not full is left out; no checkpoint, validation picture and log; the time of every optimizer step is
written down.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


def transform(image: Image.Image, resolution: int) -> Tensor:
    """Resize (Lanczos, the shorter side), CenterCrop, ToTensor, Normalize([0.5], [0.5])."""
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    pixels = np.array(image.crop((left, top, left + resolution, top + resolution)))
    return (torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255) - 0.5) / 0.5


def loader(photos: Path, tokenizer: Any, resolution: int, batch: int, work: Path) -> Any:
    dataset = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train", cache_dir=str(work))

    def preprocess(examples: dict[str, list[Any]]) -> dict[str, Any]:
        tokens = tokenizer(
            examples["text"], max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        pixels = [transform(image.convert("RGB"), resolution) for image in examples["image"]]
        return {"pixel_values": pixels, "input_ids": tokens.input_ids}

    def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        pixels = torch.stack([example["pixel_values"] for example in examples])
        return {
            "pixel_values": pixels.to(memory_format=torch.contiguous_format).float(),
            "input_ids": torch.stack([example["input_ids"] for example in examples]),
        }

    transformed = dataset.with_transform(preprocess)
    return torch.utils.data.DataLoader(transformed, shuffle=True, collate_fn=collate, batch_size=batch, drop_last=True)


def train(
    backbone: Path, photos: Path, work: Path, resolution: int, batch: int, steps: int, precision: str, rank: int
) -> tuple[list[float], UNet2DConditionModel]:
    """(Unix time of the end of each step, the trained UNet); ``precision`` is accelerate's, no or bf16."""
    accelerator = Accelerator(mixed_precision=precision)
    scheduler = DDPMScheduler.from_pretrained(backbone, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(backbone, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(backbone, subfolder="text_encoder")
    tiny = AutoencoderKL.load_config(backbone, subfolder="vae")["_class_name"] == "AutoencoderTiny"
    vae: Any = (AutoencoderTiny if tiny else AutoencoderKL).from_pretrained(backbone, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(backbone, subfolder="unet")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False)
        part.to(accelerator.device, dtype=dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    layers = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    data = loader(photos, tokenizer, resolution, batch, work)
    rate = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=steps)
    unet, optimizer, data, rate = accelerator.prepare(unet, optimizer, data, rate)
    unet.train()
    times: list[float] = []
    while len(times) < steps:
        for given in data:
            with accelerator.accumulate(unet):
                encoded = vae.encode(given["pixel_values"].to(dtype=dtype))
                latents = (encoded.latents if tiny else encoded.latent_dist.sample()) * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),)).long()
                noisy = scheduler.add_noise(latents, noise, timesteps.to(latents.device))
                text = text_encoder(given["input_ids"], return_dict=False)[0]
                target = noise
                if scheduler.config.prediction_type == "v_prediction":
                    target = scheduler.get_velocity(latents, noise, timesteps.to(latents.device))
                predicted = unet(noisy, timesteps.to(latents.device), text, return_dict=False)[0]
                loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
                accelerator.gather(loss.repeat(batch)).mean().item()  # its train_loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(layers, 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            times.append(time.time())
            if len(times) == steps:
                break
    return times, accelerator.unwrap_model(unet)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.example", description=__doc__)
    for name in ("backbone", "photos", "work", "file"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, default in (("resolution", 128), ("batch", 16), ("steps", 40), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    args = vars(parser.parse_args())
    file = args.pop("file")
    file.write_text(json.dumps(train(**args)[0]))


if __name__ == "__main__":
    main()
