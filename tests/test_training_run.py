"""Whole runs, shortened: resuming is exact, every experiment runs, another run's checkpoint is refused."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose import config
from conftest import write_photos
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from lora_dae.backbone.precision import draws_in_bf16
from lora_dae.config import Config, ConfigError, conf_dir
from lora_dae.rules import check
from lora_dae.sampling.load import load_run
from lora_dae.training import module as training_module
from lora_dae.training import run as training
from lora_dae.training.ended import NonFiniteLossError
from lora_dae.training.module import LoraDae
from lora_dae.training.resume import find_checkpoints

Make = Callable[..., Config]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs of this file: the studio is rendered once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tiny_backbone: Path, tmp_path: Path, cache: Path) -> Make:
    return lambda *overrides, name="run": config(tiny_backbone, tmp_path / name, cache, *overrides)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "adapter").rglob("*.safetensors"))
    return {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}


@pytest.fixture(scope="session")
def finished(tiny_backbone: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished default run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    training.run(config(tiny_backbone, run_dir, cache, "tracking.sample_every_n_steps=2", "evaluation.controls=true"))
    return run_dir


def test_run_folder_holds_what_people_look_for(finished: Path) -> None:
    for name in (
        "config.yaml", "metrics.json", "table.md", "report.html", "csv/metrics.csv",
        "csv/texture/metrics.csv", "csv/decoder/metrics.csv",
        "csv/gain/metrics.csv",
        "samples/grid.png",
        "samples/step_000002.png", "checkpoints/adapter.ckpt", "checkpoints/texture.ckpt", "checkpoints/decoder.ckpt",
        "checkpoints/gain.ckpt", "adapter/README.md",
        "adapter/pytorch_lora_weights.safetensors", "adapter/source_input.safetensors",
        "adapter/enhancement.safetensors", "plots/loss.svg", "plots/band_power.svg",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    table = json.loads((finished / "metrics.json").read_text())
    assert list(table["methods"]) == ["strength 0", "frozen backbone", "strength 1"]
    assert {"fd_effnet", "kd_effnet", "psnr_garment", "ssim_garment", "attr_pattern"} <= set(
        table["methods"]["strength 0"]
    )
    with (finished / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(row.get("val/loss") for row in rows)


def test_two_runs_of_one_seed_are_bit_identical(make: Make, finished: Path) -> None:
    training.run(make("tracking.sample_every_n_steps=2"))
    again = weights(Path(make().run_dir))
    first = weights(finished)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_another_seed_gives_other_weights(make: Make, finished: Path) -> None:
    training.run(make("seed=1"))
    other, first = weights(Path(make().run_dir)), weights(finished)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_checkpoint_holds_trainables_only(finished: Path) -> None:
    checkpoint = torch.load(finished / "checkpoints" / "adapter.ckpt", weights_only=True)
    names = set(checkpoint["state_dict"])
    assert names and all("lora" in n or n.startswith(("enhancement.", "unet.source_input.")) for n in names)


def test_plain_diffusers_draws_with_the_saved_adapter(finished: Path, tiny_backbone: Path) -> None:
    """The LoRA file alone, in a plain pipeline, changes the picture as it does in our own UNet."""
    run = load_run(finished)
    ours = run.drawer(bf16=False).images(["a blue shirt"], None, 0.0)
    assert ours.shape == (1, 64, 64, 3)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_backbone)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        latents = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
        return pipe("a blue shirt", latents=latents, num_inference_steps=2, output_type="latent").images

    base = draw()
    pipe.load_lora_weights(finished / "adapter")
    tuned = draw()
    assert not np.allclose(base, tuned)
    sample, t = torch.randn(2, 8, 16, 16), 500
    text = torch.randn(2, 16, 32)
    with torch.no_grad():
        expected = run.backbone.unet(sample, t, text).sample
        torch.testing.assert_close(pipe.unet(sample, t, text).sample, expected, atol=1e-5, rtol=1e-4)


def test_strength_zero_is_the_run_without_enhancement(finished: Path) -> None:
    run = load_run(finished)
    pairs = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), np.uint8)
    captions = ["a red dress", "a blue shirt"]
    with_module = run.drawer(False).images(captions, pairs, 0.0)
    strong = run.drawer(False).images(captions, pairs, 5.0)
    run.enhancement = None
    assert np.array_equal(with_module, run.drawer(False).images(captions, pairs, 3.0))
    assert not np.array_equal(with_module, strong)


def test_batches_do_not_change_images(finished: Path) -> None:
    run = load_run(finished)
    captions = ["a red dress", "a blue shirt", "a green skirt"]
    together = run.drawer(False).images(captions, None, 0.0)
    run.cfg.sampling.batch_size = 1
    alone = run.drawer(False).images(captions, None, 0.0)
    assert np.abs(together.astype(int) - alone).max() <= 1  # float sums in another order


@pytest.fixture(scope="module")
def paired_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos with a source photo each."""
    root = tmp_path_factory.mktemp("paired_folder")
    write_photos(root, 12)
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["source"] = rows[number - 1]["file_name"]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


RANKS = (4, 8, 16, 32)
EXPERIMENTS = sorted({p.stem for p in (conf_dir() / "experiment").glob("*.yaml")} - {f"rank{r}" for r in RANKS[1:]})


@pytest.mark.parametrize("rank", RANKS)
def test_experiments_of_ranks_differ_in_it_alone(rank: int, make: Make) -> None:
    """So one of them is run."""
    cfg, first = make(f"experiment=rank{rank}"), make(f"experiment=rank{RANKS[0]}")
    check(cfg)
    assert cfg.adapter.rank == rank
    assert replace(cfg, adapter=replace(cfg.adapter, rank=RANKS[0]), name=first.name) == first


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs(experiment: str, make: Make, paired_folder: Path) -> None:
    extra = ["adapter.rank=2"] if experiment != "full_finetune" else []
    extra += ["objective.prior_images=3"] if experiment == "dreambooth" else []
    if experiment.startswith("sd"):  # on the tiny backbone, whose folder stands for the hub's
        extra += [f"data.root={paired_folder}", "data.val_fraction=0.25", "data.test_fraction=0.25"]
        extra += ["trainer.precision=bf16-mixed"]
    cfg = make(f"experiment={experiment}", "trainer.max_steps=1", "evaluation.frozen=false", *extra)
    result = training.run(cfg)
    assert result.table is not None and np.isfinite(result.table.methods["strength 0"]["fd_effnet"].value)
    assert (result.run_dir / "config.yaml").read_text().count(f"name: {experiment}") == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("enhancement=direction",),
        ("adapter=attention", "adapter.use_dora=true"),
        ("sampling.scheduler=dpm++", "adapter.use_rslora=true", "adapter.dropout=0.1", "adapter.init=gaussian"),
        ("data.difficulty=reposed", "objective.min_snr_gamma=0", "optimizer.warmup_steps=0"),
    ],
    ids=lambda o: ",".join(o),
)
def test_other_configs_run(overrides: tuple[str, ...], make: Make) -> None:
    result = training.run(make(*overrides, "trainer.max_steps=1", "evaluation.frozen=false", "adapter.rank=2"))
    assert result.table is not None


def test_full_finetuning_with_source_photos_loads_where_attention_is_measured(make: Make) -> None:
    """The source's channels are part of its first convolution."""
    cfg = make("experiment=full_finetune", "backbone.attention=auto", "trainer.max_steps=1", "enhancement=none")
    training.train(cfg)
    run = load_run(Path(cfg.run_dir))
    assert run.backbone.unet.config["in_channels"] == 2 * run.backbone.latent_channels
    source = np.zeros((1, 64, 64, 3), np.uint8)
    assert run.drawer(bf16=False).images(["a red dress"], source).shape == (1, 64, 64, 3)


def test_folder_of_photos_trains(make: Make, tiny_folder: Path) -> None:
    cfg = make(
        "backbone=folder", "data=folder", f"data.root={tiny_folder}", "trainer.max_steps=1", "adapter.rank=2",
        "data.val_fraction=0.25", "data.test_fraction=0.25", "evaluation.frozen=false",
    )  # fmt: skip
    result = training.run(cfg)
    assert result.table is not None
    assert "attr_color" not in result.table.methods["strength 0"]  # nothing is known about these photos


@pytest.mark.parametrize("every", [1, 10])  # as on a CPU, and as on a GPU
def test_nan_loss_stops_and_keeps_the_last_checkpoint(every: int, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "check_every", lambda device: every)
    original = LoraDae._losses

    def broken(self: LoraDae, batch: dict[str, torch.Tensor], draws: object) -> torch.Tensor:
        losses = original(self, batch, draws)
        return losses * (float("nan") if self.global_step == 3 and self.training else 1.0)

    monkeypatch.setattr(LoraDae, "_losses", broken)
    cfg = make("trainer.val_check_interval=2")
    with pytest.raises(NonFiniteLossError, match=r"step 3 on samples \d+"):
        training.run(cfg)
    checkpoint = torch.load(Path(cfg.run_dir) / "checkpoints" / "adapter.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(v.isfinite().all() for v in checkpoint["state_dict"].values())


def test_no_mishap_in_judging_costs_the_adapter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written first, without an enhancement that nobody has judged."""

    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("too little memory")

    monkeypatch.setattr("lora_dae.training.finish.calibrate_gain", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        training.train(make())
    written = {path.name for path in (Path(make().run_dir) / "adapter").iterdir()}
    assert "pytorch_lora_weights.safetensors" in written and "enhancement.safetensors" not in written
    with pytest.raises(ConfigError, match=r"not finished: it stopped while its enhancement was judged.*ckpt_path=last"):
        load_run(Path(make().run_dir))  # else it would be drawn without one, and called strength 1


def test_sampled_pictures_are_those_of_the_runs_drawer(finished: Path, tmp_path: Path) -> None:
    from rich.console import Console

    from lora_dae.sampling.command import SampleRequest, _strengths, draw_samples

    own = {**dict.fromkeys(SampleRequest.__dataclass_fields__), "run": str(finished), "output": str(tmp_path)}
    asked = {"num_images": 2, "strengths": [0.0, 1.0], "seed": 3, "prompt": "a red dress"}
    grid = draw_samples(SampleRequest(**{**own, **asked}), Console())
    run = load_run(finished)
    drawer = replace(run, cfg=replace(run.cfg, sampling=replace(run.cfg.sampling, seed=3))).drawer(
        draws_in_bf16(run.cfg, torch.device("cpu"))
    )
    for strength in (0.0, 1.0):
        expected = drawer.images(["a red dress"] * 2, None, strength)
        for number in range(2):
            found = np.asarray(Image.open(grid.with_name(f"{grid.stem}_s{strength:g}_{number}.png")))
            assert np.array_equal(found, expected[number])
    assert Image.open(grid).width >= 2 * 256
    strengthless = replace(run.cfg, enhancement=replace(run.cfg.enhancement, placement="none"))
    with pytest.raises(ConfigError, match="trained without enhancement"):
        _strengths(SampleRequest(**{**own, "strength": 0.5}), strengthless)
    assert _strengths(SampleRequest(**own), strengthless) == [0.0]


def test_another_vae_draws_a_finished_run(finished: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    """As a TAESD does for previews: the same latents, decoded by that folder's weights."""
    from rich.console import Console

    from lora_dae.sampling.command import SampleRequest, draw_samples

    other: Any = AutoencoderTiny.from_pretrained(tiny_backbone / "vae")
    latents = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other.decoder.layers[-1].bias.add_(0.3)
        expected = (other.decode(latents / other.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    other.save_pretrained(tmp_path / "vae")
    own, changed = (load_run(finished, vae=vae).backbone.decode(latents) for vae in (None, str(tmp_path / "vae")))
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
    assert (own - changed).abs().max() > 0.01
    asked = {**dict.fromkeys(SampleRequest.__dataclass_fields__), "run": str(finished), "num_images": 1, "example": 0}
    pictures = []
    for vae in (None, str(tmp_path / "vae")):
        request = SampleRequest(**{**asked, "vae": vae, "output": str(tmp_path / "drawn")})  # type: ignore[arg-type]
        pictures.append(np.asarray(Image.open(draw_samples(request, Console()))))
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        (("evaluate.py", "num_samples=3", "strength=0.5", "num_inference_steps=2", "split=val"), "strength 0.5"),
        (
            ("evaluate.py", "num_samples=2", "first_pair=2", "wrong_source=true", "reconstructions=true"),
            "wrong_source=true",
        ),
        (
            (
                "sample.py",
                "prompt='a red dress'",
                "num_images=1",
                "sampling_method=apg",
                "seed=3",
                "strength=0.5",
                "output=here",
            ),
            "images",
        ),
    ],
    ids=["evaluate", "evaluate_otherwise", "sample"],
)
def test_commands_on_a_finished_run(arguments: tuple[str, ...], made: str, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    script, *overrides = arguments
    done = subprocess.run(
        [sys.executable, str(ROOT / script), f"run={copy}", *overrides],
        cwd=tmp_path, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert made in done.stdout
    tables = list(copy.glob("evaluations/*first_pair=2*/metrics.json"))
    assert len(tables) == ("first_pair=2" in overrides)
    for table in tables:
        assert {"fd_effnet_recon", "kd_effnet_recon"} <= set(json.loads(table.read_text())["methods"]["strength 1"])
    assert script != "sample.py" or len(list((tmp_path / "here").glob("seed3_*.png"))) == 2


def test_checkpoint_of_another_config_is_refused(make: Make, finished: Path) -> None:
    last = f"ckpt_path={finished / 'checkpoints' / 'gain.ckpt'}"
    for override, part in (
        ("adapter.rank=3", "adapter"),
        ("enhancement.hidden=8", "enhancement"),
        ("enhancement.gate_inputs=time", "enhancement"),  # of the same shapes
    ):
        with pytest.raises(ConfigError, match=f"was written with another `{part}`") as caught:
            training.run(make(override, last))
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="with optimizer.source_learning_rate=null: give the same"):
        training.run(make("optimizer.source_learning_rate=0.1", last))
    assert list(find_checkpoints(make("backbone.attention=sdpa", last), Path("unused"))) == ["gain"]  # rounding alone


def test_a_module_that_does_not_train_is_no_other_one(make: Make) -> None:
    """Two ways of leaving it out are one training, in the store and for its checkpoints."""
    without = make("enhancement=none")
    training.write_config(without)
    checkpoint = Path(without.run_dir) / "checkpoints" / "adapter.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    again = make("enhancement=gain", "enhancement.placement=none", "ckpt_path=last")
    assert find_checkpoints(again, Path(without.run_dir)) == {"adapter": checkpoint}
    with pytest.raises(ConfigError, match="another `enhancement`"):
        find_checkpoints(make("enhancement=gain", "ckpt_path=last"), Path(without.run_dir))


def test_a_checkpoint_is_of_weights_and_not_of_the_place_where_they_lie(
    make: Make, finished: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    """One bit of the backbone is another backbone; so is a LoRA to begin with where there was none."""
    last = f"ckpt_path={finished / 'checkpoints' / 'gain.ckpt'}"
    shutil.copytree(tiny_backbone, tmp_path / "moved")
    moved = make(f"backbone.path={tmp_path / 'moved'}", last)
    assert list(find_checkpoints(moved, Path("unused"))) == ["gain"]
    weights = tmp_path / "moved" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    begun = make(f"adapter.init_from={finished / 'adapter' / 'pytorch_lora_weights.safetensors'}", last)
    for cfg, part in ((moved, "backbone"), (begun, "adapter.init_from")):
        with pytest.raises(ConfigError, match=f"was written with another `{part}`"):
            training.train(cfg)
    assert not Path(moved.run_dir).exists()


def test_a_config_that_is_cut_in_the_middle_leaves_the_one_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the training could not be gone on with."""
    training.write_config(make())
    path, original = Path(make().run_dir) / "config.yaml", Path.write_text
    before = path.read_text()

    def cut(self: Path, text: str, **options: Any) -> int:
        original(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        training.write_config(make("seed=1"))
    assert path.read_text() == before and list(path.parent.iterdir()) == [path]
