"""How much of the gain is kept: known deficits, none, and what keeping a share means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from lora_dae.cli import typed
from lora_dae.config import Config, ConfigError, SamplingConfig, conf_dir, register
from lora_dae.data.pair import Pair
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.module import PIXEL_GAIN, EnhancementModule
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.rules import check
from lora_dae.training.calibrate import (
    calibrate_finest,
    calibrate_gain,
    finest_energy,
    keep_share,
    louder_by,
    with_share,
)
from lora_dae.training.finish import judging

CAP = math.log(1.5)


def test_it_is_judged_at_the_guidance_that_it_will_be_drawn_with() -> None:
    """The shipped experiments on SD name that of their own sampling; one sample alone cannot swap sources."""

    def composed(*words: str) -> Config:
        register()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return typed(compose("train", [*words, "run_dir=x", "data.root=x"]))

    for name in ("sd15_rank16", "sd15_rank16_paired", "sd21_rank16", "sdxl_rank16"):
        cfg = composed(f"experiment={name}")
        assert judging(cfg, "dpm++").scheduler == "dpm++"
        assert judging(replace(cfg, sampling=replace(cfg.sampling, tiled_decode=True)), "dpm++").tiled_decode
        found = judging(cfg, "ddim")
        assert found.scheduler == "ddim" and not found.tiled_decode
        assert found.num_inference_steps == cfg.sampling.num_inference_steps
        assert found.guidance_scale == cfg.sampling.guidance_scale
        assert found.source_guidance_scale == cfg.sampling.source_guidance_scale
        check(composed(f"experiment={name}", "conditioning=source"))
        assert cfg.enhancement.texture_batch_size <= cfg.data.batch_size  # what fits into memory for the adapter
    assert judging(Config(conditioning="source"), "ddim").guidance_scale == SamplingConfig.guidance_scale
    assert judging(Config(conditioning="none"), "ddim").guidance_scale == 3.0
    alone = ("experiment=sd15_rank16", "conditioning=source", "enhancement.batch_size=1")
    with pytest.raises(ConfigError, match="no second one"):
        check(composed(*alone))
    check(composed(*alone, "enhancement.wrong_source=0"))
    with pytest.raises(ConfigError, match="no second one"):
        check(composed("experiment=sd15_rank16", "conditioning=source", "enhancement.joint=true", "data.batch_size=1"))
    check(composed(*alone, "trainer=ddp", "trainer.devices=2"))
    with pytest.raises(ConfigError, match="two scales"):
        check(composed("experiment=sd15_rank16", "enhancement.judged_guidance=[3]"))


def module(**parts: int | bool) -> EnhancementModule:
    """A module that multiplies every band by 1.5 at low noise."""
    made = EnhancementModule(max_log_gain=CAP, **parts)  # type: ignore[arg-type]
    assert made.gain is not None
    nn.init.constant_(made.gain.output.bias, 10.0)
    return made


def pairs(count: int, sources: bool = False) -> HeldOut:
    image = np.zeros((8, 8, 3), np.uint8)
    source = image if sources else None
    return HeldOut([Pair(str(i), str(i), "a shirt", image, source) for i in range(count)])


REAL = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@dataclass
class Chain:
    """A sampler in closed form: the real latents, ``deficit`` times too weak, made louder by the module's cap.

    ``deaf``: a solver with which the gain does nothing; ``astray``: how far aside everything is drawn.
    """

    enhancement: EnhancementModule | None
    deficit: float
    deaf: bool = False
    astray: int = 0
    placement: str = "prediction"
    cfg: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(batch_size=3)
    )  # 8 pairs: the last batch is short

    @property
    def backbone(self) -> SimpleNamespace:
        return SimpleNamespace(encode_images=lambda images: (REAL[: len(images)], None), unet=nn.Identity())

    def latents(self, captions: list[str], sources: Any, strength: float, indices: list[int]) -> Tensor:
        assert self.enhancement is not None
        gain = 0.0 if self.deaf or self.enhancement.gain is None else self.enhancement.gain.max_log_gain
        return REAL[indices].roll(self.astray, -1) / self.deficit * math.exp(gain)


@dataclass
class Blurred:
    """Draws each real photo, the finest band of the even and odd ones times ``kept``."""

    enhancement: EnhancementModule
    photos: HeldOut
    kept: tuple[float, float]

    def images(self, captions: list[str], sources: np.ndarray | None, strength: float, numbers: range) -> np.ndarray:
        shown = np.stack([self.photos.pairs[i].image for i in numbers])
        photos = torch.from_numpy(shown).permute(0, 3, 1, 2) / 255
        finest = split_bands(photos, 1)[0][0]
        kept = torch.tensor([self.kept[i % 2] for i in numbers]).view(-1, 1, 1, 1)
        shown = None if sources is None else torch.from_numpy(sources).permute(0, 3, 1, 2) / 255
        drawn = self.enhancement.refine(photos - (1 - kept) * finest, shown, strength)
        return (drawn.permute(0, 2, 3, 1) * 255).round().byte().numpy()


@pytest.mark.parametrize(
    ("kept", "expected"), [((0.8, 0.8), 1.25), ((1.1, 1.1), 1 / 1.1), ((0.8, 1.2), 1.0), ((0.1, 0.1), 1.5)]
)
def test_the_finest_band_gets_what_it_lacks(kept: tuple[float, float], expected: float) -> None:
    """What both halves lack, within the cap; nothing where they disagree. With it nothing is missing any more."""
    noise = np.random.default_rng(0).integers(80, 176, (8, 32, 32, 3), dtype=np.uint8)
    photos = HeldOut([Pair(id=str(i), group_id=str(i), caption="a shirt", image=x) for i, x in enumerate(noise)])
    drawer = Blurred(EnhancementModule(decoder=True), photos, kept)
    found = calibrate_finest((drawer, drawer), photos, ["a shirt"] * 8)  # type: ignore[arg-type]
    assert math.exp(drawer.enhancement.finest_log_gain) == pytest.approx(expected, rel=0.04)  # bands overlap
    if 1 < expected < 1.4:
        energies = [finest_energy(x, None).sum() for x in (noise, drawer.images([], None, 1.0, range(8)))]
        assert float(energies[1] / energies[0]) == pytest.approx(1, abs=0.05) and found.power < 0.72


def test_the_finest_band_is_judged_with_a_solver_of_each_kind() -> None:
    """One draws it too weak and the other too strong: nothing is changed."""
    noise = np.random.default_rng(0).integers(80, 176, (8, 32, 32, 3), dtype=np.uint8)
    photos = HeldOut([Pair(id=str(i), group_id=str(i), caption="a shirt", image=x) for i, x in enumerate(noise)])
    module = EnhancementModule(decoder=True)
    weak, strong = (Blurred(module, photos, (kept, kept)) for kept in (0.8, 1.2))
    calibrate_finest((weak, strong), photos, ["a shirt"] * 8)  # type: ignore[arg-type]
    assert module.finest_log_gain == 0
    calibrate_finest((weak, weak), photos, ["a shirt"] * 8)  # type: ignore[arg-type]
    assert module.finest_log_gain > 0.1


def test_the_cap_makes_up_for_places_whose_source_allows_less() -> None:
    """Drawn with .8 of the real amplitude; the left half's source has .9, the right half's all that could be asked:
    (2 - .9 ** 2) ** .5 / .8 there, where .8 ** -1 everywhere would do if all sources had enough."""
    noise = np.random.default_rng(0).integers(104, 152, (8, 64, 64, 3), dtype=np.uint8)
    share = np.where(np.arange(64) < 32, 0.9, 3.0)[None, None, :, None]
    source = ((noise.astype(np.float32) - 128) * share + 128).round().astype(np.uint8)
    masks = np.full((8, 64, 64), 255, np.uint8)
    photos = HeldOut([Pair(str(i), str(i), "a shirt", noise[i], source[i], masks[i]) for i in range(8)])
    drawer = Blurred(EnhancementModule(decoder=True), photos, (0.8, 0.8))
    calibrate_finest((drawer, drawer), photos, ["a shirt"] * 8)  # type: ignore[arg-type]
    assert math.exp(drawer.enhancement.finest_log_gain) == pytest.approx((2 - 0.9**2) ** 0.5 / 0.8, rel=0.04)


def test_the_finest_band_is_judged_on_the_garments() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    masks = torch.zeros(4, 16, 16, dtype=torch.uint8)
    masks[:, :, 8:] = 255
    left, right = finest_energy(image, 255 - masks), finest_energy(image, masks)
    torch.testing.assert_close(left + right, finest_energy(image, None))
    assert (right.sum((1, 2)) > 0).all() and not right[:, :, :8].any()


def test_the_finest_band_gets_louder_where_the_source_has_more() -> None:
    """Garments to the real ones' power, all of it from where sources have more; no place gets above its source."""
    noise = np.random.default_rng(0).integers(80, 176, (8, 64, 64, 3), dtype=np.uint8)
    flat = (noise[:, :, 32:].astype(np.float32) - 128) * 0.7 + 128  # weaker in the right half: what is drawn of it is
    noise[:, :, 32:] = flat.astype(np.uint8)  # as weak as the source, which lacks it as well
    source = noise.copy()
    source[:, :, 32:] = ((flat - 128) * 0.8 + 128).astype(np.uint8)
    masks = np.full((8, 64, 64), 255, np.uint8)
    photos = HeldOut([Pair(str(i), str(i), "a shirt", noise[i], source[i], masks[i]) for i in range(8)])
    drawer = Blurred(EnhancementModule(decoder=True), photos, (0.8, 0.8))
    before = drawer.images([], source, 1.0, range(8))
    calibrate_finest((drawer, drawer), photos, ["a shirt"] * 8)  # type: ignore[arg-type]
    after = drawer.images([], source, 1.0, range(8))
    energies = [finest_energy(x, None) for x in (before, after, noise, source)]
    left, right = ([float(e[:, 8:-8, part].sum()) for e in energies] for part in (slice(8, 24), slice(40, 56)))
    assert left[1] / left[2] == pytest.approx(1, abs=0.06) and left[0] / left[2] < 0.72
    assert right[1] / right[0] == pytest.approx(1, abs=0.03)


def test_a_cap_that_brings_what_is_wanted() -> None:
    """In closed form: a fifth of the energy has no room, the rest any; ends are kept where nothing would do."""
    energy, room = torch.ones(10), torch.tensor([0.0] * 2 + [math.inf] * 8)
    assert louder_by(energy, room, 2 + 8 * math.exp(0.2)) == pytest.approx(0.1)
    assert louder_by(energy, room, 10 * math.exp(-0.4)) == pytest.approx(-0.2)
    assert louder_by(energy, room, 100.0) == PIXEL_GAIN and louder_by(energy, room, 0.1) == -PIXEL_GAIN
    assert louder_by(energy, room, 0.0) == louder_by(0 * energy, room, 1.0) == 0


@pytest.mark.parametrize(("deficit", "kept"), [(1.5, 1.0), (1.5**0.5, 0.5), (1.0, 0.0), (0.8, 0.0)])
def test_what_is_missing_decides(deficit: float, kept: float) -> None:
    made = module(decoder=True)
    chain = Chain(made, deficit)
    found = calibrate_gain((chain, chain), pairs(8), ["a shirt"] * 8)  # type: ignore[arg-type]
    assert found.share == kept
    assert made.max_log_gain == pytest.approx(kept * CAP)
    assert (made.gain is None) == (kept == 0)


@pytest.mark.parametrize(("other", "kept"), [((1.0, True), 1.0), ((1.5, False), 1.0), ((1.0, False), 0.0)])
def test_a_gain_is_judged_with_a_solver_of_each_kind(other: tuple[float, bool], kept: float) -> None:
    """What one solver needs is kept where the other does not hear it, and not where it would be too loud with that."""
    made = module(decoder=True)
    found = calibrate_gain((Chain(made, *other), Chain(made, 1.5)), pairs(8), ["a shirt"] * 8)  # type: ignore[arg-type]
    assert found.share == kept


@pytest.mark.parametrize(
    ("astray", "texture", "kept", "untrue"), [(0, True, 1.0, 1.0), (5, True, 0.0, 1.0), (5, False, 1.0, 1.0)]
)
def test_beside_source_texture_a_gain_is_kept_only_where_it_is_true(
    astray: int, texture: bool, kept: float, untrue: float
) -> None:
    """What is drawn too weakly, but elsewhere than in the photo, comes farther from it the louder it gets."""
    made = module(decoder=True, source_channels=4 if texture else 0)
    chain = Chain(made, 1.5, astray=astray)
    found = calibrate_gain((chain, chain), pairs(8, sources=True), ["a shirt"] * 8)  # type: ignore[arg-type]
    assert (found.share, found.untrue) == (kept, untrue)
    assert ("away from their photos" in str(found)) == (kept < untrue)


def test_a_direction_term_keeps_its_gain() -> None:
    """Also where other parts would be left without it: the edit that drawing asks for needs one."""
    made, x = module(decoder=True), torch.randn(2, 4, 16, 16)
    keep_share(made, 0.0, needed=True)
    assert made.gain is not None and made.evaluate(x, x, x, 0.9, 0.4, 0.2, direction=True).delta.abs().max() == 0


def test_half_of_the_gain_halves_the_log_gain_everywhere() -> None:
    made, x = module(), torch.randn(2, 4, 16, 16)
    nn.init.normal_(made.gain.output.weight)  # type: ignore[union-attr]
    arguments = (x, x, x, 0.9, 0.4, 0.2)
    whole, half = (m.evaluate(*arguments).log_gain for m in (made, with_share(made, 0.5)))
    assert whole is not None and half is not None
    torch.testing.assert_close(half, whole / 2)


def test_a_module_of_gain_alone_becomes_the_identity() -> None:
    made, x = module(), torch.randn(2, 4, 16, 16)
    keep_share(made, 0.0)
    assert made.evaluate(x, x, x, 0.9, 0.4, 0.2).delta.abs().max() == 0
