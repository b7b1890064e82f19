"""``python -m benchmarks.memory``: the memory that ``plan=true`` predicts for a step, against a real CPU step.

In a process of its own per measurement: the highest resident memory from before the model is built until after one step
of the optimizer, by the kernel's own mark (Linux). Beside it the same step counted on real tensors.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console

from benchmarks.timing import show
from lora_dae.cli import typed
from lora_dae.config import Config, conf_dir, register

console = Console()


def resident(which: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the most since ``reset``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {which} in /proc/self/status")


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def real_step(cfg: Config, counted: bool) -> dict[str, int]:
    """Bytes over the start of one step, as Training sets the model up; ``counted`` by PeakMemory instead."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor2_0

    from lora_dae.adapter.inject import inject, trainable_parameters
    from lora_dae.adapter.source_input import attach_source_input
    from lora_dae.backbone.load import WEIGHTS, load_backbone
    from lora_dae.training.memory import PeakMemory

    torch.nn.functional.conv2d(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 3, 3))  # libraries are loaded
    before = resident("VmRSS")
    backbone = load_backbone(cfg.backbone)
    beside = sum(p.numel() * p.element_size() for p in backbone.vae.parameters())
    beside += sum(p.numel() * p.element_size() for e in backbone.text_encoders.values() for p in e.parameters())
    unet = backbone.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert unet.dtype == WEIGHTS[cfg.backbone.weights]
    unet.set_attn_processor(AttnProcessor2_0())
    inject(unet, cfg.adapter)
    if cfg.conditioning == "source":
        attach_source_input(unet)
    parameters = list(trainable_parameters(unet).values())
    optimizer = torch.optim.AdamW(parameters)
    average = [p.detach().clone() for p in parameters]
    size = cfg.data.resolution // backbone.vae_scale_factor
    channels = backbone.latent_channels * (2 if cfg.conditioning == "source" else 1)
    x = torch.randn(cfg.data.batch_size, channels, size, size).contiguous(memory_format=torch.channels_last)
    text = torch.randn(len(x), backbone.text_length, unet.config["cross_attention_dim"])

    def step() -> None:
        loss = unet(x, torch.zeros(len(x)), encoder_hidden_states=text).sample.square().mean()
        loss.backward()
        optimizer.step()

    if counted:
        step()  # so that the optimizer's moments are there, as the plan has them
        optimizer.zero_grad()
        held = sum(p.numel() * p.element_size() for p in unet.parameters()) + 12 * sum(p.numel() for p in average)
        with PeakMemory() as memory:
            step()
        return {"bytes": held + memory.peak}
    reset()
    step()
    optimizer.zero_grad()
    first = resident("VmHWM") - before - beside
    step()
    return {"bytes": first, "second": resident("VmHWM") - before - beside}


def in_a_process(cfg: Config, counted: bool) -> dict[str, int]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(real_step, (cfg, counted))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as of train.py; default: the studio at batch 16")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks_memory.json"))
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("it reads Linux' /proc")
    from lora_dae.training.plan import make_plan

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        base = ["run_dir=build/none", "trainer.precision=32-true", "backbone.attention=sdpa"]
        cfg = typed(compose("train", [*base, *args.overrides]))
    plan = make_plan(cfg).step_peak
    counted, real = in_a_process(cfg, True)["bytes"], in_a_process(cfg, False)
    results: dict[str, Any] = {
        "planned, MB": plan / 1e6,
        "counted on real tensors, MB": counted / 1e6,
        "process, first step, MB": real["bytes"] / 1e6,
        "process, two steps, MB": real["second"] / 1e6,
        "planned / counted": plan / counted,
        "planned / process": plan / real["second"],
    }
    show(results, args.output)


if __name__ == "__main__":
    main()
