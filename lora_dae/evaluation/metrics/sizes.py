"""Frechet distances against the number of images, for every method of a table, and what they would end at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_dae.evaluation.metrics.extrapolate import POINTS, SizeCurve, frechet_against_size
from lora_dae.evaluation.metrics.features import FeatureExtractor, Features
from lora_dae.evaluation.metrics.observe import Observed
from lora_dae.evaluation.report.protocol import Protocol
from lora_dae.evaluation.report.table import MetricValue

Curves = dict[str, dict[str, SizeCurve]]  # metric -> method -> curve


def size_curves(
    seen: Mapping[str, Observed],
    methods: Mapping[str, Mapping[str, MetricValue]],
    real: Mapping[str, Features],
    extractors: Sequence[FeatureExtractor],
    seed: int,
) -> Curves:
    """A curve for every method and every extractor that has a Frechet distance; equal subsets for equal numbers.

    ``methods`` have the distances themselves, whose intervals are part of those at the curves' ends.
    """
    curves: Curves = {}
    for extractor in extractors:
        if "fd" in extractor.names:
            name, y = extractor.names["fd"], real[extractor.name].pooled
            curves[name] = {
                method: frechet_against_size(
                    o.features[extractor.name].pooled, y, seed, _half_width(methods[method][name])
                )
                for method, o in seen.items()
            }
    return curves


def _half_width(metric: MetricValue) -> float:
    return 0.0 if metric.high is None else metric.high - metric.value


def add_infinity(methods: Mapping[str, dict[str, MetricValue]], curves: Curves, protocol: Protocol) -> None:
    """Put ``<metric>_inf`` into ``methods`` where it is valid, and what it is, or why it is not there, on record."""
    for metric, of_method in curves.items():
        if any(curve.infinity is not None for curve in of_method.values()):
            protocol.definitions.append(
                f"{metric}_inf: end of a line in 1 / N through the distances of {POINTS} random subsets, N / 4 to N "
                f"generated images against all real ones (whose number still biases it); interval: the line's "
                f"intercept (Student) and {metric}'s own, as a root of squares"
            )
        for method, curve in of_method.items():
            if curve.infinity is not None:
                methods[method][f"{metric}_inf"] = MetricValue(*curve.infinity, "lower")
            elif curve.why_not is not None:
                protocol.not_available[f"{metric}_inf"] = curve.why_not
