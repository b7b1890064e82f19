"""The table at the start of a run: what trains, how large it is, what share of the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import nn

from lora_dae.adapter.inject import ADAPTER_NAME, adapted_layer, trainable_parameters
from lora_dae.adapter.source_input import get_source_input
from lora_dae.adapter.targets import group_layers
from lora_dae.config import UNET_GROUPS


@dataclass(frozen=True)
class TrainableRow:
    """One line: modules that train together. ``share`` is parameters / parameters of the plain UNet, 0..1."""

    name: str
    modules: int
    ranks: tuple[int, ...]
    parameters: int
    share: float


def adapter_rows(unet: UNet2DConditionModel, extra: Mapping[str, nn.Module]) -> list[TrainableRow]:
    """Rows for the UNet's groups (``unet`` when all of it trains), ``source_input`` and each of ``extra``.

    Only what has requires_grad is counted, so the rows state what really trains.
    """
    source_input = get_source_input(unet)
    ours = set() if source_input is None else {id(p) for p in source_input.parameters()}
    backbone = sum(p.numel() for n, p in unet.named_parameters() if adapted_layer(n) is None and id(p) not in ours)

    def row(name: str, parameters: Mapping[str, nn.Parameter], ranks: set[int]) -> TrainableRow:
        count = sum(p.numel() for p in parameters.values())
        modules = {adapted_layer(key) or key.rpartition(".")[0] for key in parameters}
        return TrainableRow(name, len(modules), tuple(sorted(ranks)), count, count / backbone)

    group_of = dict(group_layers(unet))
    members: dict[str, dict[str, nn.Parameter]] = {}
    ranks: dict[str, set[int]] = {}
    for name, parameter in trainable_parameters(unet).items():
        layer_name = adapted_layer(name)
        if id(parameter) in ours:
            group = "source_input"
        elif layer_name is not None:
            group = group_of[layer_name]
            layer: Any = unet.get_submodule(layer_name)
            ranks.setdefault(group, set()).add(layer.r[ADAPTER_NAME])
        else:
            group = "unet"
        members.setdefault(group, {})[name] = parameter

    order = [*UNET_GROUPS, "unet", "source_input"]
    rows = [row(group, members[group], ranks.get(group, set())) for group in order if group in members]
    for name, module in extra.items():
        layers = [m for m in module.modules() if isinstance(m, LoraLayer) and ADAPTER_NAME in m.r]
        rows.append(row(name, trainable_parameters(module), {layer.r[ADAPTER_NAME] for layer in layers}))
    return rows


def adapter_table(unet: UNet2DConditionModel, extra: Mapping[str, nn.Module]) -> str:
    """adapter_rows as text, with a last line of totals."""
    rows = adapter_rows(unet, extra)
    table = Table(title="What trains")
    table.add_column("group")
    for column in ("modules", "rank", "parameters", "of the backbone"):
        table.add_column(column, justify="right")
    for row in rows:
        rank = "/".join(str(r) for r in row.ranks) or "-"
        table.add_row(row.name, str(row.modules), rank, f"{row.parameters:,}", f"{row.share:.2%}")
    table.add_section()
    table.add_row(
        "total",
        str(sum(row.modules for row in rows)),
        "",
        f"{sum(row.parameters for row in rows):,}",
        f"{sum(row.share for row in rows):.2%}",
    )
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
