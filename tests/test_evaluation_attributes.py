"""The attribute classifier learns, saves, loads, and counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_dae.config import ConfigError
from lora_dae.evaluation.attributes.classifier import AttributeClassifier, load_classifier
from lora_dae.evaluation.attributes.fit import augment, fit_classifier

CLASSES = {"color": ["red", "blue"], "pattern": ["plain", "stripes"]}


def _pictures(n: int, seed: int = 0) -> tuple[np.ndarray, list[dict[str, str]]]:
    rng = np.random.default_rng(seed)
    images = np.full((n, 128, 128, 3), 128, dtype=np.uint8)
    labels = []
    for image in images:
        color, pattern = rng.integers(0, 2, 2)
        image[..., 2 * color] = rng.integers(200, 256)
        if pattern:
            image[::4] //= 2
        labels.append({"color": CLASSES["color"][color], "pattern": CLASSES["pattern"][pattern]})
    return images, labels


def test_it_learns_what_a_picture_shows(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = _pictures(44)
    classifier, accuracy = fit_classifier(
        images, labels, CLASSES, reconstructions=images // 2 * 2, epochs=12, batch_size=8
    )
    assert accuracy == {"color": 1.0, "pattern": 1.0}
    assert "held-out accuracy: color 1.000" in capsys.readouterr().out
    assert not classifier.training


def test_saved_and_loaded_it_says_the_same(tmp_path: Path) -> None:
    classifier = AttributeClassifier(CLASSES).eval()
    path = tmp_path / "folder" / "model.safetensors"
    classifier.save(path, {"data": "gray squares"})
    loaded = load_classifier(path)
    images = torch.rand(5, 3, 128, 128)
    a, b = classifier.predict(images), loaded.predict(images)
    assert loaded.attributes == CLASSES
    for name in CLASSES:
        assert torch.allclose(a[name].probs, b[name].probs, atol=1e-2)  # stored in fp16


def test_size_is_what_the_docstring_says() -> None:
    classifier = AttributeClassifier(CLASSES)
    assert sum(p.numel() for p in classifier.parameters()) == pytest.approx(430_000, rel=0.05)
    assert classifier(torch.rand(1, 3, 160, 160))["color"].shape == (1, 2)  # another size is resized


def test_accuracy_counts_only_what_the_label_names() -> None:
    classifier = AttributeClassifier(CLASSES).eval()
    images = torch.rand(4, 3, 128, 128)
    guesses = classifier.predict(images)["color"].indices
    truth = [CLASSES["color"][int(i)] for i in guesses]
    labels = [{"color": truth[0]}, {"color": truth[1]}, {}, {"color": "chartreuse"}]
    labels[1] = {"color": CLASSES["color"][1 - int(guesses[1])]}
    assert classifier.accuracy(images, labels) == {"color": 0.5}
    assert torch.equal(classifier.correct(images, labels)["color"].isnan(), torch.tensor([False, False, True, True]))


def test_augmentation_keeps_hue_and_size() -> None:
    red = torch.zeros(16, 3, 128, 128)
    red[:, 0] = 0.8
    changed = augment(red)
    assert changed.shape == red.shape and changed.aminmax().max <= 1 and changed.aminmax().min >= 0
    means = changed.mean(dim=(2, 3))
    assert (means[:, 0] > 0.7).all() and (means[:, 1:] < 0.03).all()
    assert not torch.equal(changed, augment(red))


def test_missing_and_foreign_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no attribute classifier at"):
        load_classifier(tmp_path / "absent.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="not an attribute classifier"):
        load_classifier(tmp_path / "other.safetensors")


def test_labels_must_fit_the_images() -> None:
    images, labels = _pictures(4)
    with pytest.raises(ConfigError, match="as many labels"):
        fit_classifier(images, labels[:2], CLASSES)
    with pytest.raises(ConfigError, match="fewer than one batch"):
        fit_classifier(images, labels, CLASSES)
