"""What the preview page shows, without the page: a run in memory, its examples, and drawings at two strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lora_dae.adapter.source_input import load_framing
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import best_device, draws_in_bf16
from lora_dae.config import Config, ConfigError
from lora_dae.data.catalog import say_once
from lora_dae.data.pair import Pair, PairDataset
from lora_dae.data.sources import load_split
from lora_dae.data.square import Framing
from lora_dae.rules import check
from lora_dae.sampling.finished import finished_config
from lora_dae.sampling.load import LoadedRun, load_run, prepare_unet

MAX_STEPS, MAX_STRENGTH, MAX_PROMPT = 100, 2.0, 1000


def newest_run(folder: Path) -> Path | None:
    """The run in ``folder`` that finished last, or None."""
    exported = [file.parent for file in folder.glob("*/config.yaml") if (file.parent / "adapter").is_dir()]
    for run in sorted(exported, key=lambda run: (run / "adapter").stat().st_mtime, reverse=True):
        try:
            finished_config(run)
        except ConfigError:  # it stopped before its enhancement was written, or is of another version
            continue
        return run
    return None


def told(strength: float, seed: int) -> str:
    """How a drawing is made again, with every digit of its seed."""
    return f"Strength {strength:g}, seed {seed}"


class Preview:
    """One run, loaded once. Calls are not safe to overlap: the page lets one through at a time."""

    def __init__(self, run: LoadedRun, title: str, examples: PairDataset | Sequence[Pair]) -> None:
        self.run, self.title, self.examples = run, title, examples
        self.bf16 = draws_in_bf16(run.cfg, run.backbone.device)
        self.framing = load_framing(run.directory / "adapter") if self.has_source else Framing()

    @classmethod
    def load(cls, run_dir: Path | None, cache_dir: str = "cache", vae: str | None = None) -> Preview:
        """A finished run, or (None) the shipped backbone alone; ``vae`` as in load_run.

        Raises ConfigError for a folder that is no run.
        """
        if run_dir is not None:
            run = load_run(run_dir, best_device(), vae=vae)
            return cls(run, str(run_dir), _examples(run.cfg))
        cfg = Config(run_dir="", conditioning="none")
        cfg = replace(
            cfg,
            backbone=replace(cfg.backbone, vae_path=vae),
            data=replace(cfg.data, cache_dir=cache_dir, test_size=16),
            enhancement=replace(cfg.enhancement, enabled=False),
        )
        backbone = load_backbone(cfg.backbone, best_device())
        prepare_unet(backbone, cfg)
        run = LoadedRun(Path(), cfg, backbone, None)
        return cls(run, "the frozen backbone (no run given)", _examples(cfg))

    @property
    def has_strength(self) -> bool:
        """Whether there is an enhancement to set the strength of."""
        return self.run.enhancement is not None and self.run.cfg.enhancement.placement != "none"

    @property
    def has_source(self) -> bool:
        """Whether a source photo steers what is drawn."""
        return self.run.cfg.conditioning == "source"

    def example(self, number: int) -> Pair:
        """A held-out pair; there are none where ``examples`` is empty."""
        return self.examples[int(number) % len(self.examples)]

    def draw(
        self,
        prompt: str,
        source: np.ndarray | None,
        seed: int | None,
        steps: int,
        guidance: float,
        source_guidance: float,
        strength: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(at strength 0, at ``strength``), uint8 (H, W, 3), from the same noise; ``source``: uint8 RGB of any size.

        Raises ConfigError for values outside of what the page offers, or what ``sample.py`` refuses.
        """
        if not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise ConfigError(f"write a caption, of at most {MAX_PROMPT} letters.")
        if not 1 <= steps <= MAX_STEPS or not 0 <= strength <= MAX_STRENGTH:
            raise ConfigError(f"steps go from 1 to {MAX_STEPS}, the strength from 0 to {MAX_STRENGTH:g}.")
        if seed is None:
            raise ConfigError("give a seed: the same one draws from the same noise again.")
        numbers = replace(
            self.run.cfg.sampling,
            seed=seed,
            num_inference_steps=int(steps),
            guidance_scale=float(guidance),
            source_guidance_scale=float(source_guidance),
        )
        check(replace(self.run.cfg, sampling=numbers), trains=False)
        drawer = self.run.drawer(self.bf16)
        drawer.cfg = numbers
        sources = None
        if source is not None and self.has_source:
            sources = self.framing.fit(Image.fromarray(source), self.run.cfg.data.resolution)[None]
        plain = drawer.images([prompt], sources, 0.0)[0]
        if not self.has_strength or strength == 0:
            return plain, plain
        return plain, drawer.images([prompt], sources, float(strength))[0]


def _examples(cfg: Config) -> PairDataset | Sequence[Pair]:
    """The test split; none, which is said, where it is empty or its photos are gone: prompts can still be written."""
    try:
        examples = load_split(cfg.data, "test")
    except ConfigError as error:
        say_once(f"no held-out examples are shown: {error}")
        return ()
    if len(examples) == 0:
        say_once("no held-out examples are shown: the test split is empty")
    return examples
