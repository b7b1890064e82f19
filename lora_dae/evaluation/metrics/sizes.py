"""Frechet distances against the number of images, for every method of a table, and what they would end at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_dae.evaluation.metrics.extrapolate import SizeCurve, frechet_against_size
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features
from lora_dae.evaluation.metrics.observe import Observed
from lora_dae.evaluation.report.table import MetricValue

Curves = dict[str, dict[str, SizeCurve]]  # metric -> method -> curve


def size_curves(
    seen: Mapping[str, Observed], real: Mapping[str, Features], extractors: Sequence[FeatureExtractor], seed: int
) -> Curves:
    """A curve for every method and every extractor that has a Frechet distance; equal subsets for equal numbers."""
    return {
        extractor.names["fd"]: {
            method: frechet_against_size(o.features[extractor.name].pooled, real[extractor.name].pooled, seed)
            for method, o in seen.items()
        }
        for extractor in extractors
        if "fd" in extractor.names
    }


def add_infinity(methods: Mapping[str, dict[str, MetricValue]], curves: Curves) -> dict[str, str]:
    """Put ``<metric>_inf`` into ``methods`` where it is valid; returns metric -> why for those that are not."""
    not_available = {}
    for metric, of_method in curves.items():
        for method, curve in of_method.items():
            if curve.infinity is not None:
                methods[method][f"{metric}_inf"] = MetricValue(*curve.infinity, "lower")
            elif curve.why_not is not None:
                not_available[f"{metric}_inf"] = curve.why_not
    return not_available
