"""CLIPScore: does the picture fit its caption?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from lora_dae.config import ConfigError

WEIGHT = 2.5
BATCH = 16


class ClipScore:
    """CLIPScore = 2.5 * max(cos(image, caption), 0) per image. Source: Hessel et al. 2021, equation 1.

    Values of different CLIP models do not compare, torchmetrics' is 100 * max(cos, 0), and the paper's captions begin
    with "A photo depicts", which is left out here as in torchmetrics: the model and the formula are printed. Raises
    ConfigError when ``model`` (a folder or hub name) cannot be loaded.
    """

    def __init__(self, model: str, device: str | torch.device = "cpu") -> None:
        try:
            self.model = CLIPModel.from_pretrained(model, use_safetensors=True).eval().requires_grad_(False)
            self.processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise ConfigError(f"evaluation.clip={model} cannot be loaded ({reason}).") from error
        self.model.to(device)  # type: ignore[arg-type]
        self.name = model
        self.max_tokens = int(self.model.config.text_config.max_position_embeddings)

    def check(self, captions: Sequence[str]) -> None:
        """Raises ConfigError for a caption that CLIP would cut off."""
        for caption in captions:
            length = len(self.processor.tokenizer(caption)["input_ids"])
            if length > self.max_tokens:
                raise ConfigError(
                    f"a caption has {length} tokens, CLIP reads {self.max_tokens}: shorten it ({caption[:40]!r}...), "
                    "or leave evaluation.clip out."
                )

    @torch.inference_mode()
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Float NCHW in [0, 1] and as many captions -> (N,). Raises ConfigError as ``check``."""
        if len(images) != len(captions):
            raise ConfigError(f"{len(images)} images need as many captions, got {len(captions)}.")
        self.check(captions)
        values = []
        for start in range(0, len(images), BATCH):
            pixels = (images[start : start + BATCH] * 255).round().to(torch.uint8)
            inputs = self.processor(
                images=list(pixels), text=list(captions[start : start + BATCH]), return_tensors="pt", padding=True
            ).to(self.model.device)
            out = self.model(**inputs)
            cos = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            values.append(WEIGHT * cos.clamp(min=0).cpu())
        return torch.cat(values)
