"""What follows the last step of a training, on the process that exports: judging the module, and writing adapter/."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from lora_dae.adapter.files import save_adapter, save_merged
from lora_dae.adapter.other import save_other
from lora_dae.adapter.source_input import save_framing, save_source_input
from lora_dae.adapter.words import save_words
from lora_dae.config import Config, SamplingConfig
from lora_dae.data.sources import framing_of
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.export.command import export_beside
from lora_dae.sampling.load import ENHANCEMENT_FILE
from lora_dae.sampling.schedulers import build_scheduler, check_schedule, check_timesteps
from lora_dae.training.agreement import LEAST, MOST, MOST_LIVE, Agreed, Pairs, learn_agreement
from lora_dae.training.calibrate import PAIRS, calibrate_finest, calibrate_gain
from lora_dae.training.stages import Training

console = Console()
ALONE = 3.0  # guidance from captions alone, the best at strength 0: experiments/tuning


def export_enhancement(trained: Training) -> None:
    """Write the enhancement into adapter/, once it is judged."""
    if trained.enhancement is not None:
        calibrate(trained, trained.enhancement)
        save_enhancement(trained.enhancement, trained.run_dir / "adapter" / ENHANCEMENT_FILE)


def calibrate(trained: Training, module: EnhancementModule) -> None:
    """Learn when to trust a source; give gain and finest band what validation pairs ask for; say all three."""
    cfg, val = trained.cfg, trained.splits["val"]
    trained.module.to(trained.device)  # Lightning leaves it on the CPU
    if module.texture is not None and cfg.enhancement.agreement:
        agreed = _agree(trained, module)
        module.agreement = None if agreed.agreement is None else agreed.agreement.to(trained.device)
        console.print(str(agreed), highlight=False, soft_wrap=True)
    if module.gain is None and module.decoder is None:
        return
    if len(val) < 4:
        console.print("gain and finest band stay as they are: 4 validation pairs are needed to judge", highlight=False)
        return
    held_out = HeldOut.take(val, PAIRS, cfg.conditioning)
    drawer = replace(trained.drawer(), enhancement=module, placement=cfg.enhancement.placement)
    drawers = (replace(drawer, cfg=judging(cfg, "dpm++")), replace(drawer, cfg=judging(cfg, "ddim")))
    prompts = trained.prompts(held_out)
    if module.gain is not None:
        console.print(str(calibrate_gain(drawers, held_out, prompts)), highlight=False, soft_wrap=True)
    if module.decoder is not None:  # where other photos' garments come to lie, no source says
        found = calibrate_finest(drawers, held_out, prompts, placed=cfg.data.name == "studio")
        console.print(str(found), highlight=False, soft_wrap=True)


def judging(cfg: Config, scheduler: str) -> SamplingConfig:
    """How validation pairs are drawn to judge gain and finest band, by DDIM alone where the direction term is edited.

    Not with the run's own sampling: trainings are kept by what they depend on, and that is not among it.
    """
    if cfg.enhancement.placement == "direction":
        scheduler = "ddim"
    own = cfg.sampling
    sampling = SamplingConfig(scheduler, batch_size=own.batch_size, tiled_decode=own.tiled_decode)
    if cfg.enhancement.judged_steps:
        sampling.num_inference_steps = cfg.enhancement.judged_steps
    if cfg.enhancement.judged_guidance:
        sampling.guidance_scale, sampling.source_guidance_scale = cfg.enhancement.judged_guidance
    elif cfg.conditioning == "none":
        sampling.guidance_scale = ALONE
    return sampling


def check_chains(cfg: Config, base: Any) -> None:
    """Raises ConfigError where pictures, or chains that the enhancement learns on, have no such steps on ``base``."""
    drawn, e = cfg.sampling, cfg.enhancement
    check_schedule(drawn.scheduler, drawn.num_inference_steps, base, "sampling.num_inference_steps")
    if not e.enabled or e.placement == "none":
        return
    if e.gain or e.decoder:
        for solver in ("dpm++", "ddim"):
            judged = judging(cfg, solver)
            check_schedule(judged.scheduler, judged.num_inference_steps, base, "enhancement.judged_steps")
    if e.gain:
        chain = build_scheduler("ddim", base)
        for steps in range(e.steps_range[0], e.steps_range[1] + 1):
            chain.set_timesteps(steps)
            check_timesteps(chain, steps, f"enhancement.steps_range={list(e.steps_range)}")


def _agree(trained: Training, module: EnhancementModule) -> Agreed:
    for name in ("train", "val"):
        if len(trained.splits[name]) < LEAST:
            return Agreed(None, math.nan, math.nan, f"the {name} split has fewer than {LEAST} pairs")
    trained.data.setup()
    most = MOST_LIVE if trained.cfg.data.cache == "off" else MOST
    tokens = int(trained.backbone.tokenizer.model_max_length)
    right, judged = (
        Pairs.of(pairs, tokens) for pairs in (_encoded(trained, "train", most), _drawn(trained, most // 5))
    )
    return learn_agreement(right, judged, module.source_channels, tokens, trained.cfg.seed)


@torch.no_grad()
def _encoded(trained: Training, name: str, most: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches of a split as training sees them, and the empty caption's embedding."""
    for batch in trained.data.some(name, most):
        yield trained.module.with_text({key: value.to(trained.device) for key, value in batch.items()})


@torch.no_grad()
def _drawn(trained: Training, most: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """The same of validation pairs in the frame that they are drawn with: a square, where training has buckets, too."""
    val = trained.splits["val"]
    if not trained.cfg.data.buckets:
        yield from _encoded(trained, "val", most)
        return
    numbers, size = range(0, len(val), -(-len(val) // most)), trained.data.batch_size
    for k in range(0, len(numbers), size):
        pairs = [val[number] for number in numbers[k : k + size]]
        sources = np.stack([pair.source for pair in pairs if pair.source is not None])
        batch = {
            "source": trained.backbone.encode_images(sources)[0],
            "text": trained.data.encode_text([pair.caption for pair in pairs]),
        }
        yield trained.module.with_text({key: value.to(trained.device) for key, value in batch.items()})


def export(trained: Training) -> None:
    """Write adapter/: the averaged weights in the formats that other programs read, all but the enhancement."""
    cfg, backbone, unet = trained.cfg, trained.backbone, trained.backbone.unet
    folder = trained.run_dir / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENHANCEMENT_FILE).unlink(missing_ok=True)  # of an earlier LoRA, where a finished run trained on
    if cfg.adapter.full_finetune:
        save_merged(unet, folder / "unet")
        if cfg.conditioning == "source":
            save_framing(framing_of(trained.splits["train"]), folder)
    else:
        origin = {"backbone": cfg.backbone.name, "fingerprint": backbone.fingerprint}
        if trained.words is not None:
            save_words(trained.words, folder)
        elif cfg.adapter.kind == "lora":
            save_adapter(unet, folder, origin, backbone.text_encoders)
        else:
            save_other(unet, folder, cfg.adapter, origin)
        if cfg.conditioning == "source":
            save_source_input(unet, folder, framing_of(trained.splits["train"]).header())
    export_beside(trained.run_dir, cfg, backbone.folder.family, backbone.folder.unet_config, backbone.prediction_type)
