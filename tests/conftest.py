"""Fixtures for all rooms: a tiny random Stable Diffusion and a tiny folder of photos, both on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before any library reads them: tests reach no hub and no tracker.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# The models here are so small that handing work to a second thread costs more than it saves.
torch.set_num_threads(1)

CAPTIONS = [
    "a product photo of a red dress with white dots",
    "a blue shirt in a plaid pattern",
    "a woman wearing a green striped skirt",
    "a knitted grey sweater on a mannequin",
]
TOKEN_LENGTH = 16


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of random weights: 32x32 images, 8 latent channels of 8x8, v-prediction.

    AutoencoderTiny with f = 4, UNet (16, 32) with cross-attention on both levels, CLIP of width 32.
    """
    path = tmp_path_factory.mktemp("tiny_backbone")
    torch.manual_seed(0)
    write_tokenizer(path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer")
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKEN_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    CLIPTextModel(text_config).save_pretrained(path / "text_encoder")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=8,
        scaling_factor=1.5,
    ).save_pretrained(path / "vae")
    UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).save_pretrained(path / "unet")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 photos of 40x30 pixels in images/, with metadata.jsonl: four captions, two categories."""
    root = tmp_path_factory.mktemp("tiny_folder")
    write_photos(root, 24)
    return root


def write_photos(root: Path, count: int, size: tuple[int, int] = (40, 30)) -> None:
    """A folder of random photos and its metadata.jsonl."""
    (root / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:03d}.png")
        row = {
            "file_name": f"{number:03d}.png",
            "text": CAPTIONS[number % len(CAPTIONS)],
            "category": "dress" if number % 2 else "shirt",
        }
        lines.append(json.dumps(row))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_tokenizer(path: Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json of a BPE trained on CAPTIONS."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(CAPTIONS, trainer)
    path.mkdir()
    bpe.model.save(str(path))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKEN_LENGTH,
        "bos_token": special[0],
        "eos_token": special[1],
        "pad_token": special[1],
        "unk_token": special[1],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
