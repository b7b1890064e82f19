"""The README.md beside the adapter files: a model card with usage for every tool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_dae.adapter.files import FILE_NAME
from lora_dae.adapter.kohya import KOHYA_FILE
from lora_dae.adapter.other import FILE_NAME as OTHER_FILE
from lora_dae.adapter.words import FILE_NAME as WORDS_FILE
from lora_dae.adapter.words import TOKEN
from lora_dae.backbone.family import FAMILIES
from lora_dae.backbone.hub import repository
from lora_dae.backbone.usage import PIPELINES, own_scheduler, plain_pipeline
from lora_dae.config import Config
from lora_dae.data.sources import licence_notice
from lora_dae.export.merged import FILE as MERGED_FILE
from lora_dae.export.merged import FOLDER as MERGED_FOLDER
from lora_dae.sampling.load import ENHANCEMENT_FILE

MARK = "Made by LoRA-DAE."  # by which an export knows a card that one of ours wrote


def base_model(cfg: Config) -> str:
    """How a reader knows the backbone: a hub id, or a file's or folder's name without the places on this machine."""
    named = repository(cfg.backbone)
    if named is not None:
        return named[0]
    return "the one in lora_dae" if cfg.backbone.path is None else Path(cfg.backbone.path).name


def model_card(
    cfg: Config,
    family: str,
    files: list[str],
    metrics: dict[str, Any] | None,
    has_grid: bool,
    resized: tuple[int, float] | None = None,
) -> str:
    """Markdown with the hub's YAML head. ``metrics``: the contents of metrics.json; ``files``: names in the folder.

    ``resized``: (rank, share of the energy kept) of adapter files that were made smaller than trained.
    """
    named = repository(cfg.backbone)
    smaller = "" if resized is None else f"; in these files at most {resized[0]}, with {resized[1]:.2%} of the energy"
    lines = [
        "---",
        # The hub takes nothing but its own ids here.
        *([] if named is None else [f"base_model: {json.dumps(named[0])}"]),
        "library_name: diffusers",
        "tags: [lora, stable-diffusion, text-to-image, fashion]",
        f"license: {cfg.export.license}",
        "---",
        "",
        f"# {cfg.name}",
        "",
        MARK,
        "",
        "| | |",
        "|---|---|",
        f"| base model | {_base(cfg, family)} |",
        f"| adapter | {_adapter(cfg)}{smaller} |",
        f"| data | {_data(cfg)} |",
        f"| training | {_training(cfg)} |",
        f"| enhancement | {cfg.enhancement.placement if cfg.enhancement.enabled else 'none'} |",
        f"| files | {', '.join(files)} |",
        "",
    ]
    if has_grid:
        lines += ["![The same captions and noise in every column](grid.png)", ""]
    if metrics is not None:
        lines += ["## Metrics", "", *_metrics(metrics), ""]
        if resized is not None:
            lines += ["They are those of the adapter as it was trained, before its rank was made smaller.", ""]
    return "\n".join([*lines, "## Use", "", *_use(cfg, family, files)]) + "\n"


def _base(cfg: Config, family: str) -> str:
    """The backbone, and in what it differs from the files of that name."""
    b, named = cfg.backbone, repository(cfg.backbone)
    revision = "" if named is None or named[1] is None else f" at {named[1]}"
    told = [FAMILIES[family]]
    if b.prediction_type != "auto":
        told.append(b.prediction_type)
    if b.zero_terminal_snr is not None:
        told.append("zero terminal SNR" if b.zero_terminal_snr else "no zero terminal SNR")
    if b.vae_path is not None:
        told.append(f"VAE {Path(b.vae_path).name}")
    return f"{base_model(cfg)}{revision} ({', '.join(told)})"


def _adapter(cfg: Config) -> str:
    if cfg.adapter.full_finetune:
        return "all UNet weights"
    if cfg.adapter.kind == "textual_inversion":
        return f"textual inversion, {cfg.adapter.words} vectors in front of every caption"
    conv = cfg.adapter.conv_rank or cfg.adapter.rank
    kind = {"loha": "LoHa", "lokr": "LoKr"}.get(cfg.adapter.kind, "DoRA" if cfg.adapter.use_dora else "LoRA")
    return f"{kind} on {', '.join(cfg.adapter.targets)}; rank {cfg.adapter.rank}, convolutions {conv}"


def total_batch(cfg: Config) -> int | None:
    """Samples of one optimizer step on all devices; None where the config leaves open how many these are."""
    devices = cfg.trainer.get("devices", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if not str(devices).isdecimal():  # auto, -1
        return None
    rounds = int(cfg.trainer.get("num_nodes") or 1) * int(cfg.trainer.get("accumulate_grad_batches") or 1)
    return cfg.data.batch_size * int(devices) * rounds


def stops_early(cfg: Config) -> bool:
    """Whether the adapter may have been trained for fewer steps than the config says."""
    return cfg.trainer.get("early_stop_patience") is not None


def _training(cfg: Config) -> str:
    whole, most = total_batch(cfg), "up to " if stops_early(cfg) else ""
    size = f"{cfg.data.batch_size} per device" if whole is None else str(whole)
    return f"{most}{cfg.trainer.get('max_steps')} steps of {size}, seed {cfg.seed}"


def _data(cfg: Config) -> str:
    d = cfg.data
    if d.name == "studio":
        return f"drawn by the procedural studio ({d.difficulty}), {d.train_size} pairs"
    told = ["a folder of photos" if d.name == "folder" else d.name, Path(d.root or "").name]
    told.append(f"{d.resolution} x {d.resolution} pixels" + (", aspect buckets of that area" if d.buckets else ""))
    if d.captions.trigger is not None:
        told.append(f"captions begin with `{d.captions.trigger}`")
    notice = licence_notice(d)
    return ", ".join(told) + ("" if notice is None else f" ({notice})")


def _metrics(table: dict[str, Any]) -> list[str]:
    names = sorted({name for row in table["methods"].values() for name in row})
    lines = ["| | " + " | ".join(table["methods"]) + " |", "|---|" + "---|" * len(table["methods"])]
    for name in names:
        values = [row.get(name, {}).get("value") for row in table["methods"].values()]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.4g}" for v in values) + " |")
    return lines


def _use(cfg: Config, family: str, files: list[str]) -> list[str]:
    pipeline, guidance, by_source = PIPELINES[family], cfg.sampling.guidance_scale, cfg.sampling.source_guidance_scale
    paired = cfg.conditioning == "source"
    trigger = "" if cfg.data.captions.trigger is None else f"{cfg.data.captions.trigger} "
    prompt = f"{trigger}a woman wearing a red plaid shirt"
    lines: list[str] = []
    if FILE_NAME in files:
        strength = cfg.enhancement.strength
        placement = ', placement="direction"' if cfg.enhancement.placement == "direction" else ""
        source = ', source=Image.open("mannequin.jpg")' if paired else ""
        lines += [
            "With LoRA-DAE (adapter, enhancement and source photo) on any diffusers pipeline:", "",
            "```python",
            f"from diffusers import {pipeline}",
            "import lora_dae",
            *(["from PIL import Image"] if source else []),
            "",
            f"pipe = {plain_pipeline(cfg.backbone, family)}",
            *own_scheduler(cfg.backbone, cfg.enhancement.placement == "direction"),
            f'lora_dae.attach(pipe, ".", strength={strength:g}{placement})',
            f'image = pipe("{prompt}", guidance_scale={guidance:g}{source}).images[0]',
            "```", "",
        ]  # fmt: skip
        if paired and guidance != by_source:
            lines += [
                f"`attach` guides caption and source photo by one scale; this run was drawn with {guidance:g} for the "
                f"caption and {by_source:g} for the source photo, which `python sample.py run=<run>` does.", "",
            ]  # fmt: skip
        lines += [
            f"The LoRA alone, in plain diffusers{', from text alone' if paired else ''}:", "",
            "```python",
            f'pipe.load_lora_weights("{FILE_NAME}")',
            "```", "",
        ]  # fmt: skip
    if KOHYA_FILE in files:
        lines += [
            f"**ComfyUI, A1111, Forge, kohya**: put `{KOHYA_FILE}` into the LoRA folder and use it at weight 1.",
            "In ComfyUI the node of `integrations/comfyui` adds the enhancement's gain, if the run has kept one.", "",
        ]  # fmt: skip
        if paired:
            lines += ["The file draws from text alone: the source photo enters by `lora_dae.attach`.", ""]
        if cfg.adapter.use_dora:
            instead = "export `format=merged_file`, a whole model, for these"
            if paired:
                instead = "with its source photo a whole model (`format=merged`) is for diffusers alone"
            lines += [
                "This is a DoRA with norms of rows. LyCORIS applies it exactly; ComfyUI and Forge scale each row by "
                f"|W + dW| / |W|, and A1111 takes the norms for those of columns: {instead}. diffusers leaves the "
                f"norms out of kohya files (use `{FILE_NAME}` there).", "",
            ]  # fmt: skip
    if MERGED_FOLDER in files:
        lines += _use_merged(cfg, prompt, ENHANCEMENT_FILE in files)
    if MERGED_FILE in files:
        lines += [
            f"`{MERGED_FILE}` is the whole model, for the checkpoint folder of ComfyUI, A1111 and Forge.", "",
        ]  # fmt: skip
    if WORDS_FILE in files:
        lines += [
            f"Words were learned, for which `{TOKEN}` stands in a prompt:", "",
            "```python",
            f"from diffusers import {pipeline}",
            "import lora_dae", "",
            f"pipe = {plain_pipeline(cfg.backbone, family)}",
            *own_scheduler(cfg.backbone),
            f'pipe.load_textual_inversion("{WORDS_FILE}")',
            f'image = pipe("{TOKEN} {prompt}", guidance_scale={guidance:g}).images[0]',
            "```", "",
        ]  # fmt: skip
    for name, what in (("unet", "all weights of the UNet"), (OTHER_FILE, "an adapter in PEFT's own layout")):
        if name in files:
            lines += [f"`{name}` is {what}: `python export.py run=<run> format=merged` makes a whole model of it.", ""]
    return lines


def _use_merged(cfg: Config, prompt: str, has_enhancement: bool) -> list[str]:
    paired, sampling = cfg.conditioning == "source", cfg.sampling
    given = f'"{prompt}", guidance_scale={sampling.guidance_scale:g}'
    if paired:
        given += f', image=Image.open("mannequin.jpg"), image_guidance_scale={sampling.source_guidance_scale:g}'
    lines = [
        f"`{MERGED_FOLDER}/` is the whole model with the adapter in its weights, in diffusers' layout. diffusers finds "
        "no pipeline in a folder of a repository: from the hub fetch it first, by `hf download <repository> --include "
        f"'{MERGED_FOLDER}/*' --local-dir .`.", "",
        "```python",
        "from diffusers import DiffusionPipeline",
        *(["from PIL import Image"] if paired else []),
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{MERGED_FOLDER}")',
        f"image = pipe({given}).images[0]",
        "```", "",
    ]  # fmt: skip
    if paired:
        side = cfg.data.resolution
        lines += [f"`mannequin.jpg` is a photo of {side} x {side} pixels: the picture becomes as large as it.", ""]
    if has_enhancement:
        attaches = cfg.adapter.kind == "lora" and not cfg.adapter.full_finetune
        way = "`lora_dae.attach` adds it to the base model, with the LoRA" if attaches else "`sample.py` draws with it"
        lines += [f"`{ENHANCEMENT_FILE}` changes nothing in a merged model: {way}.", ""]
    return lines
