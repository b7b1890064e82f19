"""Whether caption and source photo agree: what is learned from pairs, what trust does, and what it lets through."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_enhancement_texture import LEVEL, opened, smooth
from torch import Tensor

from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig, SamplingConfig
from lora_dae.enhancement import EnhancementModule, load_enhancement, save_enhancement
from lora_dae.enhancement.agreement import Agreement, facts, words
from lora_dae.sampling.draw import Drawer
from lora_dae.training.agreement import Pairs, learn_agreement

COLORS = torch.randn(12, 4, generator=torch.Generator().manual_seed(3))


def pairs(count: int, seed: int, related: bool = True) -> Pairs:
    """Captions that name a color, photos that have it; units and offsets as encoders have them, not standardized."""
    generator = torch.Generator().manual_seed(seed)
    named = torch.randint(0, len(COLORS), (count,), generator=generator)
    shown = named if related else torch.randint(0, len(COLORS), (count,), generator=generator)
    text = 40 * torch.nn.functional.one_hot(named, 16).float()[:, None] + 7
    text = torch.cat([text + torch.randn(count, 5, 16, generator=generator), torch.full((count, 1, 16), 1e3)], dim=1)
    photos = COLORS[shown][:, :, None, None] + 0.1 * torch.randn(count, 4, 16, 16, generator=generator)
    batch = {"text": text, "source": photos}
    return Pairs.of([(batch, torch.full((6, 16), 7.0))], 5)


def test_right_pairs_are_trusted_and_swapped_ones_doubted() -> None:
    agreed = learn_agreement(pairs(300, 0), pairs(100, 1), 4, 5, seed=0)
    agreement, others = agreed.agreement, pairs(100, 2)
    assert agreement is not None and agreed.told > 0.9 and agreed.doubted > 0.7
    trust = agreement.logits(others.words, others.facts).sigmoid()
    named = others.words[:, :12].argmax(1)
    apart = named[:, None] != named[None, :]
    assert (trust.diagonal() > 0.5).float().mean() > 0.9 and (trust[apart] < 0.5).float().mean() > 0.8
    assert (agreement.logits(others.nothing, others.facts).sigmoid() > 0.8).all()  # it says nothing against any photo
    again = learn_agreement(pairs(300, 0), pairs(100, 1), 4, 5, seed=0).agreement
    assert again is not None and torch.equal(again.text.weight, agreement.text.weight)


def test_what_cannot_be_told_apart_is_left_out() -> None:
    unrelated = learn_agreement(pairs(300, 0, related=False), pairs(100, 1, related=False), 4, 5, seed=0)
    assert unrelated.agreement is None and 0.3 < unrelated.told < 0.7 and "trusted always" in str(unrelated)
    alike = pairs(1, 1)
    same = Pairs(alike.words.expand(20, -1), pairs(20, 1).facts, alike.nothing)  # a trigger word and no more
    one = learn_agreement(pairs(300, 0), same, 4, 5, seed=0)
    assert one.agreement is None and math.isnan(one.told) and "have one caption" in str(one)


def test_photos_of_one_product_are_no_swapped_pairs() -> None:
    some = pairs(20, 0)
    both = Pairs(some.words.repeat(2, 1), torch.cat([some.facts, some.facts + 1]), some.nothing)
    assert not both.apart[:20, 20:].diagonal().any() and not both.apart.diagonal().any()
    assert both.apart.float().mean() > 0.9


def test_trust_is_by_the_words_and_facts_of_each_pair() -> None:
    agreement = Agreement(16, 4, 5)
    text, source = torch.randn(3, 5, 16), torch.randn(3, 4, 16, 16)
    expected = agreement.logits(words(text, 5), facts(source)).sigmoid().diagonal()
    torch.testing.assert_close(agreement(text, source), expected)
    more = torch.cat([text, torch.randn(3, 1, 16)], dim=1)  # SDXL's pooled text, or a further window
    assert torch.equal(agreement(more, source), agreement(text, source))
    constant = torch.ones(1, 4, 8, 8) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    assert facts(constant)[0, :4].tolist() == facts(constant)[0, 8:12].tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(facts(constant)[0, 16:], torch.full((12,), math.log(1e-4)))


def test_gates_are_multiplied_by_trust() -> None:
    torch.manual_seed(0)
    module = EnhancementModule(max_log_gain=0.0, source_channels=4, decoder=True)
    assert module.texture is not None and module.decoder is not None
    opened(module.texture), opened(module.decoder)
    x0, source = smooth(3), smooth(4)
    whole = module.evaluate(x0, x0, x0, *LEVEL, source=source)
    some = module.evaluate(x0, x0, x0, *LEVEL, source=source, trust=torch.tensor([0.0, 0.5]))
    assert torch.count_nonzero(some.delta[0]) == 0
    torch.testing.assert_close(some.delta[1], 0.5 * whole.delta[1])
    picture, photo = smooth(5, 32, 3).sigmoid(), smooth(6, 32, 3).sigmoid()
    one, none = (module.refine(picture, photo, trust=torch.full((2,), value)) for value in (1.0, 0.0))
    assert torch.equal(one, module.refine(picture, photo)) and not torch.equal(one, none)


def test_a_source_without_trust_counts_as_none() -> None:
    """In pixels too, where a gain sees the source, and the finest band is made louder."""
    torch.manual_seed(0)
    module = EnhancementModule(source_channels=4, decoder=True, finest_log_gain=0.1)
    assert module.texture is not None and module.decoder is not None
    for layer in (module.texture.output, module.decoder.output):
        torch.nn.init.normal_(layer.weight, std=0.5)
    x0, cond, source, picture, photo = smooth(3), smooth(7), smooth(4), *(smooth(k, 32, 3).sigmoid() for k in (5, 6))
    nothing = torch.zeros(2)
    alone, shown = module.evaluate(x0, cond, x0, *LEVEL), module.evaluate(x0, cond, x0, *LEVEL, source=source)
    torch.testing.assert_close(module.evaluate(x0, cond, x0, *LEVEL, source=source, trust=nothing).delta, alone.delta)
    torch.testing.assert_close(module.refine(picture, photo, trust=nothing), module.refine(picture, None))
    assert not torch.allclose(shown.delta, alone.delta) and module.refine(picture, photo).ne(picture).any()


def distrusting(bias: float, channels: int, width: int) -> EnhancementModule:
    """A module of source texture whose trust in all sources is that of ``bias``."""
    torch.manual_seed(0)
    module = EnhancementModule(max_log_gain=0.0, source_channels=channels, text_channels=width, text_tokens=5)
    assert module.texture is not None and module.agreement is not None
    opened(module.texture)
    torch.nn.init.zeros_(module.agreement.output.weight)
    torch.nn.init.zeros_(module.agreement.output.bias)
    torch.nn.init.constant_(module.agreement.bias, bias)
    return module.requires_grad_(False).eval()


def test_a_distrusted_source_leaves_the_picture_alone(tiny_backbone: Path) -> None:
    """At trust 0 it is strength 0 bit for bit, at trust 1 it is a module that does not ask."""
    backbone = load_backbone(BackboneConfig(path=str(tiny_backbone)))
    width = backbone.encode_text([""]).shape[-1]
    sources = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    modules = [distrusting(bias, backbone.latent_channels, width) for bias in (-200.0, 200.0)]
    asking = modules[1]
    never = distrusting(0.0, backbone.latent_channels, width)
    never.agreement = None

    def draw(module: EnhancementModule, strength: float = 1.0) -> np.ndarray:
        cfg = SamplingConfig("ddim", 3, 1.0, 1.0)
        drawer = Drawer(backbone, module, "prediction", "source", 32, cfg)
        unet = backbone.unet
        forward = unet.forward
        # The tiny UNet has no source channels: it is shown the picture's alone.
        unet.forward = lambda x, *a, **k: forward(x[:, : backbone.latent_channels], *a, **k)  # type: ignore[method-assign]
        try:
            return drawer.images(["a red dress", "a blue coat"], sources, strength)
        finally:
            unet.forward = forward  # type: ignore[method-assign]

    plain = draw(asking, 0.0)
    assert np.array_equal(draw(modules[0]), plain)
    assert np.array_equal(draw(asking), draw(never)) and not np.array_equal(draw(asking), plain)


@pytest.mark.parametrize("version", ["3", "4", "5"])
def test_the_file_keeps_it_and_files_from_before_are_read(version: str, tmp_path: Path) -> None:
    module, path = distrusting(0.3, 4, 16), tmp_path / "enhancement.safetensors"
    again = load_enhancement(save_enhancement(module, path))
    text, source = torch.randn(2, 5, 16), smooth(4)

    def trust(one: EnhancementModule) -> Tensor:
        found = one.trust(text, source)
        assert found is not None
        return found

    assert torch.equal(trust(again), trust(module))
    assert module.trust(None, source) is None and module.trust(text, None) is None
    torch.manual_seed(0)
    before = EnhancementModule(source_channels=4)
    assert before.texture is not None
    with torch.no_grad():
        torch.nn.init.normal_(before.texture.output.weight)
        before.texture.input.weight[:, 9:12] = 0  # what gates did not see then: guidance
    old = save_enhancement(before, tmp_path / "old.safetensors")
    with safe_open(old, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    for later in ("sourced",) if version > "3" else ("sourced", "text_channels", "text_tokens", "finest_log_gain"):
        del metadata[later]
    if version < "5":
        weight = tensors["texture.input.weight"]
        tensors["texture.input.weight"] = torch.cat([weight[:, :9], weight[:, 12:]], dim=1)
    save_file(tensors, old, {**metadata, "version": version})
    read, x0 = load_enhancement(old), smooth(3)
    assert read.trust(text, source) is None
    inputs = x0, 0.5 * x0, x0, *LEVEL
    assert torch.equal(read.evaluate(*inputs, source=source).delta, before.evaluate(*inputs, source=source).delta)


def test_agreement_is_small_on_every_family() -> None:
    for width, channels in ((128, 16), (768, 4), (1024, 4), (2048, 4)):
        module = EnhancementModule(source_channels=channels, decoder=True, text_channels=width)
        assert sum(p.numel() for p in module.parameters()) < 60_000


@pytest.mark.parametrize("count", [3, 1])
def test_one_photo_may_be_for_several_captions(count: int) -> None:
    agreement = distrusting(0.3, 4, 16)
    trust = agreement.trust(torch.randn(3, 5, 16), smooth(4)[:1].expand(count, -1, -1, -1))
    assert trust is not None and trust.shape == (3,)
