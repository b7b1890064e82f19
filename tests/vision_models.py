"""Tiny random models that answer about pictures, written to disk."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %}\n"
)


def letters(*special: str) -> PreTrainedTokenizerFast:
    """Special tokens first, then one token for each printable letter."""
    tokens = [*special, *(chr(c) for c in range(32, 127)), "\n"]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token=special[-1]))
    bpe.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token=special[-1], pad_token=special[0], additional_special_tokens=list(special)
    )


def write_vlm(folder: Path) -> Path:
    """A random Llava: letters as tokens, 28-pixel pictures of four patches."""
    tokenizer = letters("</s>", "<s>", "<image>", "<unk>")
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        image_token="<image>", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    small = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **small).to_dict()
    text = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=0, pad_token_id=0, **small).to_dict()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=2))
    for p in model.model.multi_modal_projector.parameters():
        p.data *= 1e3  # a freshly initialized one hardly looks at its input
    for p in model.model.language_model.parameters():
        p.data *= 3
    model.save_pretrained(folder)
    return folder
