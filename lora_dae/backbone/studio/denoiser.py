"""Step 2 of the recipe: the UNet and its text encoder, trained together on BASE latents.

v-prediction (2202.00512) with min-SNR weights (gamma 20, 2303.09556: 5 leaves the low noise, where faces are
decided, almost out), heads and hands weighted and at first also seen close (``people``), SD's scaled-linear schedule,
10 % of the whole photos' captions dropped for classifier-free guidance; bf16 autocast, channels_last, the
attention that measures fastest; EMA weights are what ships.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lora_dae.backbone.attention import choose_attention
from lora_dae.backbone.studio import people, recipe, words
from lora_dae.backbone.studio.autoencoder import LATENT_CHANNELS
from lora_dae.backbone.studio.recipe import Averaged, Optimizer, Schedule, console
from lora_dae.data.studio.attributes import draw_look, stream
from lora_dae.data.studio.captions import caption
from lora_dae.data.studio.dataset import StudioDataset
from lora_dae.diffusion import min_snr_weight

BATCH, WIDTH, VARIANTS, PHOTO_SHARE = 16, 128, 3, 0.06
MODEL_SHARE = 0.45  # of the studio photos: drawn from models alone, the rest from all views
MIN_SNR_GAMMA = 20.0
MUON_LR = 2e-3
PHOTO_PREFIX, CLOSE_PREFIX = "a product photo of ", "close up of "


def build(vocabulary: int, eos: int) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """About 7.5 M and 0.7 M parameters; all of it in SD 1.5's own classes."""
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=words.MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=0,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )
    return unet, text


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: np.ndarray, file: Path) -> np.ndarray:
    """Latents of all images, float16 (N, 16, 32, 32), kept in ``file``."""
    if not file.exists():
        console.print(f"encoding {len(images)} images into {file.name}")
        out = []
        for k in range(0, len(images), 32):
            x = torch.from_numpy(np.array(images[k : k + 32])).permute(0, 3, 1, 2).float() / 127.5 - 1
            with torch.autocast("cpu", torch.bfloat16):
                z = vae.encode(x.contiguous(memory_format=torch.channels_last)).latents
            out.append(z.float().numpy().astype(np.float16))
        np.save(file, np.concatenate(out))
    return np.load(file, mmap_mode="r")


def base_tokens(data: StudioDataset, tokenizer: CLIPTokenizer, prefix: str = "") -> Tensor:
    """Token ids (N, VARIANTS, L): several wordings of each caption."""
    texts = []
    for i in range(len(data)):
        look = draw_look(data.seed, data.start + i, data.domain)
        texts += [prefix + caption(look, stream(data.seed, data.start + i, f"words{v}")) for v in range(VARIANTS)]
    return tokenize(tokenizer, texts).view(len(data), VARIANTS, -1)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(
        texts, padding="max_length", max_length=words.MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


class Denoiser:
    """The two networks and their loss on given latents, tokens, timesteps and noise."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel):
        self.unet, self.text = unet, text
        self.alphas_cumprod = scheduler().alphas_cumprod

    def loss(self, latents: Tensor, tokens: Tensor, t: Tensor, noise: Tensor, weight: Tensor | None = None) -> Tensor:
        """Min-SNR weighted v-prediction error of each sample, (B,); ``weight`` (B, H, W) is of its places."""
        a = self.alphas_cumprod[t]
        alpha, sigma = a.sqrt()[:, None, None, None], (1 - a).sqrt()[:, None, None, None]
        noisy = (alpha * latents + sigma * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            states = self.text(tokens)[0]
            v = self.unet(noisy, t, states).sample
        error = (v.float() - (alpha * noise - sigma * latents)).square().mean(1)
        error = (error if weight is None else error * weight).mean((1, 2))
        return error * min_snr_weight(a / (1 - a), MIN_SNR_GAMMA, "v_prediction")


def train(minutes: float, work: Path, weights: Path, photo_root: Path | None, seed: int = 0) -> None:
    """Train (or go on training) and write the whole diffusers folder to ``weights``."""
    vae = AutoencoderTiny.from_pretrained(weights / "vae", torch_dtype=torch.float32)
    vae = vae.eval().to(memory_format=torch.channels_last)
    data, val = recipe.base_data(work / "cache")
    real, real_captions = recipe.photos(photo_root)
    latents = encode(vae, data.images, work / "base_latents.npy")
    val_latents = torch.from_numpy(encode(vae, val.images, work / "val_latents.npy").astype(np.float32))
    eos_vocabulary = words.write_tokenizer(weights / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(weights / "tokenizer")
    tokens, val_tokens = base_tokens(data, tokenizer), base_tokens(val, tokenizer)[:, 0]
    close_tokens = base_tokens(data, tokenizer, CLOSE_PREFIX)
    side = latents.shape[-1]
    (places, models), (val_places, val_models) = people.weights_of(data, side), people.weights_of(val, side)
    empty = tokenize(tokenizer, [""])[0]
    real_latents = encode(vae, real, work / "photo_latents.npy") if len(real) else latents[:0]
    real_tokens = tokenize(tokenizer, [PHOTO_PREFIX + c for c in real_captions]) if len(real) else tokens[:0, 0]

    torch.manual_seed(seed)
    unet, text = build(eos_vocabulary, tokenizer.eos_token_id)
    unet.to(memory_format=torch.channels_last)
    choose_attention(
        unet, torch.bfloat16, (BATCH, LATENT_CHANNELS, 32, 32), words.MAX_LENGTH, "auto", work / "attention.json"
    )
    model = Denoiser(unet, text)
    console.print(
        f"UNet {unet.num_parameters() / 1e6:.2f} M, text encoder {text.num_parameters() / 1e6:.2f} M parameters"
    )
    averaged = Averaged({"unet": unet, "text": text}, 0.999)
    files = {"unet": weights / "unet" / "diffusion_pytorch_model.safetensors"}
    recipe.warm_start(averaged, files | {"text": weights / "text_encoder" / "model.safetensors"})
    optimizer = Optimizer(averaged.live, MUON_LR, 1e-3, 0.01)
    schedule, state = Schedule(minutes), work / "denoiser.safetensors"
    if state.exists():
        recipe.load_state(state, averaged, optimizer, schedule)
    losses: list[float] = []
    while not schedule.finished:
        share = schedule.tick()
        rng = np.random.default_rng((seed, schedule.step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + schedule.step)
        if schedule.step % 2 and schedule.spent < people.CLOSE_SHARE * schedule.seconds:
            z, weight, ids = people.close(rng, latents, places, close_tokens, models)
        else:
            n_real = int(rng.binomial(BATCH, PHOTO_SHARE)) if len(real) else 0
            n_studio = BATCH - n_real
            of_models = rng.uniform(size=n_studio) < MODEL_SHARE
            rows = np.where(of_models, rng.choice(models, n_studio), rng.integers(len(latents), size=n_studio))
            variant = rng.integers(VARIANTS, size=n_studio)
            real_rows = rng.integers(max(len(real_latents), 1), size=n_real)
            z = torch.from_numpy(np.concatenate([latents[rows], real_latents[real_rows]]).astype(np.float32))
            ids = torch.cat([tokens[rows, variant], real_tokens[real_rows]])
            ids = torch.where(torch.from_numpy(rng.uniform(size=BATCH) < 0.1)[:, None], empty, ids)
            weight = torch.ones(z.shape[0], *z.shape[2:])
            weight[:n_studio] = torch.from_numpy(places[rows].astype(np.float32))
        t = torch.randint(0, 1000, (len(z),), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        loss = model.loss(z, ids, t, noise, weight).mean()
        loss.backward()
        optimizer.step(share, clip=1.0)
        averaged.update(schedule.step)
        losses.append(float(loss.detach()))
        if schedule.step % 200 == 0:
            console.print(f"{schedule.spent / 60:6.1f} min  step {schedule.step}  loss {np.mean(losses[-200:]):.4f}")
        if schedule.step % 1500 == 0 or schedule.finished:
            recipe.save_state(state, averaged, optimizer, schedule)
            averaged.swap()
            heads = torch.from_numpy((val_places == people.HEAD_WEIGHT)[val_models].astype(np.float32))
            plain = validation_loss(model, val_latents, val_tokens)
            head = validation_loss(model, val_latents[val_models], val_tokens[val_models], heads)
            console.print(f"validation loss {plain:.4f}, heads {head:.4f}")
            save(model, weights)
            averaged.swap()


@torch.no_grad()
def validation_loss(model: Denoiser, latents: Tensor, tokens: Tensor, where: Tensor | None = None) -> float:
    """Loss on fixed noise and evenly spread timesteps; ``where`` (N, H, W) is 1 at the places that count."""
    n = min(256, len(latents))
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 999, n).long()
    noise = torch.randn(latents[:n].shape, generator=generator)
    places = [None if where is None else where[k : k + 32] / where.mean() for k in range(0, n, 32)]
    parts = [
        model.loss(latents[k : k + 32], tokens[k : k + 32], t[k : k + 32], noise[k : k + 32], place)
        for k, place in zip(range(0, n, 32), places, strict=True)
    ]
    return float(torch.cat(parts).mean())


def save(model: Denoiser, weights: Path) -> None:
    """Write unet, text encoder, scheduler and index in float16 (the networks in memory stay float32)."""
    for part, name in ((model.unet, "unet"), (model.text, "text_encoder")):
        kept = {k: v.detach().clone() for k, v in part.state_dict().items()}
        part.half().save_pretrained(weights / name)  # type: ignore[operator]
        part.float().load_state_dict(kept)  # type: ignore[operator]
    scheduler().save_pretrained(weights / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    (weights / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
