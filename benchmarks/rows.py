"""python -m benchmarks.rows experiments/enhancement: what a picture of a comparison's rows costs.

Each row draws the same few pairs in turn with the row that it is tested against, from captions to pixels; with parts
that are there and untrained, which cost what trained ones do. ``--match``: rows whose names contain it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.timing import console, timings
from lora_dae.adapter.inject import inject
from lora_dae.adapter.source_input import attach_source_input
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import choose_precision
from lora_dae.config import Config, ConfigError
from lora_dae.data.sources import load_splits
from lora_dae.enhancement.agreement import Agreement
from lora_dae.enhancement.module import EnhancementModule, build_enhancement
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.run import FROZEN
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.load import prepare_unet
from lora_dae.sweep.budget import drawn_calls
from lora_dae.sweep.cells import Comparison, Wanted, read_comparison, wanted_cells


def untrained(cfg: Config, bf16: bool, frozen: bool = False) -> Drawer:
    """What draws a run of ``cfg``, its parts as they are before the first step; the backbone alone where ``frozen``."""
    backbone = load_backbone(cfg.backbone)
    prepare_unet(backbone, cfg)
    layers = not cfg.adapter.full_finetune and cfg.adapter.kind != "textual_inversion"  # those add none
    if layers and not frozen:
        inject(backbone.unet, cfg.adapter)
    if cfg.conditioning == "source":
        attach_source_input(backbone.unet)
    backbone.unet.requires_grad_(False).eval()
    module = build_enhancement(cfg.enhancement, backbone.latent_channels, cfg.conditioning)
    if module is not None:
        complete(module, backbone.unet.config["cross_attention_dim"], int(backbone.tokenizer.model_max_length))
    return Drawer(
        backbone, module, cfg.enhancement.placement, cfg.conditioning, cfg.data.resolution, cfg.sampling, bf16
    )


def complete(module: EnhancementModule, text_channels: int, tokens: int) -> None:
    """Give ``module`` what is learned after its last step, in place."""
    module.requires_grad_(False)
    if module.texture is not None:
        module.agreement = Agreement(text_channels, module.source_channels, tokens).requires_grad_(False)
    if module.decoder is not None:
        module.finest_log_gain = 0.1


@cache
def bf16_chosen(precision: str) -> bool:
    """Measured once: rows of one precision are alike."""
    return choose_precision(precision, torch.device("cpu")).startswith("bf16")


def drawing(one: Wanted, pictures: int) -> Callable[[], np.ndarray]:
    """Draws the first ``pictures`` test pairs as the row says."""
    bf16 = bf16_chosen(str(one.cfg.trainer.get("precision", "auto")))
    cfg = replace(one.cfg, evaluation=replace(one.cfg.evaluation, num_samples=pictures))
    if one.cell.row == FROZEN:
        cfg = replace(cfg, conditioning="none")
    pairs, drawer = HeldOut.asked_for(load_splits(cfg.data), cfg), untrained(cfg, bf16, one.cell.row == FROZEN)
    return lambda: drawer.images(pairs.captions, pairs.shown, cfg.enhancement.strength, pairs.numbers)


def measure(grid: Comparison, match: str, pictures: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Row -> its network calls, and its time over that of the row it is tested against: median and spread."""
    bases = {cell.name: cell.against or grid.baseline for cell in grid.cells if cell.row in (None, FROZEN)}
    asked = {name for name in bases if match in name}
    if not any(bases[name] != name for name in asked):
        raise ConfigError(
            f"--match {match!r} names no row that is tested against another: use some of {', '.join(bases)}."
        )
    asked |= {bases[name] for name in asked}
    few = replace(grid, cells=tuple(cell for cell in grid.cells if cell.name in asked), seeds=grid.seeds[:1])
    first = {one.cell.name: one for one in wanted_cells(few)}  # composing takes longer than drawing
    found: dict[str, dict[str, Any]] = {}
    for base in dict.fromkeys(bases[name] for name in first):
        rows = {name: one for name, one in first.items() if match in name and bases[name] == base != name}
        if not rows:
            continue
        times = timings({n: drawing(o, pictures) for n, o in {base: first[base], **rows}.items()}, repeats)
        for name, one in rows.items():
            ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
            found[name] = {
                "against": base, "calls": drawn_calls(one), "calls_against": drawn_calls(first[base]),
                "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios),
                "seconds": statistics.median(times[name]) / pictures,
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--match", default="")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("build/rows.json"))
    args = parser.parse_args()
    try:
        found = measure(read_comparison(args.study), args.match, args.pictures, args.repeats)
    except ConfigError as error:
        parser.error(str(error))
    table = Table("row", "against", "calls", "s a picture", "of its time", "lowest", "highest")
    for name, row in found.items():
        table.add_row(
            name, row["against"], f"{row['calls']:g} / {row['calls_against']:g}", f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}", f"{row['low']:.3f}", f"{row['high']:.3f}",
        )  # fmt: skip
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
