"""How the shipped attribute classifier was made: ``make classifier``.

    python -m lora_dae.evaluation.attributes.recipe [--work build/backbone] [--epochs 8]

Trained on the recipe's BASE and TARGET photos, the latter also as autoencoder reconstructions; judged on TARGET photos
that it never saw. The card beside the weights holds the numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from lora_dae.backbone.layout import STUDIO
from lora_dae.backbone.studio.autoencoder import reconstruct
from lora_dae.backbone.studio.recipe import base_data, target_data
from lora_dae.data.studio.attributes import BACKGROUNDS, COLORS, GARMENTS, PATTERNS
from lora_dae.evaluation.attributes.classifier import EMBEDDED
from lora_dae.evaluation.attributes.fit import fit_classifier
from lora_dae.evaluation.metrics.features import stack_images
from lora_dae.evaluation.statistics.bootstrap import wilson_interval

CLASSES = {
    "garment": GARMENTS,
    "color": tuple(COLORS),
    "pattern": PATTERNS,
    "sleeve": ("none", "short", "long"),
    "gender": ("woman", "man"),
    "background": tuple(BACKGROUNDS),
}


def words(labels: dict[str, str]) -> dict[str, str]:
    """The labels that can be seen: nobody wears a flat-lay or a mannequin's garment."""
    return {k: v for k, v in labels.items() if k in CLASSES and (k != "gender" or labels["view"] == "model")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/backbone"), help="the backbone recipe's folder")
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    base, _ = base_data(args.work / "cache")
    target, held_out = target_data(args.work / "cache")
    vae = AutoencoderTiny.from_pretrained(STUDIO / "vae", torch_dtype=torch.float32)
    images = np.concatenate([target.images, base.images])
    labels = [words(d.attributes(i)) for d in (target, base) for i in range(len(d))]
    again = images.copy()
    with torch.autocast("cpu", torch.bfloat16):
        decoded = reconstruct(vae.to(memory_format=torch.channels_last), target.images)
    again[: len(target)] = (decoded.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8).numpy()
    order = np.random.default_rng(0).permutation(len(images))
    images, again, labels = images[order], again[order], [labels[i] for i in order]
    classifier, _ = fit_classifier(images, labels, CLASSES, again, epochs=args.epochs)
    truth = [words(held_out.attributes(i)) for i in range(len(held_out))]
    accuracy = classifier.accuracy(stack_images(list(held_out.images)), truth)
    n = len(held_out)
    rows = []
    for name, share in accuracy.items():
        low, high = wilson_interval(share * n, n)
        rows.append(f"| {name} | {len(CLASSES[name])} | {share:.3f} | [{low:.3f}, {high:.3f}] |")
    card = (
        "# The embedded attribute classifier\n\nReads garment, color, pattern, sleeve, gender and background off a "
        "128 x 128 studio photo. Trained on\n"
        f"{len(base):,} BASE and {len(target):,} TARGET photos of the procedural studio, half of the latter "
        f"as autoencoder reconstructions,\n{args.epochs} epochs. Made by `make classifier`.\n\n"
        f"Held-out accuracy on {n} TARGET photos that it never saw (Wilson 95 % interval):\n\n"
        "| attribute | classes | accuracy | interval |\n|---|---:|---:|---|\n" + "\n".join(rows) + "\n"
    )
    classifier.save(EMBEDDED, {name: f"{share:.4f}" for name, share in accuracy.items()})
    (EMBEDDED.parent / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
