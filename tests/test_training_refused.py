"""What cannot be trained is refused in one sentence, before anything is begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compose import config
from diffusers import DDIMScheduler

from lora_dae.config import Config, ConfigError
from lora_dae.rules import check
from lora_dae.sampling.load import load_run
from lora_dae.training import run as training

Make = Callable[..., Config]


@pytest.fixture
def make(tiny_backbone: Path, tmp_path: Path) -> Make:
    return lambda *overrides: config(tiny_backbone, tmp_path / "run", tmp_path / "cache", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter.rank=0",), "adapter.rank=0"),
        (("evaluation.first_pair=5",), "the test split, to evaluate on, has 1 images from number 5 on"),
        (("evaluation.split=train",), "evaluation.split=train"),
        (
            ("evaluation.wrong_source=true", "conditioning=none", "enhancement=gain"),
            "shows another pair's source photo",
        ),
        (("adapter.rank=4096",), "4096"),
        (("enhancement.strength=-1",), "enhancement.strength=-1"),
        (("adapter.targets=[everything]",), "adapter.targets=everything"),
        (("data=folder", "data.root=null"), "data.root"),
        (("data=folder", "data.root=nowhere"), "nowhere"),
        (("data.resolution=60",), "60"),
        (("backbone.path=nowhere",), "nowhere"),
        (("sampling.scheduler=magic",), "magic"),
        (("ckpt_path=nowhere.ckpt",), "nowhere.ckpt"),
        (("ckpt_path=last",), "checkpoints"),
        (("tracking.wandb=loud",), "tracking.wandb=loud"),
        (("enhancement=direction", "sampling.scheduler=dpm++"), "direction"),
        (("conditioning=telepathy",), "telepathy"),
        (("data.difficulty=impossible",), "impossible"),
        (("objective.caption_dropout=1.5",), "caption_dropout"),
        (("trainer.max_steps=0",), "max_steps"),
        (("trainer.max_steps=null",), "trainer.max_steps=None is no number of steps"),
        (("trainer.val_check_interval=0.5",), "trainer.val_check_interval=0.5 counts steps"),
        (("sampling.num_inference_steps=1000",), "sampling.num_inference_steps=1000"),
        (("enhancement.judged_steps=1000",), "enhancement.judged_steps=1000"),
        (("enhancement.steps_range=[1,5]",), "enhancement.steps_range"),
        (("enhancement.steps_range=[8,1000]",), "enhancement.steps_range"),
        (("enhancement.guidance_range=[5,1]",), "enhancement.guidance_range"),
        (("enhancement.joint=true", "conditioning=none"), "enhancement.joint=true"),
        (("enhancement.losses=[beauty]",), "enhancement.losses=beauty"),
        (("enhancement.losses=[edges]",), "nothing to learn from"),
        (("backbone.gradient_checkpointing=some",), "backbone.gradient_checkpointing=some"),
        (("backbone.attention=flash",), "backbone.attention=flash"),
        (("adapter.alpha=0",), "adapter.alpha=0.0 leaves the adapter nothing"),
        (("adapter.conv_alpha=nan",), "adapter.conv_alpha=nan leaves the adapter nothing"),
        (("data.max_images=-5",), "data.max_images=-5 is below 1"),
        (("enhancement.decoder_learning_rate=-1",), "enhancement.decoder_learning_rate=-1.0 is below 0"),
        (("tracking.num_grid_prompts=0",), "tracking.num_grid_prompts=0 is below 1"),
        (("trainer.precision=bf16-true",), "trainer.precision=bf16-true is unknown"),
        (("trainer.early_stop_patience=3", "trainer.val_check_interval=1"), "early_stop_patience=3 cannot stop 4"),
        (("tracking.distance_every_n_steps=4",), "distance_every_n_steps=4 never comes in 4 steps"),
        (("trainer.devices=0",), r"trainer\.\* does not fit lightning.Trainer or this machine .*devices=0"),
        (("+trainer.strategy=nonsense",), "invalid strategy name: `strategy='nonsense'`"),
        (("+trainer.nonsense=1",), "unexpected keyword argument 'nonsense'"),
        pytest.param(
            ("trainer.accelerator=gpu",),
            "No supported gpu backend found",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (("+trainer.limit_train_batches=2",), "trainer.limit_train_batches cannot be given here"),
        (("enhancement=direction", "enhancement.gain=false"), "placement=direction edits by the gain"),
        (("enhancement.placement=direction", "sampling.scheduler=ddim"), "no place for the source photo's texture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(overrides: tuple[str, ...], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        training.run(make(*overrides))
    assert "\n" not in str(caught.value)
    assert not Path(make().run_dir).exists()  # nothing was begun


@pytest.mark.parametrize(
    "override", ["sampling.num_inference_steps=61", "enhancement.judged_steps=61", "enhancement.steps_range=[60,62]"]
)
def test_steps_that_the_noise_schedule_does_not_have_are_refused_first(
    override: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' trailing spacing rounds 61 to one step too many."""
    trailing = DDIMScheduler(timestep_spacing="trailing")
    monkeypatch.setattr(training, "load_scheduler", lambda folder: trailing)
    with pytest.raises(ConfigError, match=f"^{override.split('=')[0]}.*no 61 steps.*use 60 or 62"):
        training.run(make(override))
    assert not Path(make().run_dir).exists()


def test_younger_rules_over_training_shut_no_finished_run_out(make: Make) -> None:
    """A direction term beside source texture trained the gain alone once; such runs are drawn with as before."""
    check(make("enhancement.placement=direction", "sampling.scheduler=ddim"), trains=False)
    check(make("enhancement.placement=direction", "sampling.scheduler=ddim", "enhancement.enabled=false"))


def test_a_file_that_only_measuring_needed_shuts_no_drawing_out(make: Make) -> None:
    gone = make("evaluation.lpips=gone.safetensors")
    check(gone, trains=False)
    with pytest.raises(ConfigError, match=r"evaluation.lpips=gone.safetensors does not exist"):
        check(gone)


def test_source_conditioning_needs_pairs(make: Make, tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="conditioning=none"):
        training.run(make("data=folder", f"data.root={tiny_folder}", "conditioning=source"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a finished run"):
        load_run(tmp_path)
