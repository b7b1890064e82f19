"""Which pairs the embedded attribute classifier can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_dae.evaluation.attributes.classifier import AttributeClassifier, load_embedded

STUDIO_ATTRIBUTES = {"garment", "color", "pattern", "view"}  # what tells its pairs from other attributed ones


def studio_classifier(rows: Sequence[Mapping[str, str]] | None) -> AttributeClassifier | None:
    """The embedded classifier, where the pairs' attributes are the studio's."""
    known = rows is not None and all(STUDIO_ATTRIBUTES <= row.keys() for row in rows)
    return load_embedded() if known else None
