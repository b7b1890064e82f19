"""The recipe's parts: the encoder is a principal component analysis, the optimizer torch's Muon, resuming exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_dae.backbone.studio import autoencoder, people, recipe, words
from lora_dae.backbone.studio.autoencoder import LATENT_CHANNELS, build, fit_encoder
from lora_dae.backbone.studio.recipe import Averaged, Optimizer, Schedule
from lora_dae.data.studio.attributes import draw_look
from lora_dae.data.studio.figure import Head
from lora_dae.data.studio.scene import photo


def smooth_images(n: int) -> np.ndarray:
    """Random pictures with most power in low frequencies, uint8 (n, 32, 32, 3)."""
    generator = torch.Generator().manual_seed(0)
    noise = [
        F.interpolate(torch.randn(n, 3, s, s, generator=generator), 32, mode="bicubic") * s**-0.5
        for s in (4, 8, 16, 32)
    ]
    return (sum(noise) * 60 + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).numpy()


def test_the_encoder_reaches_the_best_that_any_linear_one_can() -> None:
    """Eckart-Young: the error of the best inverse is the sum of the variances that were left out."""
    images = smooth_images(64)
    vae = build()
    fit_encoder(vae, images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(pixels).latents
    assert z.shape == (64, LATENT_CHANNELS, 8, 8)
    latents = z.permute(0, 2, 3, 1).flatten(0, 2).double()
    patches = F.pixel_unshuffle(pixels, 4).permute(0, 2, 3, 1).flatten(0, 2).double()
    centered = patches - patches.mean(0)
    variances = torch.linalg.svdvals(centered).square() / len(centered)
    inverse = torch.linalg.lstsq(latents, centered).solution
    left = (latents @ inverse - centered).square().sum(1).mean()
    torch.testing.assert_close(left, variances[LATENT_CHANNELS:].sum(), rtol=1e-4, atol=0)
    covariance = latents.T @ latents / len(latents)
    torch.testing.assert_close(covariance, covariance.diag().diag(), rtol=0, atol=1e-3)
    torch.testing.assert_close(covariance.trace() / LATENT_CHANNELS, torch.tensor(1.0).double(), rtol=1e-3, atol=0)
    assert latents.mean(0).abs().max() < 1e-4


def test_encoding_does_not_train() -> None:
    vae = build()
    fit_encoder(vae, smooth_images(4))
    images = autoencoder.crops([np.tile(smooth_images(4), (1, 2, 2, 1))], [1.0], np.random.default_rng(0))
    autoencoder.step_loss(vae, images, torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is None for p in vae.encoder.parameters())
    assert all(p.grad is not None for p in vae.decoder.parameters())


def small(memory_format: torch.memory_format) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 9, 2))
    return layers.to(memory_format=memory_format)


def train(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for k in range(first, last):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(k))
        model(x).square().sum().backward()
        optimizer.step(0.5, clip=1.0)


def test_a_kernel_moves_as_torch_s_muon_moves_its_matrix() -> None:
    model = small(torch.contiguous_format)
    optimizer = Optimizer(dict(model.named_parameters()), 0.02, 0.01, 0.1)
    kernel = model[0].weight
    matrix = nn.Parameter(kernel.detach().clone().flatten(1))
    muon = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for k in range(3):
        model(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(k))).square().sum().backward()
        matrix.grad = kernel.grad.flatten(1).clone()
        muon.step()
        optimizer.step(0.5, clip=1e9)
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=0, atol=0)


def test_the_memory_format_does_not_matter() -> None:
    """Muon's orthogonalization does not depend on the order of a matrix's columns (bf16 sums differ a little)."""
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = small(memory_format)
        train(model, Optimizer(dict(model.named_parameters()), 0.02, 0.01, 0.0), 0, 3)
        weights.append(model[0].weight.detach())
    start = small(torch.contiguous_format)[0].weight.detach()
    assert (weights[0] - weights[1]).norm() < 0.05 * (weights[0] - start).norm()


def test_resuming_is_the_straight_run(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Averaged, Optimizer, Schedule]:
        model = small(torch.channels_last)
        averaged = Averaged({"m": model}, 0.9)
        return model, averaged, Optimizer(averaged.live, 0.02, 0.01, 0.1), Schedule(1.0)

    straight, _, optimizer, _ = make()
    train(straight, optimizer, 0, 6)
    first, averaged, optimizer, schedule = make()
    train(first, optimizer, 0, 3)
    schedule.tick()
    recipe.save_state(tmp_path / "state.safetensors", averaged, optimizer, schedule)
    second, averaged, optimizer, schedule = make()
    recipe.load_state(tmp_path / "state.safetensors", averaged, optimizer, schedule)
    assert schedule.step == 1
    train(second, optimizer, 3, 6)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


class Looks:
    """The numbers of 40 BASE photos, none of them drawn."""

    seed, start, domain = 0, 0, "base"

    def __len__(self) -> int:
        return 40


def test_a_face_lies_where_the_loss_counts_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What eyes, nose and mouth change in a photo, at the places of the latents; on other photos nothing counts."""
    weights, models = people.weights_of(Looks(), 32)  # type: ignore[arg-type]
    looks = [draw_look(0, i, "base") for i in range(40)]
    assert models.tolist() == [i for i, look in enumerate(looks) if look.view == "model"] and 0 < len(models) < 40
    assert (np.delete(weights, models, axis=0) == 1).all()
    some = models[:6].tolist()
    whole = [photo(looks[i], 0, i, 64).image.astype(int) for i in some]
    # The same random numbers as with a face: later ones are the hair's.
    monkeypatch.setattr(Head, "_features", lambda self, canvas, man: man and self.rng.uniform())
    for i, image in zip(some, whole, strict=True):
        change = np.abs(image - photo(looks[i], 0, i, 64).image).sum(2).reshape(32, 2, 32, 2).sum((1, 3))
        head = weights[i] == people.HEAD_WEIGHT
        assert change.sum() > 0 and change[head].sum() > 0.85 * change.sum()
        assert 10 < head.sum() < 100 and np.nonzero(head)[0].mean() < 32 / 4


def test_the_vocabulary_of_trained_weights_stays(tmp_path: Path) -> None:
    """A text encoder's rows are its words' numbers."""
    (tmp_path / "vocab.json").write_text('{"a</w>": 7, "shirt</w>": 3}')
    assert words.write_tokenizer(tmp_path) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["vocab.json"]


def test_what_is_seen_close_shows_heads_and_hands_as_they_lie_in_the_photo() -> None:
    """Every crop is a window of its photo's latents with the weights of the same places, and has a head or a hand."""
    weights, models = people.weights_of(Looks(), 32)  # type: ignore[arg-type]
    photos = np.arange(40, dtype=np.float32)[:, None, None, None] * 1024 + np.arange(1024).reshape(1, 1, 32, 32)
    tokens = torch.arange(40)[:, None, None] * torch.ones(1, 3, 5, dtype=torch.long)
    z, weight, ids = people.close(np.random.default_rng(0), photos, weights, tokens, models)
    assert z.shape == (people.CROPS, 1, people.CROP_SIZE, people.CROP_SIZE) and ids.shape == (people.CROPS, 5)
    heads = 0
    for crop, places, text in zip(z[:, 0].long(), weight, ids, strict=True):
        photo_index, first = divmod(int(crop[0, 0]), 1024)
        top, left = divmod(first, 32)
        window = (slice(top, top + people.CROP_SIZE), slice(left, left + people.CROP_SIZE))
        assert photo_index in models and text.tolist() == [photo_index] * 5
        assert np.array_equal(crop.numpy(), photos[photo_index, 0][window].astype(int))
        assert np.array_equal(places.numpy(), weights[photo_index][window].astype(np.float32))
        assert places.max() > 1
        heads += int(places.max() == people.HEAD_WEIGHT)
    assert heads >= 0.6 * people.CROPS
