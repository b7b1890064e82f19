"""Published ways to better pictures inside the sampler, one at a time: what the enhancement module is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_dae.config import METHODS
from lora_dae.sampling.method import Method
from lora_dae.sampling.methods.attention import FreeU, PerturbedAttention, SelfAttention
from lora_dae.sampling.methods.deepcache import DeepCache
from lora_dae.sampling.methods.guidance import BandGain, FrequencyGuidance, ProjectedGuidance, RescaledGuidance
from lora_dae.sampling.methods.picture import UnsharpMask
from lora_dae.sampling.methods.steps import DetailDaemon, WaveletCorrection

_CLASSES: dict[str, Callable[..., Method]] = {
    "none": Method,
    "freeu": FreeU,
    "sag": SelfAttention,
    "pag": PerturbedAttention,
    "apg": ProjectedGuidance,
    "rescale": RescaledGuidance,
    "frequency": FrequencyGuidance,
    "detail_daemon": DetailDaemon,
    "wavelet": WaveletCorrection,
    "band_gain": BandGain,
    "unsharp": UnsharpMask,
    "deepcache": DeepCache,
}


def build_method(name: str, options: Mapping[str, float]) -> Method:
    """The method called ``name`` for one batch; ``options`` in place of those in METHODS."""
    return _CLASSES[name](**{**METHODS[name], **options})
