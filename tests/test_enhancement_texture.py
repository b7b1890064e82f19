"""Source texture: carried to its place, let in by gates, absent without a source or strength."""

from __future__ import annotations

import math

import pytest
import torch
from test_enhancement_hook import scheduler_for

from lora_dae.config import ConfigError, EnhancementConfig
from lora_dae.enhancement import EnhancementModule, enhance_scheduler, load_enhancement, save_enhancement
from lora_dae.enhancement.bands import split_bands
from lora_dae.enhancement.match import Matcher, warp
from lora_dae.enhancement.module import build_enhancement
from lora_dae.enhancement.texture import SourceTexture

LEVEL = (0.8, 0.6, 0.2)


def smooth(seed: int, size: int = 32, channels: int = 4) -> torch.Tensor:
    """Random latents with something at every scale."""
    noise = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(seed))
    bands, rest = split_bands(noise, 3)
    return bands[0] + 3 * bands[1] + 8 * bands[2] + 12 * rest


def opened(texture: SourceTexture, bias: float = 10.0) -> SourceTexture:
    """Every gate at 1, every gain at 0."""
    with torch.no_grad():
        texture.output.bias[texture.levels :] = bias
    return texture


def test_reading_along_a_whole_flow_is_a_shift():
    x = torch.arange(2 * 6 * 8.0).view(1, 2, 6, 8)
    flow = torch.zeros(1, 2, 6, 8)
    flow[:, 0], flow[:, 1] = 2, -1
    moved = warp(x, flow)
    torch.testing.assert_close(moved[:, :, 1:, :-2], x[:, :, :-1, 2:])
    torch.testing.assert_close(warp(x, torch.zeros_like(flow)), x)


def test_the_same_picture_is_matched_with_itself_and_an_empty_one_with_less_confidence():
    torch.manual_seed(0)
    matcher, x = Matcher(4), smooth(0)
    same = matcher(x, x)
    assert same.flow.abs().mean() < 0.3
    assert same.confidence.mean() > matcher(x, torch.zeros_like(x)).confidence.mean()
    assert same.flow.shape == (2, 2, 32, 32) and same.confidence.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("shift", [(3, 0), (0, -4), (5, 4)])
def test_a_shifted_picture_is_found_again(shift):
    torch.manual_seed(0)
    x = smooth(1)
    source = x.roll(shift, (3, 2))  # the source shows it ``shift`` (x, y) further
    flow = Matcher(4)(x, source).flow[:, :, 8:-8, 8:-8].detach()
    found = flow.flatten(2).median(-1).values
    assert (found - torch.tensor(shift)).abs().max() < 1.5


@pytest.mark.parametrize("size", [(7, 9), (4, 4), (32, 20)])
def test_any_size_can_be_matched(size):
    x = torch.randn(1, 4, *size)
    assert Matcher(4)(x, x).flow.shape == (1, 2, *size)


@pytest.mark.parametrize("piece", [1, 5_000, 20_000])
def test_matching_piece_by_piece_changes_nothing(piece, monkeypatch):
    """As large images are matched: scores of some places at once, windows in strips."""
    torch.manual_seed(0)
    matcher, x, source = Matcher(4), smooth(0), smooth(1)
    with torch.no_grad():
        whole = matcher(x, source)
        monkeypatch.setattr("lora_dae.enhancement.match._PIECE", piece)
        parts = matcher(x, source)
    torch.testing.assert_close(parts.flow, whole.flow, rtol=0, atol=1e-3)  # of a place
    torch.testing.assert_close(parts.confidence, whole.confidence, rtol=0, atol=1e-3)


def test_refining_picture_by_picture_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    module = EnhancementModule(source_channels=4, decoder=True, finest_log_gain=0.1).requires_grad_(False)
    torch.nn.init.normal_(module.decoder.output.weight)
    pictures, photos = (torch.cat([smooth(k, 32, 3) for k in ks]).sigmoid() for ks in ((5, 6), (7, 8)))
    trust = torch.tensor([0.0, 0.3, 0.7, 1.0])
    whole = [
        module.refine(pictures, photos, trust=trust),
        module.refine(pictures, None),
        module.lacking(pictures, photos),
    ]
    monkeypatch.setattr("lora_dae.enhancement.module._REFINED", 3 * 32 * 32)
    calls = []
    module.decoder.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    parts = [
        module.refine(pictures, photos, trust=trust),
        module.refine(pictures, None),
        module.lacking(pictures, photos),
    ]
    assert calls == [1] * 12 and parts[2].max() > 0.1
    torch.testing.assert_close(parts, whole)


def test_open_gates_replace_the_bands_by_the_sources_and_leave_the_coarse_rest():
    torch.manual_seed(0)
    texture, x = opened(SourceTexture(4)), smooth(2)
    blurred = split_bands(x, 1)[1]  # without its finest band, which the source still has
    edited = blurred + texture(blurred, x).delta
    assert (edited - x).square().mean() < 0.25 * (blurred - x).square().mean()
    rest = split_bands(blurred, 3)[1]
    assert (split_bands(edited, 3)[1] - rest).square().mean() < 1e-3 * rest.square().mean()


def test_a_new_module_is_the_identity_and_knows_no_texture_without_a_source():
    module = EnhancementModule(source_channels=4, decoder=True)
    x0, images = smooth(3), torch.rand(2, 3, 32, 32)
    assert torch.count_nonzero(module(x0, x0, x0, *LEVEL, source=smooth(4))) == 0
    assert torch.equal(module.refine(images, images.flip(2)), images)
    opened(module.texture)
    with_source = module.evaluate(x0, x0, x0, *LEVEL, source=smooth(4))
    without = module.evaluate(x0, x0, x0, *LEVEL)
    assert with_source.delta.abs().max() > 0.1 and with_source.match is not None
    assert torch.count_nonzero(without.delta) == 0 and without.match is None


def test_the_window_shuts_source_texture_at_high_noise_as_well():
    module, x0 = EnhancementModule(source_channels=4), smooth(3)
    opened(module.texture)
    assert torch.count_nonzero(module(x0, x0, x0, 0.1, 0.995, 0.2, source=smooth(4))) == 0


def test_gates_of_source_texture_see_the_whole_step():
    """Noise, step size, order of the solver, and what guidance has amplified: the gates are others for each."""
    torch.manual_seed(0)
    module = EnhancementModule(max_log_gain=0.0, source_channels=4)
    for parameter in module.texture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x0, source = smooth(3), smooth(4)

    def gates(cond=x0, alpha=0.8, sigma=0.6, h=0.2, first_order=1.0):
        return module.evaluate(x0, cond, x0, alpha, sigma, h, first_order, source=source).gates.detach()

    others = [gates(sigma=0.4), gates(h=0.9), gates(first_order=0.0), gates(cond=0.5 * x0)]
    assert all((other - gates()).abs().max() > 0.01 for other in others)
    torch.testing.assert_close(gates(cond=x0.clone()), gates())  # a guidance that changes nothing is none


def test_the_whole_module_is_small():
    config = EnhancementConfig()
    for channels in (4, 16):
        module = build_enhancement(config, channels, "source")
        assert module.texture is not None and module.decoder is not None and module.gain is not None
        assert sum(p.numel() for p in module.parameters()) < 60_000


def test_the_parts_can_be_had_one_by_one():
    def parts(conditioning="source", **options):
        module = build_enhancement(EnhancementConfig(**options), 4, conditioning)
        return module and [name for name in ("gain", "texture", "decoder") if getattr(module, name) is not None]

    assert parts() == ["gain", "texture", "decoder"]
    assert parts(texture=False, decoder=False) == ["gain"]
    assert parts(gain=False, decoder=False) == ["texture"]
    assert parts("none") == ["gain", "decoder"]  # captions alone: no source photo to take texture from
    assert parts(enabled=False) is None and parts(placement="none") is None
    with pytest.raises(ConfigError, match="enhancement=gain"):
        parts("none", gain=False, decoder=False)


def test_gradients_reach_every_weight_of_gates_and_matcher():
    torch.manual_seed(0)
    texture, x = SourceTexture(4, conditions=2), smooth(5)
    for p in texture.parameters():
        torch.nn.init.normal_(p, std=0.3)
    edited = x + texture(x, smooth(6), torch.randn(2, 2)).delta
    (edited - smooth(7)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in texture.parameters())


@pytest.mark.parametrize("inputs", ["place", "time"])
def test_gates_of_source_texture_that_see_less_are_gates_with_other_first_weights(inputs):
    """Of all bands alike; or of nothing but whether there is a source."""
    torch.manual_seed(0)
    full, less = SourceTexture(4), SourceTexture(4, inputs=inputs)
    torch.nn.init.normal_(full.output.weight)
    less.load_state_dict(full.state_dict())
    x, source = smooth(5), smooth(6)
    own = full(x, source).gates
    with torch.no_grad():
        weight, energies = full.input.weight, 3 * full.levels  # then: rest, how sure, whether there is a source
        mean = weight[:, :energies].unflatten(1, (3, full.levels)).mean(2, keepdim=True)
        weight[:, :energies] = mean.expand(-1, -1, full.levels, -1, -1).flatten(1, 2)
        if inputs == "time":
            weight[:, : energies + 2] = 0
    seen = less(x, source).gates
    torch.testing.assert_close(seen, full(x, source).gates, rtol=1e-4, atol=1e-4)
    assert float((seen - own).detach().abs().max()) > 0.01


def test_the_file_keeps_every_part(tmp_path):
    module = EnhancementModule(2, 8, 0.3, source_channels=4, decoder=True)
    opened(module.texture)
    again = load_enhancement(save_enhancement(module, tmp_path / "enhancement.safetensors"))
    x0, source = smooth(3), smooth(4)
    assert torch.equal(again(x0, x0, x0, *LEVEL, source=source), module(x0, x0, x0, *LEVEL, source=source))
    assert again.decoder is not None
    module.finest_log_gain = 0.07
    again = load_enhancement(save_enhancement(module, tmp_path / "enhancement.safetensors"))
    photo = smooth(5, 64, 3).sigmoid()
    drawn = 0.8 * photo + 0.1
    assert torch.equal(again.refine(drawn, photo), module.refine(drawn, photo))
    assert not torch.equal(again.refine(drawn, photo), drawn)
    only = EnhancementModule(2, 8, 0.0, source_channels=4, gate_inputs="place")
    again = load_enhancement(save_enhancement(only, tmp_path / "only.safetensors"))
    assert again.gain is None and again.texture.inputs == "place"


def test_a_scheduler_takes_the_source_and_shares_it_among_images_of_a_prompt():
    module = EnhancementModule(source_channels=4).requires_grad_(False)
    opened(module.texture)
    plain = scheduler_for("ddim")
    plain.set_timesteps(10)
    output, sample = torch.randn(2, 4, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    source = smooth(4)

    def step(shown, strength=1.0):
        return enhance_scheduler(plain, module, strength, source=shown).step(output, 300, sample).prev_sample

    expected = plain.step(output, 300, sample).prev_sample
    with torch.no_grad():
        assert torch.equal(step(None), expected)  # no source, no texture
        assert torch.equal(step(source, 0.0), expected)
        shared = step(source)
        assert not torch.equal(shared, expected)
        assert torch.equal(shared, step(source.repeat_interleave(2, dim=0)))
        with pytest.raises(ConfigError, match="one per prompt"):
            step(smooth(4).repeat(2, 1, 1, 1)[:3])


def test_the_direction_term_needs_a_gain():
    with pytest.raises(ConfigError, match="direction"):
        enhance_scheduler(scheduler_for("ddim"), EnhancementModule(3, 32, 0.0, 4), 1.0, "direction")


def test_refining_in_pixels_brings_back_the_sources_fine_band_by_strength():
    torch.manual_seed(0)
    module = EnhancementModule(decoder=True)
    opened(module.decoder)
    real = (smooth(8, 64, 3) * 0.05 + 0.5).clamp(0, 1)
    blurred = split_bands(real, 1)[1].clamp(0, 1)
    with torch.no_grad():
        errors = [float((module.refine(blurred, real, s) - real).square().mean()) for s in (0.0, 0.5, 1.0)]
    assert errors[2] < errors[1] < errors[0]
    assert module.refine(blurred, real, 0.0) is blurred


def test_the_finest_band_stays_where_captions_alone_were_drawn() -> None:
    """A run that learned with sources learned what is lost with them."""
    module, images = EnhancementModule(source_channels=4, decoder=True, finest_log_gain=0.1), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(module.refine(images, None), images)
    decoder_alone = EnhancementModule(decoder=True, finest_log_gain=0.1, sourced=True)  # no source texture, but sources
    torch.testing.assert_close(decoder_alone.refine(images, None), images)
    flatter = (images - 0.5) * 0.3 + 0.5
    torch.testing.assert_close(module.refine(images, flatter), images)  # a source that has less proves nothing
    louder = module.refine(flatter, images)
    assert not torch.allclose(louder, flatter)
    torch.testing.assert_close(louder.mean((2, 3)), flatter.mean((2, 3)))  # a gain in space does not move the color
    assert not torch.allclose(EnhancementModule(decoder=True, finest_log_gain=0.1).refine(images, None), images)


def test_the_finest_band_of_pictures_is_multiplied_by_strength():
    module = EnhancementModule(decoder=True, finest_log_gain=0.1)
    picture = smooth(8, 64, 3).sigmoid() / 2 + 0.25
    finest = split_bands(picture, 1)[0][0]
    for strength in (0.5, 1.0):
        torch.testing.assert_close(
            module.refine(picture, None, strength), picture + strength * math.expm1(0.1) * finest
        )
    softer = EnhancementModule(decoder=True, finest_log_gain=-0.1).refine(picture, picture)
    torch.testing.assert_close(softer, picture + math.expm1(-0.1) * finest)
    with pytest.raises(ConfigError, match="finest_log_gain"):
        EnhancementModule(decoder=True, finest_log_gain=0.5)
