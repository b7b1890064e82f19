"""What the preview page shows, without the page: a run in memory, its examples, and drawings at two strengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lora_dae.adapter.source_input import load_framing
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import best_device, choose_precision
from lora_dae.config import Config, ConfigError
from lora_dae.data.pair import Pair, PairDataset
from lora_dae.data.sources import load_split
from lora_dae.data.square import Framing
from lora_dae.data.studio.dataset import StudioDataset
from lora_dae.sampling.draw import check_sampling
from lora_dae.sampling.load import LoadedRun, load_run, prepare_unet

MAX_STEPS, MAX_STRENGTH, MAX_PROMPT = 100, 2.0, 1000


def newest_run(folder: Path) -> Path | None:
    """The run in ``folder`` that finished last, or None."""
    finished = [file.parent for file in folder.glob("*/config.yaml") if (file.parent / "adapter").is_dir()]
    return max(finished, key=lambda run: (run / "adapter").stat().st_mtime, default=None)


class Preview:
    """One run, loaded once. Calls are not safe to overlap: the page lets one through at a time."""

    def __init__(self, run: LoadedRun, title: str, examples: PairDataset) -> None:
        self.run, self.title, self.examples = run, title, examples
        self.bf16 = choose_precision("auto", run.backbone.device) == "bf16-mixed"
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
        """A held-out pair."""
        return self.examples[int(number) % len(self.examples)]

    def draw(
        self,
        prompt: str,
        source: np.ndarray | None,
        seed: int,
        steps: int,
        guidance: float,
        source_guidance: float,
        strength: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(at strength 0, at ``strength``), uint8 (H, W, 3), from the same noise; ``source``: uint8 RGB of any size.

        Raises ConfigError for values outside of what the page offers.
        """
        if not prompt.strip() or len(prompt) > MAX_PROMPT:
            raise ConfigError(f"write a caption, of at most {MAX_PROMPT} letters.")
        if not 1 <= steps <= MAX_STEPS or not 0 <= strength <= MAX_STRENGTH:
            raise ConfigError(f"steps go from 1 to {MAX_STEPS}, the strength from 0 to {MAX_STRENGTH:g}.")
        numbers = replace(
            self.run.cfg.sampling,
            seed=int(seed),
            num_inference_steps=int(steps),
            guidance_scale=float(guidance),
            source_guidance_scale=float(source_guidance),
        )
        check_sampling(numbers)
        drawer = self.run.drawer(self.bf16)
        drawer.cfg = numbers
        sources = None
        if source is not None and self.has_source:
            sources = self.framing.fit(Image.fromarray(source), self.run.cfg.data.resolution)[None]
        plain = drawer.images([prompt], sources, 0.0)[0]
        if not self.has_strength or strength == 0:
            return plain, plain
        return plain, drawer.images([prompt], sources, float(strength))[0]


def _examples(cfg: Config) -> PairDataset:
    """The test split; of the studio that one alone, as rendering the others takes a while."""
    data = cfg.data
    if data.name != "studio":
        return load_split(data, "test")
    return StudioDataset(data.cache_dir, "target", "test", data.test_size, data.seed, data.resolution, data.difficulty)
