"""A judge in this process: any image-text-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from lora_dae.backbone.precision import best_device
from lora_dae.config import ConfigError
from lora_dae.vqa.bank import Question
from lora_dae.vqa.judges import JudgeConfig, Reply, enlarged, prompt, refuse_thoughts, score_reply


class TransformersJudge:
    """Greedy decoding, the processor's own chat template, safetensors only, no code from the hub."""

    concurrency = 1
    cost = 0.0

    def __init__(self, name: str, cfg: JudgeConfig) -> None:
        """Raises ConfigError when the model or its processor cannot be had, or there is no chat template."""
        model_name = str(cfg.model)
        try:
            self.processor = AutoProcessor.from_pretrained(model_name)
            self.model: Any = AutoModelForImageTextToText.from_pretrained(
                model_name, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise ConfigError(f"judges.{name}.model={model_name} cannot be loaded ({reason}).") from error
        if not getattr(self.processor, "chat_template", None):
            raise ConfigError(f"judges.{name}.model={model_name} has no chat template: use a chat model.")
        known = self.processor.tokenizer.get_vocab()
        # Every way in which the answers of a score can begin: token number -> text.
        self._answers = {k: t for t, k in known.items() if t.strip("\u0120\u2581 ").lower() in ("yes", "no")}
        self.device = best_device()
        self.model.to(self.device).eval()  # type: ignore[arg-type]
        self.name = name
        self.model_name = model_name
        self.max_tokens = cfg.max_tokens
        weights = sum(float(p.detach().sum(dtype=torch.float64)) for p in self.model.parameters())
        # The sum of the weights: a folder may hold another model tomorrow.
        self.key = f"transformers {model_name} {weights:.6g} max={cfg.max_tokens}"

    def takes(self, question: Question) -> bool:
        return question.kind != "score" or bool(self._answers)

    @torch.inference_mode()
    def ask(self, images: Sequence[np.ndarray], question: Question) -> Reply:
        pictures = [enlarged(image) for image in images]
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": prompt(question)}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(images=pictures, text=text, return_tensors="pt").to(self.device, self.model.dtype)
        asked = inputs["input_ids"].shape[1]
        if question.kind == "score":
            first = self.model(**inputs).logits[0, -1].float().softmax(dim=0)
            told = {token: first[k].item() for k, token in self._answers.items()}
            return Reply(score_reply(told), prompt_tokens=asked)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_tokens)[0, asked:]
        raw = self.processor.decode(tokens, skip_special_tokens=True)
        cut = len(tokens) >= self.max_tokens
        reply = Reply(raw, prompt_tokens=asked, completion_tokens=len(tokens), cut=cut)
        refuse_thoughts(self.name, self.model_name, self.max_tokens, reply)
        return reply
