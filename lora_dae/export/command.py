"""``export.py``: a finished run's adapter in the formats of other programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_dae.adapter.atomic import atomic
from lora_dae.adapter.files import FILE_NAME
from lora_dae.adapter.kohya import KOHYA_FILE
from lora_dae.adapter.peft_layout import LORA_ADAPTER_METADATA_KEY
from lora_dae.adapter.weights import DTYPES, resize
from lora_dae.backbone.layout import BackboneFolder, inspect_backbone
from lora_dae.backbone.usage import settled
from lora_dae.config import Config, ConfigError
from lora_dae.export.adapter import copy_beside, read_adapter, write_diffusers, write_kohya
from lora_dae.export.card import MARK, model_card, stops_early, total_batch
from lora_dae.export.merged import FILE as MERGED_FILE
from lora_dae.export.merged import FOLDER as MERGED_FOLDER
from lora_dae.export.merged import write_merged_file, write_merged_folder
from lora_dae.export.push import push_folder
from lora_dae.sampling.finished import read_config
from lora_dae.sampling.load import load_run

TOGETHER = {"adapter": ("diffusers", "kohya"), "all": ("diffusers", "kohya", "merged")}
FORMATS = ("diffusers", "kohya", "merged", "merged_file", *TOGETHER)


@dataclass
class ExportRequest:
    """The keys of conf/export.yaml; no ``format``: all, with ``push`` adapter."""

    run: str
    format: str | None
    dtype: str
    resize_rank: int | None
    output: str | None
    push: str | None
    private: bool = True
    grid: bool = False


def export_run(request: ExportRequest, console: Console) -> Path:
    """Write what is asked for, upload just that, and return the folder.

    Raises ConfigError for bad input before weights are loaded, and where an upload is refused.
    """
    run_dir = Path(request.run)
    cfg = read_config(run_dir)
    if request.format is None:
        request = replace(request, format="all" if request.push is None else "adapter")
    _check(request, cfg)
    folder = Path(request.output) if request.output else run_dir / "export"
    _check_output(folder, run_dir / "adapter")
    backbone = inspect_backbone(cfg.backbone)
    written, resized = _write(request, run_dir, cfg, backbone, folder, console)
    for file in written:
        size = sum(f.stat().st_size for f in ([file] if file.is_file() else file.rglob("*")) if f.is_file())
        console.print(f"{size / 1e6:9.2f} MB  {file}", soft_wrap=True, highlight=False)
    written += [folder / name for name in copy_beside(run_dir / "adapter", folder)]
    # Earlier exports may have left gigabytes there, and the grid shows somebody's photos and captions.
    names = [path.name for path in written]
    grid = request.grid or request.push is None
    written += write_card(run_dir, settled(cfg, backbone), backbone.family, folder, names, grid, resized)
    if request.push is not None:
        push_folder(folder, request.push, console, request.private, written)
    return folder


def export_beside(run_dir: Path, cfg: Config, family: str, unet_config: dict[str, Any], prediction_type: str) -> None:
    """What every run writes at its end: the kohya file beside its own, in ``adapter/``."""
    folder = run_dir / "adapter"
    if not cfg.export.kohya or not (folder / FILE_NAME).is_file():
        return
    layers, _ = read_adapter(folder)
    write_kohya(
        layers, folder, family, unet_config, cfg.export.dtype,
        title=cfg.name, resolution=cfg.data.resolution, prediction_type=prediction_type, extra=_facts(cfg),
    )  # fmt: skip


def write_card(
    run_dir: Path,
    cfg: Config,
    family: str,
    folder: Path,
    names: Sequence[str] | None = None,
    grid: bool = True,
    resized: tuple[int, float] | None = None,
) -> list[Path]:
    """README.md in ``folder`` and, with ``grid``, the run's sample grid beside it if there is one; returns both paths.

    ``names``: of the files that it tells about, by default all that are there; ``resized`` as in model_card.
    """
    drawn, metrics = run_dir / "samples" / "grid.png", run_dir / "metrics.json"
    written = [folder / "README.md"]
    if grid and drawn.is_file():
        written.append(folder / "grid.png")
        with atomic(folder / "grid.png") as partial:
            shutil.copyfile(drawn, partial)
    if names is None:
        whole = [f for f in folder.iterdir() if not f.name.startswith(".")]  # not what a killed write has left
        names = [f.name for f in whole if f.suffix == ".safetensors" or f.is_dir()]
    table = json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else None
    with atomic(folder / "README.md") as partial:
        card = model_card(cfg, family, sorted(names), table, len(written) > 1, resized)
        partial.write_text(card, encoding="utf-8")
    return written


def _check(request: ExportRequest, cfg: Config) -> None:
    if request.format not in FORMATS:
        raise ConfigError(f"format={request.format} is unknown: use one of {', '.join(FORMATS)}.")
    if request.dtype not in DTYPES:
        raise ConfigError(f"dtype={request.dtype} is unknown: use one of {', '.join(DTYPES)}.")
    if request.resize_rank is not None and request.resize_rank < 1:
        raise ConfigError(f"resize_rank={request.resize_rank} is below 1: give at least 1.")
    if request.resize_rank is not None and request.format in ("merged", "merged_file"):
        raise ConfigError(f"resize_rank makes an adapter file smaller, which format={request.format} writes none of.")
    if cfg.adapter.full_finetune and request.format not in ("merged", "merged_file"):
        raise ConfigError(f"run={request.run} trained all weights and has no adapter: use format=merged.")
    kind, merged = cfg.adapter.kind, request.format in ("merged", "merged_file")
    if kind == "textual_inversion":
        raise ConfigError(f"run={request.run} learned words, which its adapter folder holds as diffusers reads them.")
    if kind in ("loha", "lokr") and not merged:
        raise ConfigError(f"run={request.run} trained {kind}, which format={request.format} cannot hold: use merged.")
    if request.format == "merged_file" and cfg.conditioning == "source":
        raise ConfigError("a single file has no place for the source photo's channels: use format=merged.")


def _check_output(folder: Path, adapter: Path) -> None:
    """What would be written over must be an earlier export's, which has left its card."""
    card = folder / "README.md"
    if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
        return
    copied = [file.name for file in adapter.glob("*.safetensors")]
    for name in (card.name, "grid.png", FILE_NAME, KOHYA_FILE, MERGED_FOLDER, MERGED_FILE, *copied):
        if (folder / name).exists():
            raise ConfigError(
                f"output={folder} has a {name} that no export wrote and this one would write over: give another folder."
            )


def _write(
    request: ExportRequest, run_dir: Path, cfg: Config, backbone: BackboneFolder, folder: Path, console: Console
) -> tuple[list[Path], tuple[int, float] | None]:
    """(what was written, model_card's ``resized``)."""
    written: list[Path] = []
    resized: tuple[int, float] | None = None
    wanted = TOGETHER.get(str(request.format), (request.format,))
    if "diffusers" in wanted or "kohya" in wanted:
        layers, header = read_adapter(run_dir / "adapter")
        if request.resize_rank is not None:
            layers, kept = resize(layers, request.resize_rank)
            resized = (request.resize_rank, kept)
            console.print(f"rank {request.resize_rank} keeps {kept:.2%} of the adapter's energy", highlight=False)
        if "diffusers" in wanted:
            extra = {k: v for k, v in header.items() if k not in ("format", LORA_ADAPTER_METADATA_KEY)}
            written.append(write_diffusers(layers, folder, request.dtype, extra))
        if "kohya" in wanted:
            written.append(
                write_kohya(
                    layers,
                    folder,
                    backbone.family,
                    backbone.unet_config,
                    request.dtype,
                    title=cfg.name,
                    resolution=cfg.data.resolution,
                    prediction_type=backbone.prediction_type,
                    extra=_facts(cfg),
                )  # fmt: skip
            )
    if "merged" in wanted:
        written.append(write_merged_folder(load_run(run_dir, weights="fp32", draws=False), folder, request.dtype))
    if "merged_file" in wanted:
        run = load_run(run_dir, weights="fp32", draws=False)
        written.append(write_merged_file(run, folder, request.dtype, backbone.family))
    return written, resized


def _facts(cfg: Config) -> dict[str, str]:
    """What kohya's header says about a training, as far as this one has it."""
    steps, whole = str(cfg.trainer.get("max_steps", "")), total_batch(cfg)
    facts = {
        "ss_learning_rate": str(cfg.optimizer.learning_rate),
        "ss_seed": str(cfg.seed),
        "ss_max_train_steps": steps,
        "ss_batch_size_per_device": str(cfg.data.batch_size),
        "ss_min_snr_gamma": str(cfg.objective.min_snr_gamma),
        "modelspec.license": cfg.export.license,
    }
    if not stops_early(cfg):
        facts["ss_steps"] = steps
    if whole is not None:
        facts["ss_total_batch_size"] = str(whole)
    return facts
