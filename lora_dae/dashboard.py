"""``python -m lora_dae.dashboard``: a W&B workspace for this project's runs, through wandb-workspaces."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lora_dae.config import ConfigError, TrackingConfig
from lora_dae.training.tracking import STEP, wandb_mode

# Texture is measured inside the garment where photos have masks, else on whole pictures.
QUALITY = (
    "test/fd_effnet", "test/kd_effnet", "test/lsd_garment", "test/power_high_garment", "test/attr_pattern",
    "test/ssim_garment", "test/lsd", "test/power_high",
)  # fmt: skip


def workspace(entity: str, project: str, name: str) -> Any:
    """The workspace, not yet saved: training curves, samples, quality, and what quality depends on.

    Raises ConfigError without wandb-workspaces.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError("the dashboard needs wandb-workspaces: pip install 'lora-dae[dashboard]'.") from error
    module: list[Any] = ["enhancement/power_gap", "enhancement/distribution"]
    rank, strength = panels.Config("adapter.rank"), panels.Config("enhancement.strength")
    training = [
        panels.LinePlot(title="Loss of the adapter", x=STEP, y=["train/loss"], smoothing_factor=0.8, log_y=True),
        panels.LinePlot(title="Validation loss (fixed noise)", x=STEP, y=["val/loss"]),
        panels.LinePlot(title="Loss of the enhancement", x=STEP, y=module),
        panels.LinePlot(title="Images per second", x=STEP, y=["images/s"]),
    ]
    samples = [panels.MediaBrowser(title="Samples", media_keys=["test/grid", "val/samples"], num_columns=1)]
    quality: list[Any] = [panels.BarPlot(title=metric, metrics=[metric]) for metric in QUALITY]
    depends: list[Any] = [
        panels.ScatterPlot(title="Distance over rank", x=rank, y=panels.SummaryMetric(QUALITY[0])),
        panels.ScatterPlot(title="Texture gap over strength", x=strength, y=panels.SummaryMetric("test/lsd_garment")),
        panels.ParallelCoordinatesPlot(
            columns=[
                panels.ParallelCoordinatesPlotColumn(metric=metric)  # type: ignore[arg-type]
                for metric in (rank, strength, *map(panels.SummaryMetric, QUALITY[:3]))
            ]
        ),
        panels.ParameterImportancePlot(with_respect_to=QUALITY[0]),
    ]
    sections = {"Samples": samples, "Quality": quality, "Training": training, "What it depends on": depends}
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[ws.Section(name=title, panels=shown, is_open=True) for title, shown in sections.items()],
    )


def main() -> None:
    """Save the workspace and print its address; one sentence and exit code 2 where W&B cannot be reached."""
    parser = argparse.ArgumentParser(prog="python -m lora_dae.dashboard", description=__doc__)
    parser.add_argument("--entity", required=True, help="your W&B user or team")
    parser.add_argument("--project", default=TrackingConfig().project)
    parser.add_argument("--name", default="LoRA-DAE")
    given = parser.parse_args()
    import wandb

    try:
        if wandb_mode("auto") != "online":
            raise ConfigError("the dashboard lives on the W&B server: log in first (wandb login, or WANDB_API_KEY).")
        made = workspace(given.entity, given.project, given.name)
        try:
            made.save()
        except (wandb.errors.Error, OSError) as error:  # the network's are OSErrors
            said = str(error).splitlines()[:1] or [type(error).__name__]
            raise ConfigError(f"W&B does not take a workspace of --entity {given.entity}: {said[0]}.") from error
        print(made.url)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
