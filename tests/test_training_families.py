"""The whole job (train, validate, sample, resume, export, load) on small models of every family and prediction type."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compose import config
from diffusers import StableDiffusionXLPipeline
from family_models import write_backbone, write_single_file
from rich.console import Console
from safetensors.torch import load_file

from lora_dae.adapter.kohya import KOHYA_FILE
from lora_dae.backbone.load import load_backbone
from lora_dae.config import BackboneConfig, Config, ConfigError
from lora_dae.export.command import ExportRequest, export_run
from lora_dae.sampling.load import load_run
from lora_dae.training import run as training
from lora_dae.training.module import LoraDae

FAMILIES = ("sd15", "sd21", "sdxl")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        write_backbone(path / family, family)
        write_single_file(path / f"{family}.safetensors", path / family)
    return path


@pytest.fixture
def without_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the weights alone."""
    nothing = SimpleNamespace(methods={}, references={}, corrected=dict), np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(training, "evaluate_run", lambda *args, **kwargs: nothing)


def short(root: Path, run_dir: Path, photos: Path, backbone: str, *overrides: str) -> Config:
    kind = "file" if backbone.endswith(".safetensors") else "folder"
    return config(
        root / backbone, run_dir, root / "cache", f"backbone={kind}", "data=folder", f"data.root={photos}",
        "data.resolution=32", "trainer.max_steps=2", "adapter.rank=2", "data.val_fraction=0.25",
        "data.test_fraction=0.25", "evaluation.frozen=false", "evaluation.num_samples=2", *overrides,
    )  # fmt: skip


CASES = {
    "sd15": (),
    "sd15-v": ("backbone.prediction_type=v_prediction",),
    "sd15-v-ztsnr": ("backbone.prediction_type=v_prediction", "backbone.zero_terminal_snr=true"),
    "sd15-checkpointing": ("backbone.gradient_checkpointing=true",),
    "sd21": ("adapter.use_dora=true",),
    "sd21-v": ("backbone.prediction_type=v_prediction",),
    "sd21-v-ztsnr": ("backbone.prediction_type=v_prediction", "backbone.zero_terminal_snr=true"),
    "sdxl": (),
    "sdxl-v": ("backbone.prediction_type=v_prediction",),
    "sdxl-v-ztsnr": ("backbone.prediction_type=v_prediction", "backbone.zero_terminal_snr=true"),
    "sdxl-bf16": ("backbone.weights=bf16", "trainer.precision=bf16-mixed"),
    "sdxl-int8": ("backbone.weights=int8", "trainer.precision=bf16-mixed"),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_and_draws(case: str, root: Path, tiny_folder: Path, tmp_path: Path) -> None:
    family = case.split("-")[0]
    cfg = short(root, tmp_path / "run", tiny_folder, family, *CASES[case])
    result = training.run(cfg)
    assert result.table is not None
    assert np.isfinite(result.table.methods["strength 0"]["fd_effnet"].value)
    run = load_run(result.run_dir)
    if case == "sdxl":
        merged_draws_the_same(result.run_dir, tmp_path)
    assert run.drawer(bf16=False).images(["a red dress"], None, 0.5).shape == (1, 32, 32, 3)
    names = load_file(result.run_dir / "adapter" / KOHYA_FILE)
    assert any("input_blocks" in name for name in names) == (family == "sdxl")


def merged_draws_the_same(run_dir: Path, tmp_path: Path) -> None:
    """Both merged forms of an SDXL run in plain diffusers; largest difference of latents 1e-4 (of 14)."""
    request = {"run": str(run_dir), "dtype": "fp32", "resize_rank": None, "output": str(tmp_path / "out"), "push": None}
    for form in ("merged", "merged_file"):
        export_run(ExportRequest(format=form, **request), Console())  # type: ignore[arg-type]
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out" / "merged")
    pipe.set_progress_bar_config(disable=True)
    shape = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}

    def draw() -> torch.Tensor:
        return pipe("a dress", generator=torch.Generator().manual_seed(0), **shape).images

    merged = draw()
    configs = str(tmp_path / "out" / "merged")
    whole = load_backbone(BackboneConfig(path=str(tmp_path / "out" / "merged.safetensors"), configs=configs))
    pipe.unet, pipe.text_encoder_2 = whole.unet, whole.text_encoder_2
    torch.testing.assert_close(draw(), merged, rtol=0, atol=1e-4)
    pipe.unet = load_run(run_dir).backbone.unet
    torch.testing.assert_close(draw(), merged, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("without_evaluation")
@pytest.mark.parametrize("family", FAMILIES)
def test_single_file_trains_the_same_weights_as_its_folder(
    family: str, root: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    quick = ("enhancement=none", "trainer.max_steps=1")
    training.run(short(root, tmp_path / "folder", tiny_folder, family, *quick))
    configs = f"backbone.configs={root / family}"
    training.run(short(root, tmp_path / "file", tiny_folder, f"{family}.safetensors", configs, *quick))
    one, other = (load_file(tmp_path / name / "adapter" / KOHYA_FILE) for name in ("folder", "file"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("without_evaluation")
@pytest.mark.parametrize("which", ["true", "attention"])
def test_checkpointing_changes_no_weight(which: str, root: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Nor does it where dropout draws: the same numbers again in the backward pass."""
    quick = ("enhancement=none", "trainer.max_steps=2", "adapter.dropout=0.2")
    option = f"backbone.gradient_checkpointing={which}"
    training.run(short(root, tmp_path / "plain", tiny_folder, "sdxl", *quick))
    training.run(short(root, tmp_path / "saving", tiny_folder, "sdxl", option, *quick))
    one, other = (load_file(tmp_path / name / "adapter" / KOHYA_FILE) for name in ("plain", "saving"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("without_evaluation")
@pytest.mark.parametrize("family", FAMILIES)
def test_resumes_exactly(
    family: str, root: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the checkpoint at step 2 of 3, and gone on: bit for bit the straight run."""
    options = ("trainer.max_steps=3", "trainer.val_check_interval=2", "enhancement=none")
    training.run(short(root, tmp_path / "straight", tiny_folder, family, *options))
    original = LoraDae.training_step

    class KilledError(Exception):
        pass

    def dies(self: LoraDae, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            raise KilledError
        return original(self, batch, batch_idx)

    monkeypatch.setattr(LoraDae, "training_step", dies)
    with pytest.raises(KilledError):
        training.run(short(root, tmp_path / "cut", tiny_folder, family, *options))
    monkeypatch.setattr(LoraDae, "training_step", original)
    training.run(short(root, tmp_path / "cut", tiny_folder, family, *options, "ckpt_path=last"))
    one, other = (load_file(tmp_path / name / "adapter" / KOHYA_FILE) for name in ("straight", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.usefixtures("without_evaluation")
def test_starts_from_the_kohya_file_of_another_run(root: Path, tiny_folder: Path, tmp_path: Path) -> None:
    quick = ("enhancement=none", "trainer.max_steps=1")
    first = training.run(short(root, tmp_path / "first", tiny_folder, "sdxl", *quick, "optimizer.learning_rate=0.1"))
    file = first.run_dir / "adapter" / KOHYA_FILE
    cfg = short(
        root, tmp_path / "second", tiny_folder, "sdxl", *quick, f"adapter.init_from={file}", "optimizer.learning_rate=0"
    )
    second = training.run(cfg)
    one, other = load_file(file), load_file(second.run_dir / "adapter" / KOHYA_FILE)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-7)


def find_shared() -> Path | None:
    """The folder of real data and weights beside the checkout, where there is one."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "shared" / "weights" / "taesd").is_dir() and (parent / "shared" / "data" / "garments").is_dir():
            return parent / "shared"
    return None


def test_real_latent_space_and_photos(root: Path, tmp_path: Path) -> None:
    """TAESD's latents of real garment photos: a random UNet of SD's latent shape trains, caches and previews."""
    shared = find_shared()
    if shared is None:
        pytest.skip("no shared/weights/taesd and shared/data/garments beside the checkout")
    vae = f"backbone.vae_path={shared / 'weights' / 'taesd'}"
    cfg = short(
        root, tmp_path / "run", shared / "data" / "garments", "sd15", vae, "data.resolution=64",
        "data.max_images=12", "tracking.sample_every_n_steps=1",
    )  # fmt: skip
    result = training.run(cfg)
    assert (result.run_dir / "samples" / "step_000001.png").is_file()
    shapes = {np.load(file, mmap_mode="r").shape[1:] for file in (root / "cache").rglob("*.mean.npy")}
    assert (4, 8, 8) in shapes  # eight times smaller: TAESD's, not the tiny VAE's
    backbone = load_run(result.run_dir).backbone
    photo = np.full((1, 64, 64, 3), 200, np.uint8)
    decoded = backbone.decode(backbone.encode_images(photo)[0])
    assert float((decoded - 200 / 255).abs().mean()) < 0.05  # a real autoencoder: what went in comes out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("backbone.weights=bf16",), "needs mixed precision"),
        (("backbone.weights=int4",), "backbone.weights=int4"),
        (("backbone.prediction_type=x0",), "backbone.prediction_type=x0"),
        (("adapter.init_from=nowhere.safetensors",), "nowhere.safetensors does not exist"),
        (("adapter=full", "adapter.init_from=x.safetensors"), "trains none"),
    ],
)
def test_bad_settings(overrides: tuple[str, ...], message: str, root: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        training.run(short(root, tmp_path / "run", tiny_folder, "sd15", *overrides))
