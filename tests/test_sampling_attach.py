"""attach() on pipelines of diffusers: what our own sampler draws, on any scheduler; detach() leaves no trace."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compose import config
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from family_models import write_backbone
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import lora_dae
from lora_dae.adapter.source_input import FILE_NAME as SOURCE_FILE
from lora_dae.config import ConfigError
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.sampling.load import load_run
from lora_dae.training import run as training

SIZE = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 2.0}


def strong(path: Path, **parts: Any) -> None:
    """An enhancement that visibly does something, in place of one trained for a step."""
    torch.manual_seed(0)
    module = EnhancementModule(**parts)
    for part in (module.gain, module.texture, module.decoder):
        if part is not None:
            torch.nn.init.normal_(part.output.weight)
            torch.nn.init.normal_(part.output.bias)
    if module.preview is not None:
        torch.nn.init.normal_(module.preview.weight, std=0.1)
    save_enhancement(module, path / "adapter" / "enhancement.safetensors")


def shown(path: Path) -> None:
    """A source photo that the UNet reacts to, in place of channels trained for a step."""
    file = path / "adapter" / SOURCE_FILE
    with safe_open(file, framework="pt") as opened:
        header, (name,) = opened.metadata(), opened.keys()
        shape = opened.get_tensor(name).shape
    generator = torch.Generator().manual_seed(2)
    save_file({name: 5 * torch.randn(shape, generator=generator)}, file, header)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_backbone: Path) -> dict[str, Path]:
    """Finished runs: captions on SD 1.5 and SDXL, pairs on the tiny backbone."""
    root = tmp_path_factory.mktemp("attach")
    quick = ("trainer.max_steps=2", "adapter.rank=2", "evaluation.frozen=false", "evaluation.num_samples=2",
             "optimizer.learning_rate=0.1", "data.resolution=32", "sampling.guidance_scale=2",
             "sampling.source_guidance_scale=2",
             "sampling.num_inference_steps=3", "sampling.scheduler=ddim")  # fmt: skip
    folder = ("backbone=folder", "data=folder", f"data.root={tiny_folder}", "data.val_fraction=0.25",
              "data.test_fraction=0.25")  # fmt: skip
    found = {}
    for name in ("sd15", "sdxl"):
        found[name] = root / name
        training.run(config(write_backbone(root / f"{name}_base", name), found[name], root / "cache", *folder, *quick))
        strong(found[name])
    found["paired"] = root / "paired"
    training.run(config(tiny_backbone, found["paired"], root / "cache", *quick, "data.train_size=8"))
    strong(found["paired"], source_channels=8, decoder=True, finest_log_gain=0.2)
    shown(found["paired"])
    found["registered"] = root / "registered"
    shutil.copytree(found["paired"], found["registered"])
    strong(found["registered"], source_channels=8, decoder=True, finest_log_gain=0.2, registered=True)
    return found


def pipeline(cls: Any, base: Path, **parts: Any) -> Any:
    pipe = cls.from_pretrained(base, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_of(runs: dict[str, Path], name: str) -> Path:
    return runs[name].parent / f"{name}_base"


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    arguments = {**SIZE, "generator": torch.Generator().manual_seed(0), **arguments}
    if type(pipe).__name__ in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        arguments |= {"height": 32, "width": 32}
    return pipe("a red dress", **arguments).images


@pytest.mark.parametrize(("name", "cls"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
def test_draws_what_our_sampler_draws(name: str, cls: Any, runs: dict[str, Path]) -> None:
    """From the same noise, on DDIM: LoRA and enhancement, largest difference of pixels 2 of 255."""
    run = load_run(runs[name])
    ours = run.drawer(bf16=False).images(["a red dress"], None, 0.7)
    pipe = pipeline(cls, base_of(runs, name))
    pipe.scheduler = DDIMScheduler.from_config(run.backbone.scheduler.config, clip_sample=False)
    plain = draw(pipe)
    assert lora_dae.attach(pipe, runs[name] / "adapter", strength=0.7) is pipe
    seed = run.cfg.sampling.seed
    noise = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(seed * 1_000_003))[None]
    theirs = draw(pipe, latents=noise)
    assert np.abs(np.round(theirs * 255) - ours).max() <= 2
    assert not np.allclose(draw(pipe), plain, atol=1e-3)


@pytest.mark.parametrize(("name", "cls"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
def test_detach_is_bit_exact(name: str, cls: Any, runs: dict[str, Path]) -> None:
    pipe = pipeline(cls, base_of(runs, name))
    before, weights = draw(pipe), copy.deepcopy(pipe.unet.state_dict())
    lora_dae.attach(pipe, runs[name] / "adapter")
    assert not np.array_equal(draw(pipe), before)
    lora_dae.detach(pipe)
    assert type(pipe) is cls
    assert np.array_equal(draw(pipe), before)
    after = pipe.unet.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[k], weights[k]) for k in weights)
    assert lora_dae.detach(pipe) is pipe  # nothing more to undo


@pytest.mark.parametrize(("name", "cls"), [("sd15", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
def test_merged_draws_the_same_and_detaches_exactly(name: str, cls: Any, runs: dict[str, Path]) -> None:
    """Largest difference of pixels 1e-3 (of 1)."""
    pipe = pipeline(cls, base_of(runs, name))
    before = draw(pipe)
    lora_dae.attach(pipe, runs[name] / "adapter", strength=0.6)
    expected = draw(pipe)
    lora_dae.attach(lora_dae.detach(pipe), runs[name] / "adapter", strength=0.6, merged=True)
    assert not any(layer.training for layer in pipe.unet.modules())  # as a pipeline's UNet is
    np.testing.assert_allclose(draw(pipe), expected, rtol=0, atol=1e-3)
    assert np.array_equal(draw(pipe), draw(pipe))
    assert np.array_equal(draw(lora_dae.detach(pipe)), before)


def test_strength_per_call_and_swapped_schedulers(runs: dict[str, Path]) -> None:
    pipe = pipeline(StableDiffusionPipeline, base_of(runs, "sd15"))
    lora_dae.attach(pipe, runs["sd15"] / "adapter", strength=0.6)
    for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        own, off = draw(pipe), draw(pipe, enhancement_strength=0.0)
        assert not np.array_equal(own, off)
        assert np.array_equal(own, draw(pipe, enhancement_strength=0.6))
        assert type(pipe.scheduler) is scheduler
    reference = pipeline(StableDiffusionPipeline, base_of(runs, "sd15"), scheduler=pipe.scheduler)
    reference.load_lora_weights(runs["sd15"] / "adapter")
    assert np.array_equal(draw(reference), off)  # strength 0 is plain diffusers with the LoRA


def test_batches_callbacks_and_no_guidance(runs: dict[str, Path]) -> None:
    pipe = lora_dae.attach(pipeline(StableDiffusionPipeline, base_of(runs, "sd15")), runs["sd15"] / "adapter")
    seen = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].shape[0])
        return tensors

    noise = torch.randn(2, 4, 16, 16)
    both = pipe(
        ["a red dress", "a blue shirt"], latents=noise, callback_on_step_end=note, height=32, width=32, **SIZE
    ).images
    assert set(seen) == {2}
    second = pipe("a blue shirt", latents=noise[1:], height=32, width=32, **SIZE).images
    np.testing.assert_allclose(both[1:], second, atol=1e-4)
    on, off = (draw(pipe, guidance_scale=1.0, enhancement_strength=s) for s in (1.0, 0.0))
    assert not np.array_equal(on, off)


def test_image_to_image_inpainting_and_controlnet(runs: dict[str, Path]) -> None:
    base, adapter = base_of(runs, "sd15"), runs["sd15"] / "adapter"
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    control = ControlNetModel.from_unet(
        pipeline(StableDiffusionPipeline, base).unet, conditioning_embedding_out_channels=(8, 8)
    )
    square = {"height": 32, "width": 32}
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (StableDiffusionImg2ImgPipeline, {}, {"image": photo, "strength": 0.8}),
        (StableDiffusionInpaintPipeline, {}, {"image": photo, "mask_image": photo.convert("L"), **square}),
        (StableDiffusionControlNetPipeline, {"controlnet": control}, {"image": photo, **square}),
    ]  # fmt: skip
    for cls, parts, arguments in cases:
        pipe = pipeline(cls, base, **parts)
        before = draw(pipe, **arguments)
        lora_dae.attach(pipe, adapter)
        on, off = draw(pipe, **arguments), draw(pipe, **arguments, enhancement_strength=0.0)
        assert not np.array_equal(on, off) and not np.array_equal(off, before), cls
        assert np.array_equal(draw(lora_dae.detach(pipe), **arguments), before), cls


@pytest.mark.parametrize("name", ["paired", "registered"])
def test_source_photo(name: str, runs: dict[str, Path], tiny_backbone: Path) -> None:
    """With source and text guided alike: what our sampler draws from the same photo and noise, with every part.

    Latents are compared too, as this decoder shows little of what they differ in.
    """
    run = load_run(runs[name])
    module = run.enhancement
    assert (
        module is not None and None not in (module.gain, module.texture, module.decoder) and module.finest_log_gain > 0
    )
    photo = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    drawer = run.drawer(bf16=False)
    ours = drawer.images(["a red dress"], photo[None], 0.5)
    pipe = pipeline(StableDiffusionPipeline, tiny_backbone)
    before = draw(pipe)
    lora_dae.attach(pipe, runs[name] / "adapter", strength=0.5)
    noise = torch.randn((8, 8, 8), generator=torch.Generator().manual_seed(run.cfg.sampling.seed * 1_000_003))[None]
    theirs = draw(pipe, latents=noise, source=Image.fromarray(photo))
    assert np.abs(np.round(theirs * 255) - ours).max() <= 2
    assert not np.allclose(theirs, draw(pipe, latents=noise), atol=1e-3)
    for strength in (0.0, 0.5):
        latents = drawer.latents(["a red dress"], photo[None], strength, [0])
        arguments = {"latents": noise, "enhancement_strength": strength, "output_type": "latent"}
        torch.testing.assert_close(draw(pipe, source=photo, **arguments), latents, rtol=0, atol=5e-3)
        assert float((draw(pipe, **arguments) - latents).abs().max()) > 0.1  # what the photo does
    with pytest.raises(ConfigError, match="2 photos for 1 images"):
        draw(pipe, source=[photo, photo])
    with pytest.raises(ConfigError, match="source is a str"):
        draw(pipe, source="photo.jpg")
    assert np.array_equal(draw(lora_dae.detach(pipe)), before)


def test_the_term_that_the_module_learned_to_edit_is_the_default(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["sd15"], tmp_path / "run")
    strong(tmp_path / "run", placement="direction")
    drawn = {}
    for placement in (None, "direction", "prediction"):
        pipe = pipeline(StableDiffusionPipeline, base_of(runs, "sd15"))
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        lora_dae.attach(pipe, tmp_path / "run" / "adapter", placement=placement)
        drawn[placement] = draw(pipe)
    assert np.array_equal(drawn[None], drawn["direction"]) and not np.array_equal(drawn[None], drawn["prediction"])


def test_two_pipelines_do_not_know_of_each_other(runs: dict[str, Path]) -> None:
    one, other = (pipeline(StableDiffusionPipeline, base_of(runs, "sd15")) for _ in range(2))
    before = draw(other)
    lora_dae.attach(one, runs["sd15"] / "adapter")
    assert np.array_equal(draw(other), before)


def test_mistakes(runs: dict[str, Path], tiny_backbone: Path, tmp_path: Path) -> None:
    pipe = pipeline(StableDiffusionPipeline, base_of(runs, "sd15"))
    with pytest.raises(ConfigError, match="object has no UNet and scheduler"):
        lora_dae.attach(object(), tmp_path)
    with pytest.raises(ConfigError, match="no adapter in"):
        lora_dae.attach(pipe, tmp_path)
    for name in ("unet", "peft_adapter.safetensors"):  # of a full fine-tuning, of LoHa and LoKr
        (tmp_path / name).touch()
        with pytest.raises(ConfigError, match=f"holds no LoRA but {name}.*export.py format=merged"):
            lora_dae.attach(pipe, tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match="backbone"):
        lora_dae.attach(pipe, runs["sdxl"] / "adapter")
    with pytest.raises(ConfigError, match="not a finite number"):
        lora_dae.attach(pipe, runs["sd15"] / "adapter", strength=-1)
    assert not getattr(pipe.unet, "peft_config", None)  # a refused attach leaves nothing behind
    lora_dae.attach(pipe, runs["sd15"] / "adapter")
    with pytest.raises(ConfigError, match="attached already"):
        lora_dae.attach(pipe, runs["sd15"] / "adapter")
    with pytest.raises(ConfigError, match="captions alone"):
        draw(pipe, source=np.zeros((32, 32, 3), np.uint8))


def test_a_strength_is_refused_where_there_is_no_enhancement(runs: dict[str, Path], tmp_path: Path) -> None:
    """As sample.py does; attach's own default is no request."""
    shutil.copytree(runs["sd15"] / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "enhancement.safetensors").unlink()
    pipe = lora_dae.attach(pipeline(StableDiffusionPipeline, base_of(runs, "sd15")), tmp_path / "adapter")
    assert np.array_equal(draw(pipe), draw(pipe, enhancement_strength=0.0))
    with pytest.raises(ConfigError, match="trained without enhancement: leave enhancement_strength out"):
        draw(pipe, enhancement_strength=0.8)
