"""Which noise a backbone was trained on: by its scheduler's config, by markers in a checkpoint, told on cards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import PNDMScheduler
from family_models import write_backbone, write_single_file

from lora_dae.adapter.files import FILE_NAME
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.usage import own_scheduler, settled
from lora_dae.config import BackboneConfig, Config, ConfigError
from lora_dae.evaluation.run import usage
from lora_dae.export.card import model_card


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("schedule") / "sdxl", "sdxl")


@pytest.mark.parametrize("asked", [None, False])
def test_zero_terminal_snr_of_a_solver_that_does_not_know_it(asked: bool | None, tmp_path: Path) -> None:
    """diffusers keeps the word in PNDM's config, and PNDM's betas as they are."""
    path = write_backbone(tmp_path / "sd15", "sd15", "v_prediction")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rescale_betas_zero_snr": True}))
    assert float(PNDMScheduler.from_pretrained(path / "scheduler").alphas_cumprod[-1]) > 0.004
    scheduler = load_backbone(BackboneConfig("folder", str(path), zero_terminal_snr=asked)).scheduler
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466 if asked is False else 0, abs=1e-5)
    assert bool(scheduler.config.rescale_betas_zero_snr) == (asked is None)  # what solvers are built from


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_noise_schedules_of_other_models_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDIM on their config would be given levels that it does not speak of. Said before any weight is loaded."""
    path = write_backbone(tmp_path / "sd15", "sd15")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, "num_train_timesteps": 1000}))
    monkeypatch.delattr("lora_dae.backbone.load.load_part")
    with pytest.raises(ConfigError, match=f"uses {name}, a noise schedule that no Stable Diffusion"):
        load_backbone(BackboneConfig("folder", str(path)))


@pytest.mark.parametrize(
    ("markers", "told", "expected"),
    [
        (("v_pred", "ztsnr"), {}, ("v_prediction", True)),
        (("v_pred",), {}, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {"prediction_type": "v_prediction"}, ("v_prediction", True)),
        (("v_pred", "ztsnr"), {"zero_terminal_snr": False}, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {"prediction_type": "epsilon"}, ("epsilon", False)),
        (("ztsnr",), {"prediction_type": "v_prediction"}, ("v_prediction", True)),
    ],
)
def test_markers_in_a_checkpoint_set_v_prediction(
    markers: tuple[str, ...],
    told: dict[str, object],
    expected: tuple[str, bool],
    sdxl: Path,
    tmp_path: Path,
) -> None:
    """Each by itself, and where the config leaves it open."""
    file = write_single_file(tmp_path / "x.safetensors", sdxl, {name: torch.tensor([]) for name in markers})
    found = inspect_backbone(BackboneConfig("file", path=str(file), configs=str(sdxl), **told))  # type: ignore[arg-type]
    assert (found.prediction_type, found.zero_terminal_snr) == expected


def test_cards_and_pages_tell_what_markers_in_a_checkpoint_say(sdxl: Path, tmp_path: Path) -> None:
    """Plain diffusers does not read them; a folder's scheduler it does."""
    file = write_single_file(tmp_path / "x.safetensors", sdxl, {name: torch.tensor([]) for name in ("v_pred", "ztsnr")})
    marked = BackboneConfig("file", path=str(file), configs=str(sdxl))
    cfg = settled(Config(run_dir="run", backbone=marked), inspect_backbone(marked))
    line = "prediction_type='v_prediction', rescale_betas_zero_snr=True, timestep_spacing='trailing')"
    assert line in model_card(cfg, "sdxl", [FILE_NAME], None, False) and line in usage(cfg, "sdxl")
    plain = BackboneConfig("folder", str(write_backbone(tmp_path / "sd21", "sd21", "v_prediction")))
    assert own_scheduler(settled(Config(run_dir="run", backbone=plain), inspect_backbone(plain)).backbone) == []
