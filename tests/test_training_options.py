"""Options that only count: each trains to other weights, or leaves another file, than its default does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compose import config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from lora_dae.adapter.kohya import KOHYA_FILE
from lora_dae.backbone.layout import inspect_backbone
from lora_dae.config import BackboneConfig, ConfigError
from lora_dae.data.sources import load_splits
from lora_dae.enhancement.files import load_enhancement
from lora_dae.training import run as training
from lora_dae.training import tracking

QUICK = ("adapter.rank=2", "logger=none", "trainer.max_steps=3", "enhancement.max_steps=2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


@pytest.fixture(scope="module")
def usual(tiny_backbone: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run_dir = tmp_path_factory.mktemp("usual") / "run"
    training.train(config(tiny_backbone, run_dir, cache, *QUICK))
    return weights(run_dir)


@pytest.mark.parametrize(
    ("option", "moves"),
    [
        ("optimizer.weight_decay=5", "kohya"),
        ("optimizer.betas=[0.1,0.2]", "kohya"),
        ("optimizer.source_learning_rate=0.1", "source_input"),
        ("optimizer.ema_decay=0", "kohya"),
        ("trainer.gradient_clip_val=1e-6", "kohya"),
        ("data.seed=1", "kohya"),
        ("data.difficulty=shifted", "kohya"),
        ("enhancement.learning_rate=0.1", "enhancement"),
        ("enhancement.decoder_learning_rate=0.1", "enhancement"),
        ("enhancement.gate_inputs=time", "enhancement"),
        ("enhancement.losses=[power]", "enhancement"),
        ("enhancement.max_log_gain=0.2", "enhancement"),
    ],
)
def test_trains_to_other_weights(
    option: str, moves: str, usual: dict[str, torch.Tensor], tiny_backbone: Path, cache: Path, tmp_path: Path
) -> None:
    # An adapter is the same with any module and with none: test_sweep_store.py.
    alone = ("enhancement=none",) if moves == "kohya" else ()
    training.train(config(tiny_backbone, tmp_path / "run", cache, *QUICK, *alone, option))
    found = weights(tmp_path / "run")
    assert found.keys() <= usual.keys()  # a gain of which nothing is kept is not written
    moved = {key for key in found if not torch.equal(found[key], usual[key])}
    assert any(moves in key for key in moved)
    if moves == "enhancement":  # LoRA of a seed is the same with any
        assert not any("kohya" in key for key in moved)


def test_the_module_is_as_large_as_the_config_says(tiny_backbone: Path, cache: Path, tmp_path: Path) -> None:
    options = ("enhancement.levels=2", "enhancement.hidden=8", "enhancement.max_log_gain=0.25")
    training.train(config(tiny_backbone, tmp_path / "run", cache, *QUICK, *options))
    module = load_enhancement(tmp_path / "run" / "adapter" / "enhancement.safetensors")
    assert module.levels == 2 and module.gain is not None
    assert module.gain.max_log_gain == pytest.approx(0.25)
    assert sum(p.numel() for p in module.parameters()) < 20_000


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_may_be_clipped_by_value(precision: str, tiny_backbone: Path, cache: Path, tmp_path: Path) -> None:
    """Adam's first step is the learning rate's size; one of clipped-away gradients is as small as its epsilon."""
    options = ("+trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=1e-12", "enhancement=none",
               "optimizer.weight_decay=0", f"trainer.precision={precision}")  # fmt: skip
    training.train(config(tiny_backbone, tmp_path / "run", cache, *QUICK, *options))
    found = weights(tmp_path / "run")
    assert max(float(v.abs().max()) for k, v in found.items() if "lora_up" in k) < 1e-5


def test_files_are_as_the_export_options_say(tiny_backbone: Path, cache: Path, tmp_path: Path) -> None:
    quick = (*QUICK, "enhancement=none")
    training.train(
        config(tiny_backbone, tmp_path / "half", cache, *quick, "export.dtype=fp16", "export.license=cc-by-4.0")
    )
    file = tmp_path / "half" / "adapter" / KOHYA_FILE
    assert {v.dtype for k, v in load_file(file).items() if "alpha" not in k} == {torch.float16}
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.license"] == "cc-by-4.0"
    training.train(config(tiny_backbone, tmp_path / "without", cache, *quick, "export.kohya=false"))
    assert not (tmp_path / "without" / "adapter" / KOHYA_FILE).exists()


def test_textual_inversion_learns_so_many_words(tiny_backbone: Path, cache: Path, tmp_path: Path) -> None:
    options = ("experiment=textual_inversion", "adapter.words=2", "logger=none", "trainer.max_steps=1")
    training.train(config(tiny_backbone, tmp_path / "run", cache, *options))
    (words,) = [v for k, v in weights(tmp_path / "run").items() if v.ndim == 2 and v.shape[1] == 32 and len(v) == 2]
    assert torch.isfinite(words).all()


def test_layers_of_a_file_that_train_not_are_left_out_if_allowed(
    tiny_backbone: Path, cache: Path, tmp_path: Path
) -> None:
    quick = (*QUICK, "enhancement=none")
    training.train(config(tiny_backbone, tmp_path / "first", cache, *quick))
    begins = (*quick, f"adapter.init_from={tmp_path / 'first' / 'adapter' / KOHYA_FILE}", "adapter.targets=[conv]")
    with pytest.raises(ConfigError, match="adapter.allow_partial"):
        training.train(config(tiny_backbone, tmp_path / "refused", cache, *begins))
    training.train(config(tiny_backbone, tmp_path / "second", cache, *begins, "adapter.allow_partial=true"))
    assert (tmp_path / "second" / "adapter" / KOHYA_FILE).is_file()


def test_photos_are_read_as_the_data_options_say(tiny_backbone: Path, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for k in range(8):
        Image.fromarray(np.full((64, 64, 4), (k, 0, 0, 0), np.uint8)).save(root / f"{k}.png")  # nothing of it is seen
        (root / f"{k}.txt").write_text("a shirt with an anchor")

    def pairs(*options: str) -> list:
        names = ("data=folder", f"data.root={root}", "data.flip=true", "conditioning=none",
                 "data.val_fraction=0.25", "data.test_fraction=0.25")  # fmt: skip
        splits = load_splits(config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *names, *options).data)
        return [splits["train"][i] for i in range(len(splits["train"]))]

    plain = pairs()
    assert all(pair.mirror and (pair.image == 255).all() for pair in plain)
    blue = pairs("data.background=blue", "data.no_flip_words=[anchor]")
    assert all(not pair.mirror and (pair.image == (0, 0, 255)).all() for pair in blue)
    assert {p.id for p in pairs("data.seed=3")} != {p.id for p in plain}


def test_weights_and_biases_is_told_the_project_and_the_kind_of_job(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, object] = {}
    monkeypatch.setattr(tracking, "StagedWandbLogger", lambda **given: told.update(given))
    options = ("tracking.wandb=offline", "tracking.project=dresses", "tracking.job_type=trial", "tracking.group=g")
    cfg = config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *options)
    tracking.wandb_logger(cfg.tracking, tmp_path / "run", {}, training.console)
    assert (told["project"], told["job_type"], told["group"]) == ("dresses", "trial", "g")


def test_a_hub_model_may_come_from_another_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="somebody/their-model"):
        inspect_backbone(BackboneConfig(name="sd15", repo="somebody/their-model"))
