"""Two processes that share the images give the numbers of one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_evaluation_measure import TinyFeatures, _damaged, _photos
from torch.multiprocessing.spawn import spawn
from torchmetrics.image.fid import FrechetInceptionDistance

from lora_dae.evaluation.attributes.classifier import AttributeClassifier
from lora_dae.evaluation.metrics.color import srgb_to_lab
from lora_dae.evaluation.metrics.distances import frechet_from_features
from lora_dae.evaluation.metrics.measure import summarize
from lora_dae.evaluation.metrics.observe import Batch, Meters, gathered, observe, share

N = 11  # odd: one process has more to do


class _Pattern:
    """A stand-in."""

    def __call__(self, a: torch.Tensor, b: torch.Tensor, s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return (a - s).abs().mean(dim=(1, 2, 3))

    def source_color(self, b: torch.Tensor, s: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return srgb_to_lab(s.mean(dim=(2, 3)))


def _numbers() -> dict[str, list[float]]:
    """Every metric of N paired pictures, this process looking at its share of them."""
    torch.set_num_threads(1)
    photos = (_photos(N) * 255).round() / 255
    images = (_damaged(photos, 0.6) * 255).round() / 255
    masks = torch.zeros(N, 48, 48)
    masks[:, 8:40, 8:40] = 1
    masks[3] = 0  # a photo without garment
    labels = [{"color": "red"} if k % 3 else None for k in range(N)]
    torch.manual_seed(1)
    classifier = AttributeClassifier({"color": ["red", "blue"]}).eval()
    extractor = TinyFeatures()
    extractor.names = {**extractor.names, "mmd": "mmd_tiny"}
    meters = Meters(
        (extractor,), classifier, {"lpips_alex": lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))},
        pattern=_Pattern(),  # type: ignore[arg-type]
    )  # fmt: skip

    def batches(shown: torch.Tensor, paired: bool) -> list[Batch]:
        index = list(share(N))
        target = photos if paired else None
        return [
            Batch(
                shown[k : k + 1], *(None if t is None else t[k : k + 1] for t in (target, photos, masks)), [labels[k]]
            )
            for k in index
        ]

    seen = gathered(observe(batches(images, True), meters))
    real = gathered(observe(batches(photos, False), meters))
    numbers = summarize(seen, real, meters.extractors, 50, 0, True)
    result = {name: [m.value, m.low or 0.0, m.high or 0.0] for name, m in numbers.items()}
    # torchmetrics' own class on our features, as a training would use it.
    fid = FrechetInceptionDistance(feature=extractor, normalize=True)
    for k in share(N):
        fid.update(photos[k : k + 1], real=True)
        fid.update(images[k : k + 1], real=False)
    assert fid.compute().item() == pytest.approx(
        frechet_from_features(seen.features["tiny"].pooled, real.features["tiny"].pooled), rel=1e-3
    )
    return result


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(_numbers()))
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = _numbers()
    names = "fd_tiny kd_tiny mmd_tiny is_tiny attr_color psnr ssim lpips_alex psnr_garment edge_f1_garment"
    assert set(names.split()) | {
        "pattern_garment",
        "color_garment",
        "color_to_source_garment",
        "lpips_alex_composed",
        "lsd_garment",
    } <= set(alone)
    assert json.dumps(first) == json.dumps(second) and list(first) == list(alone)
    for name, values in alone.items():
        assert first[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name
        assert all(math.isfinite(v) for v in values), name
