"""``python -m benchmarks.memory``: the memory that ``plan=true`` predicts, against a real CPU step.

The step is taken as Training sets it up, in a process of its own per measurement: once with its tensors counted, and
once with the most resident memory of the whole process, by the kernel's own mark (Linux), after loading.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from benchmarks.timing import show
from lora_dae.cli import typed
from lora_dae.config import Config, conf_dir, register


def reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes: the most resident memory since ``reset``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def real_step(cfg: Config, counted: bool) -> int:
    """Bytes at the largest moment of two steps: of tensors (``counted``), or of the process."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor2_0

    import lora_dae.training.run  # noqa: F401  # a run's libraries
    from lora_dae.adapter.inject import inject, trainable_parameters
    from lora_dae.adapter.source_input import attach_source_input
    from lora_dae.backbone.allocator import keep_freed_memory
    from lora_dae.backbone.load import load_backbone
    from lora_dae.training.memory import PeakMemory

    keep_freed_memory()  # as the commands do
    backbone = load_backbone(cfg.backbone)
    unet = backbone.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.trainer["precision"] == "bf16-mixed"):
            loss = unet(x, torch.zeros(len(x)), encoder_hidden_states=text).sample.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if counted:
        step()  # so that the optimizer's moments are there, as the plan has them
        moments = [value for state in optimizer.state.values() for value in state.values()]
        with PeakMemory() as memory:
            memory.hold([*unet.parameters(), *average, *moments, x, text])
            step()
        return memory.peak
    reset()
    step()
    step()
    return peak()


def in_a_process(cfg: Config, counted: bool) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(real_step, (cfg, counted))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as of train.py; default: the studio at batch 16")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks_memory.json"))
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error("it reads Linux' /proc")
    import lora_dae.training.run  # noqa: F401  # as train.py has loaded it when it plans
    from lora_dae.training.plan import make_plan

    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        base = ["run_dir=build/none", "trainer.precision=32-true", "backbone.attention=sdpa"]
        given = {override.split("=")[0] for override in args.overrides}
        cfg = typed(compose("train", [*(b for b in base if b.split("=")[0] not in given), *args.overrides]))
    plan = make_plan(cfg)
    counted, real = in_a_process(cfg, True), in_a_process(cfg, False)
    planned = plan.libraries + plan.resting + plan.step_peak  # encoding is not measured here
    results: dict[str, Any] = {
        "libraries, MB": plan.libraries / 1e6,
        "tensors of a step, planned, MB": plan.step_peak / 1e6,
        "tensors of a step, counted, MB": counted / 1e6,
        "process, planned, MB": planned / 1e6,
        "process, measured, MB": real / 1e6,
        "planned / counted": plan.step_peak / counted,
        "planned / measured": planned / real,
    }
    show(results, args.output)


if __name__ == "__main__":
    main()
