"""What comparisons cost on 2 CPU cores, by arithmetic.

Seconds from cells of experiments/mainstream on the embedded backbone, 128 pixels, two processes of one thread at once
(``-j 2``): 5,600 photos trained in 325 to 372 s, 342 pictures of 24 calls drawn and measured in 242 s, beside another
process that did the like. The decoder stage and the gain's chains are from a run of experiment=rank16 alone.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace

from lora_dae.config import Config, SamplingConfig
from lora_dae.evaluation.references import CEILING
from lora_dae.evaluation.run import FROZEN
from lora_dae.sweep.cells import Wanted, distinct
from lora_dae.sweep.table import network_calls
from lora_dae.training.calibrate import PAIRS, SHARES

TRAINING_IMAGE, NETWORK_CALL = 0.032, 0.0115
DECODED_IMAGE = 0.11  # of the decoder stage's training
MEASURED_IMAGE = 0.05
LOADING = 20.0  # for each training: libraries, backbone, latents
CHAIN_CALLS = 2.5  # mean calls per step and image while the gain trains


@dataclass(frozen=True)
class Budget:
    """``cells`` are measurements, ``trainings`` adapters and modules; hours."""

    cells: int
    trainings: int
    training: float
    measuring: float

    @property
    def hours(self) -> float:
        return self.training + self.measuring


def budget(found: Iterable[Wanted], known: Container[str] = ()) -> Budget:
    """Of all cells whose digest is not ``known``: each once, each training once, each adapter once."""
    cells = [one for one in distinct(found) if one.digest not in known]
    adapters = {one.adapter: one.cfg for one in cells if one.adapter is not None}
    modules = {one.training: one.cfg for one in cells if one.training != one.adapter or one.cfg.enhancement.joint}
    training = sum(LOADING + adapter_seconds(cfg) for cfg in adapters.values())
    training += sum(LOADING + module_seconds(cfg) for cfg in modules.values())
    measuring = sum(cell_seconds(one) for one in cells)
    return Budget(len(cells), len(adapters) + len(modules), training / 3600, measuring / 3600)


def adapter_seconds(cfg: Config) -> float:
    """Training the adapter; twice with pictures of the frozen backbone beside each photo, which are drawn first."""
    steps = int(cfg.trainer["max_steps"]) * int(cfg.trainer.get("accumulate_grad_batches", 1))
    images = steps * cfg.data.batch_size
    if cfg.objective.prior_weight == 0:
        return images * TRAINING_IMAGE
    return 2 * images * TRAINING_IMAGE + cfg.objective.prior_images * network_calls(cfg) * NETWORK_CALL


def module_seconds(cfg: Config) -> float:
    """Training the enhancement's parts, and judging gain and decoder stage."""
    e = cfg.enhancement
    seconds = 0.0
    if e.texture and cfg.conditioning == "source" and not e.joint:
        seconds += e.texture_steps * e.texture_batch_size * NETWORK_CALL
    if e.decoder:
        seconds += e.decoder_steps * e.batch_size * DECODED_IMAGE
    if e.gain:
        low, high = e.steps_range[0], e.steps_range[1] + 1  # drawn evenly on a logarithmic scale
        chain = (high - low) / math.log(high / low) * CHAIN_CALLS * e.batch_size
        seconds += e.max_steps * chain * NETWORK_CALL
    judged, steps = len(SHARES) * e.gain + e.decoder, e.judged_steps or SamplingConfig().num_inference_steps
    return seconds + judged * PAIRS * 2 * steps * NETWORK_CALL


def drawn_calls(one: Wanted) -> float:
    """Network calls for a picture of the cell; the frozen backbone sees no source photo."""
    if one.cell.row == FROZEN:
        return network_calls(replace(one.cfg, conditioning="none"))
    return network_calls(one.cfg) if one.cell.row is None else 0.0


def cell_seconds(one: Wanted) -> float:
    """Drawing and measuring one cell."""
    calls = drawn_calls(one)
    extra = 1.0 if one.cell.row == CEILING else 0.0  # encoding and decoding
    return one.cfg.evaluation.num_samples * ((calls + extra) * NETWORK_CALL + MEASURED_IMAGE)
