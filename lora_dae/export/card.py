"""The README.md beside the adapter files: a model card with usage for every tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_dae.adapter.files import FILE_NAME
from lora_dae.backbone.family import FAMILIES
from lora_dae.config import Config

KOHYA_FILE = "adapter_kohya.safetensors"
_PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def base_model(cfg: Config) -> str:
    """How a user names the backbone."""
    return cfg.backbone.path or "<lora_dae>/backbone/studio/weights"


def model_card(cfg: Config, family: str, files: list[str], metrics: dict[str, Any] | None, has_grid: bool) -> str:
    """Markdown with the hub's YAML head. ``metrics``: the contents of metrics.json; ``files``: names in the folder."""
    lines = [
        "---",
        f"base_model: {json.dumps(base_model(cfg))}",
        "library_name: diffusers",
        "tags: [lora, stable-diffusion, text-to-image, fashion]",
        f"license: {cfg.export.license}",
        "---",
        "",
        f"# {cfg.name}",
        "",
        "Made by LoRA-DAE.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base_model(cfg)} ({FAMILIES[family]}) |",
        f"| adapter | {_adapter(cfg)} |",
        f"| data | {_data(cfg)} |",
        f"| training | {cfg.trainer.get('max_steps')} steps of {cfg.data.batch_size}, seed {cfg.seed} |",
        f"| enhancement | {cfg.enhancement.placement if cfg.enhancement.enabled else 'none'} |",
        f"| files | {', '.join(files)} |",
        "",
    ]
    if has_grid:
        lines += ["![The same captions and noise in every column](grid.png)", ""]
    if metrics is not None:
        lines += ["## Metrics", "", *_metrics(metrics), ""]
    return "\n".join([*lines, "## Use", "", *_use(cfg, family, files)]) + "\n"


def _adapter(cfg: Config) -> str:
    if cfg.adapter.full_finetune:
        return "all UNet weights"
    if cfg.adapter.kind == "textual_inversion":
        return f"textual inversion, {cfg.adapter.words} vectors in front of every caption"
    conv = cfg.adapter.conv_rank or cfg.adapter.rank
    kind = {"loha": "LoHa", "lokr": "LoKr"}.get(cfg.adapter.kind, "DoRA" if cfg.adapter.use_dora else "LoRA")
    return f"{kind} on {', '.join(cfg.adapter.targets)}; rank {cfg.adapter.rank}, convolutions {conv}"


def _data(cfg: Config) -> str:
    if cfg.data.name == "studio":
        return f"drawn by the procedural studio ({cfg.data.difficulty}), {cfg.data.train_size} pairs"
    return f"a folder of photos, {Path(cfg.data.root or '').name}"


def _metrics(table: dict[str, Any]) -> list[str]:
    names = sorted({name for row in table["methods"].values() for name in row})
    lines = ["| | " + " | ".join(table["methods"]) + " |", "|---|" + "---|" * len(table["methods"])]
    for name in names:
        values = [row.get(name, {}).get("value") for row in table["methods"].values()]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.4g}" for v in values) + " |")
    return lines


def _use(cfg: Config, family: str, files: list[str]) -> list[str]:
    pipeline, base, guidance = _PIPELINES[family], base_model(cfg), cfg.sampling.guidance_scale
    prompt = '"a woman wearing a red plaid shirt"'
    lines: list[str] = []
    if FILE_NAME in files:
        strength = cfg.enhancement.strength
        placement = ', placement="direction"' if cfg.enhancement.placement == "direction" else ""
        source = ', source=Image.open("mannequin.jpg")' if cfg.conditioning == "source" else ""
        lines += [
            "With LoRA-DAE (adapter, enhancement and source photo) on any diffusers pipeline:", "",
            "```python",
            f"from diffusers import {pipeline}",
            "import lora_dae",
            *(["from PIL import Image"] if source else []),
            "",
            f'pipe = {pipeline}.from_pretrained("{base}")',
            f'lora_dae.attach(pipe, ".", strength={strength:g}{placement})',
            f"image = pipe({prompt}, guidance_scale={guidance:g}{source}).images[0]",
            "```", "",
            "The LoRA alone, in plain diffusers:", "",
            "```python",
            f'pipe.load_lora_weights("{FILE_NAME}")',
            "```", "",
        ]  # fmt: skip
    if KOHYA_FILE in files:
        lines += [
            f"**ComfyUI, A1111, Forge, kohya**: put `{KOHYA_FILE}` into the LoRA folder and use it at weight 1.",
            "In ComfyUI the node of `integrations/comfyui` adds the enhancement.", "",
        ]  # fmt: skip
        if cfg.adapter.use_dora:
            lines += [
                "This is a DoRA with norms of rows: ComfyUI, Forge and LyCORIS apply it exactly; A1111 takes the norms "
                f"for those of columns, and diffusers leaves them out of kohya files (use `{FILE_NAME}` there).", "",
            ]  # fmt: skip
    return lines
