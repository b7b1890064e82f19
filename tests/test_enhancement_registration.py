"""Sources that are not in place: found from afar, moved once in a chain, mixed in without losing energy."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose import config
from test_enhancement_hook import scheduler_for
from test_enhancement_texture import opened, smooth
from torch import Tensor
from torch.nn import functional

from lora_dae.config import ConfigError
from lora_dae.enhancement import EnhancementModule, enhance_scheduler, load_enhancement, save_enhancement
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.registration import Preview, RegisteredSource, agreeing, flow, move, register
from lora_dae.enhancement.texture import SourceTexture
from lora_dae.evaluation.diagnose import diagnose
from lora_dae.sampling.load import load_run
from lora_dae.training import run as training

MOTIONS = torch.tensor(
    [[0.08, 0.0, 0.0, 0.0], [-0.05, 0.04, 0.0, 0.0], [0.0, 0.0, 0.15, 0.15], [0.03, -0.03, -0.1, -0.1]]
)


def garments(background: Tensor, head: Tensor | None = None, motion: Tensor | None = None) -> Tensor:
    """Four pictures (4, 3, 64, 64) of a striped red garment, seen where ``motion`` takes it; a ``head`` above it."""
    motion = torch.zeros(4, 4) if motion is None else motion
    rows = torch.linspace(-0.5, 0.5, 64)[:, None].expand(64, 64)
    places = torch.stack([rows.T, rows])[None].expand(4, -1, -1, -1) + flow(motion, 64, 64) / 64
    x, y = places.unbind(1)
    inside = ((x.abs() < 0.18) & (y.abs() < 0.22)).unsqueeze(1)
    stripes = 0.6 + 0.3 * torch.sin(40 * y).unsqueeze(1)
    garment = torch.cat([stripes, 0.1 * torch.ones_like(stripes), 0.2 * torch.ones_like(stripes)], 1)
    picture = torch.where(inside, garment, background.view(1, 3, 1, 1))
    if head is not None:
        above = ((x.abs() < 0.08) & (y + 0.34).abs().lt(0.1)).unsqueeze(1)
        picture = torch.where(above, head.view(1, 3, 1, 1), picture)
    return picture


def test_a_garment_is_found_where_it_is_on_another_ground_and_under_a_head() -> None:
    source = garments(torch.tensor([1.0, 1.0, 1.0]))
    target = garments(torch.tensor([0.9, 0.7, 0.8]), torch.tensor([0.5, 0.35, 0.25]), MOTIONS)
    found = register(target, source)
    assert (found - MOTIONS)[:, :2].abs().max() < 0.02 and (found - MOTIONS)[:, 2:].abs().max() < 0.1
    moved = move(source, found)
    inside = garments(torch.zeros(3), None, MOTIONS).sum(1, keepdim=True) > 0
    errors = [float(((picture - target) * inside).square().sum()) for picture in (source, moved)]
    assert errors[1] < 0.25 * errors[0]
    agreed = agreeing(target, source, found)[0]
    assert agreed[inside].mean() > 0.5 > 0.2 > agreed[~inside].mean()


def test_what_is_in_place_or_shows_nothing_stays_where_it_is() -> None:
    source = garments(torch.tensor([1.0, 1.0, 1.0]))
    assert register(source, source).abs().max() < 0.01
    assert torch.equal(register(source, torch.full_like(source, 0.5)), torch.zeros(4, 4))
    assert torch.isfinite(register(torch.zeros_like(source), source)).all()
    torch.testing.assert_close(move(source, torch.zeros(4, 4)), source, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (160, 96), (24, 40)])
def test_pictures_of_any_size_are_registered(size: tuple[int, int]) -> None:
    pictures = functional.interpolate(garments(torch.ones(3), None, MOTIONS), size)
    assert register(pictures, functional.interpolate(garments(torch.ones(3)), size)).shape == (4, 4)
    assert agreeing(pictures, pictures, torch.zeros(4, 4))[0].shape == (4, 1, *size)


def test_a_flow_is_a_shift_and_scales_about_the_middle() -> None:
    moved = flow(torch.tensor([[0.25, 0.5, 0.0, 0.0], [0.0, 0.0, float(np.log(2)), 0.0]]), 5, 8)
    assert torch.equal(moved[0, 0], torch.full((5, 8), 2.0)) and torch.equal(moved[0, 1], torch.full((5, 8), 2.5))
    torch.testing.assert_close(moved[1, 0, 0], torch.arange(8.0) - 3.5)
    assert not moved[1, 1].any()


def test_a_preview_of_linear_latents_is_the_photo() -> None:
    """Of latents that are the pixels, mixed, the small picture is the photo, also of others than were fitted."""
    mix = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    photos = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = torch.einsum("lp,bphw->blhw", mix, functional.pixel_unshuffle(photos * 2 - 1, 2))
    preview = Preview(16)
    preview.fit((latents[k : k + 2], photos[k : k + 2]) for k in (0, 2, 4))
    torch.testing.assert_close(preview(latents[6:]), photos[6:] * 2 - 1, rtol=0, atol=0.02)


def blocks(photos: Tensor) -> Tensor:
    """An encoder: 4 x 4 pixels to a place, as they are; 48 channels of 16 x 16 places for 64 pixels."""
    return functional.pixel_unshuffle(photos * 2 - 1, 4)


@pytest.fixture(scope="module")
def preview() -> Preview:
    fitted = Preview(48)
    photos = torch.cat([garments(torch.rand(3), torch.rand(3), MOTIONS * k) for k in range(3)])
    fitted.fit([(blocks(photos), photos)])
    return fitted


def test_photos_are_moved_once_in_a_chain_and_again_in_the_next(preview: Preview) -> None:
    photos, encoded = garments(torch.ones(3))[:1], []

    def encode(moved: Tensor) -> Tensor:
        encoded.append(moved)
        return blocks(moved)

    source = RegisteredSource(preview, photos, blocks(photos), encode)
    x0 = blocks(garments(torch.tensor([0.9, 0.7, 0.8]), None, MOTIONS[:1].repeat(4, 1)))
    first = source.at(x0, 3.0)  # four images of one prompt
    assert first.shape == x0.shape and torch.equal(source.moved, encoded[0])
    assert (source.motion - MOTIONS[0])[:, :2].abs().max() < 0.03
    assert source.at(x0.flip(3), 1.0) is first and len(encoded) == 1
    source.at(x0.flip(3), 3.0)
    assert len(encoded) == 2 and not torch.equal(encoded[0], encoded[1])


def test_a_photo_is_trusted_where_the_picture_has_its_subject_in_no_other_colors(preview: Preview) -> None:
    """Not beside it, where another pose would leave the mannequin's arms."""
    photos, ground = garments(torch.ones(3)), torch.tensor([0.9, 0.7, 0.8])
    photos[:, :, 20:44, 50:56] = torch.tensor([0.6, 0.5, 0.4]).view(3, 1, 1)  # an arm
    drawn = garments(ground)
    source = RegisteredSource(preview, photos, blocks(photos), blocks)
    assert not source.trusted(None).any()  # nothing has been placed
    one = RegisteredSource(preview, photos[:1], blocks(photos[:1]), blocks)
    assert one.trusted(torch.ones(2)).shape == (2, 1, 16, 16) and one.trusted(torch.ones(1)).shape == (1, 1, 16, 16)
    source.at(blocks(drawn), 3.0)
    shown = source.trusted(None)
    assert shown.shape == (4, 1, 16, 16) and shown.max() <= 1
    assert shown[:, :, 6:10, 6:10].min() > 0.9 and shown[:, :, 5:11, 12:].max() < 0.2
    pale = torch.lerp(garments(torch.ones(3)), torch.ones(()), 0.7)
    another = RegisteredSource(preview, pale, blocks(pale), blocks)
    another.at(blocks(drawn), 3.0)
    assert another.trusted(None).max() < 0.1


def test_caption_and_fit_are_two_witnesses(preview: Preview) -> None:
    photos = garments(torch.ones(3))
    drawn = blocks(photos)
    same = RegisteredSource(preview, photos, drawn, blocks)
    small = photos.clone()  # the same color, most of the garment elsewhere
    small[:, :, :, 26:] = photos[:, :, :1, :1]
    small[:, :, 50:62, 4:60] = photos[:, :, 32:33, 32:33]
    other = RegisteredSource(preview, small, blocks(small), blocks)
    for source in (same, other):
        source.at(drawn, 3.0)
    assert torch.all(same.fit > other.fit + 0.1) and same.fit.max() <= 1

    def share(source: RegisteredSource, trust: float, count: int = 4) -> Tensor:
        return source.trusted(torch.full((count,), trust)).sum() / source.trusted(None).sum()

    assert share(same, 1.0) > 0.99 and share(same, 0.0) < 1e-4
    assert share(same, 0.98) > share(other, 0.98) + 0.1  # what a caption leaves open, the fit decides
    assert torch.equal(same.trusted(torch.full((1,), 0.9)), same.trusted(torch.full((4,), 0.9)))


@pytest.mark.parametrize("side", [16, 32])
def test_texture_stays_out_where_a_photo_is_not_trusted(side: int) -> None:
    x, source, texture = smooth(0), smooth(1), SourceTexture(4, registered=True)
    x, source = (functional.interpolate(latents, (32, 32)) for latents in (x, source))
    opened(texture)
    everywhere = texture(x, source).delta
    trust = torch.zeros(len(x), 1, side, side)
    trust[:, :, :, side // 2 :] = 1
    with torch.no_grad():
        half = texture(x, source, trust=trust).delta
    assert half[..., :8].abs().max() < 0.05 * everywhere.abs().max() < half[..., 24:].abs().max()


def test_a_scheduler_moves_the_photo_before_it_lets_it_in(preview: Preview) -> None:
    module = EnhancementModule(max_log_gain=0.0, source_channels=48, registered=True).requires_grad_(False)
    module.preview.weight.copy_(preview.weight)
    opened(module.texture)
    photos = garments(torch.ones(3))
    drawn = blocks(garments(torch.ones(3), None, MOTIONS))
    plain = scheduler_for("ddim")
    plain.set_timesteps(10)
    sample = drawn + 0.1 * torch.randn(drawn.shape, generator=torch.Generator().manual_seed(0))

    def step(source: Any, strength: float = 1.0) -> Tensor:
        return enhance_scheduler(plain, module, strength, source=source).step(torch.zeros_like(drawn), 300, sample)[0]

    registering = functools.partial(module.registering, photos, blocks(photos), blocks)
    assert torch.equal(step(registering(), 0.0), plain.step(torch.zeros_like(drawn), 300, sample)[0])
    assert not torch.equal(step(registering()), plain.step(torch.zeros_like(drawn), 300, sample)[0])
    with pytest.raises(ConfigError, match="module.registering"):
        step(blocks(photos))
    assert EnhancementModule(source_channels=48).registering(photos, blocks(photos), blocks) is None


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_half_open_gates_keep_the_energy_of_what_they_mix(share: float) -> None:
    """Two textures that do not belong to each other lose up to half of it in a plain mixture."""
    x, source = smooth(0), smooth(1)
    texture = SourceTexture(4, registered=True)
    with torch.no_grad():
        texture.output.bias[texture.levels :] = float(np.arctanh(share))
        edited = x + texture(x, source).delta
        own, given, made = (split_bands(latents, 3)[0].square().mean((1, 2, 3, 4)) for latents in (x, source, edited))
    expected, plain = (1 - share) * own + share * given, (1 - share) ** 2 * own + share**2 * given
    assert (made / expected - 1).abs().max() < 0.22 and (plain / expected).max() < 0.85


def test_the_file_keeps_a_registering_module(tmp_path: Path, preview: Preview) -> None:
    module = EnhancementModule(max_log_gain=0.0, source_channels=48, registered=True)
    module.preview.weight.copy_(preview.weight)
    again = load_enhancement(save_enhancement(module, tmp_path / "enhancement.safetensors"))
    assert torch.equal(again.preview.weight, preview.weight) and again.texture.matcher is None
    assert sum(value.numel() for value in again.state_dict().values()) < 60_000


def test_a_run_with_sources_elsewhere_trains_draws_and_is_diagnosed(tiny_backbone: Path, tmp_path: Path) -> None:
    cfg = config(
        tiny_backbone, tmp_path / "run", tmp_path / "cache", "enhancement=registered", "data.difficulty=shifted"
    )
    result = training.run(cfg)
    assert result.table is not None and "strength 1" in result.table.methods
    run = load_run(tmp_path / "run")
    assert run.enhancement is not None and run.enhancement.preview is not None
    assert run.enhancement.preview.weight.abs().sum() > 0
    torch.nn.init.normal_(run.enhancement.texture.output.weight)
    source = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    pictures = [run.drawer(bf16=False).images(["a red dress"] * 2, source, strength) for strength in (0.0, 1.0)]
    assert not np.array_equal(*pictures)
    from rich.console import Console

    assert (diagnose(tmp_path / "run", Console(), num_samples=3) / "matches.png").is_file()


@pytest.mark.parametrize("wrong", ["conditioning=none", "enhancement.texture=false", "enhancement.joint=true"])
def test_registration_needs_texture_of_its_own_stage(wrong: str, tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="enhancement.registered=true"):
        training.check(config(tiny_backbone, tmp_path / "run", tmp_path, "enhancement=registered", wrong))
