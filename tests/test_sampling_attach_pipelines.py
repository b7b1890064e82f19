"""attach() on every pipeline class it names, with a source photo, offloaded models, and in several threads at once."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import accelerate.hooks
import numpy as np
import pytest
import torch
from adapter_models import randomize
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from family_models import write_backbone
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_dae
from lora_dae.adapter.files import save_adapter
from lora_dae.adapter.inject import inject
from lora_dae.adapter.source_input import FILE_NAME as SOURCE_FILE
from lora_dae.adapter.source_input import attach_source_input, get_source_input, save_source_input
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig, ConfigError
from lora_dae.data.square import Framing
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.module import EnhancementModule

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 40, 3), np.uint8))
SQUARE = {"height": 32, "width": 32}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd15": (StableDiffusionPipeline, SQUARE),
    "sd15-img2img": (StableDiffusionImg2ImgPipeline, {"image": PHOTO, "strength": 0.8}),
    "sd15-inpaint": (StableDiffusionInpaintPipeline, {"image": PHOTO, "mask_image": PHOTO.convert("L"), **SQUARE}),
    "sd15-controlnet": (StableDiffusionControlNetPipeline, {"image": PHOTO}),
    "sdxl": (StableDiffusionXLPipeline, SQUARE),
    "sdxl-img2img": (StableDiffusionXLImg2ImgPipeline, {"image": PHOTO, "strength": 0.8}),
    "sdxl-inpaint": (StableDiffusionXLInpaintPipeline, {"image": PHOTO, "mask_image": PHOTO.convert("L"), **SQUARE}),
    "sdxl-controlnet": (StableDiffusionXLControlNetPipeline, {"image": PHOTO}),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter folders of random weights by family: LoRA, source input, and an enhancement that reads the source."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for family in ("sd15", "sdxl"):
        unet = load_backbone(BackboneConfig(path=str(write_backbone(root / f"{family}_base", family)))).unet
        attach_source_input(unet)
        inject(unet, AdapterConfig(["cross_attention", "conv"], rank=2))
        randomize(unet)
        module = EnhancementModule(source_channels=4, decoder=True)
        module.requires_grad_(True)
        randomize(module)
        found[family] = root / family
        save_adapter(unet, found[family])
        save_source_input(unet, found[family])
        save_enhancement(module, found[family] / "enhancement.safetensors")
    return found


def test_a_source_is_refused_with_perturbed_attention(adapters: dict[str, Path]) -> None:
    """Its third branch has no place for one; without the photo, and without that guidance, it draws."""
    base, quick = adapters["sd15"].parent / "sd15_base", {**SQUARE, "num_inference_steps": 2, "output_type": "np"}
    pipe = StableDiffusionPAGPipeline.from_pretrained(base, safety_checker=None, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    lora_dae.attach(pipe, adapters["sd15"])
    with pytest.raises(ConfigError, match="give pag_scale=0, or no source"):
        pipe("a shirt", source=PHOTO, **quick)
    pipe("a shirt", **quick)
    pipe("a shirt", source=PHOTO, pag_scale=0.0, **quick)


def build(case: str, adapters: dict[str, Path]) -> Any:
    """A plain pipeline of this case."""
    family, cls = case.split("-")[0], CASES[case][0]
    base = adapters[family].parent / f"{family}_base"
    parts = {}
    if case.endswith("controlnet"):
        unet = load_backbone(BackboneConfig(path=str(base))).unet
        torch.manual_seed(0)
        parts["controlnet"] = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
        for block in [*parts["controlnet"].controlnet_down_blocks, parts["controlnet"].controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.1)  # zero at first, and without any effect
    pipe = cls.from_pretrained(base, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, case: str, **more: Any) -> np.ndarray:
    usual = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    return pipe("a red dress", generator=torch.Generator().manual_seed(0), **{**usual, **CASES[case][1], **more}).images


@pytest.mark.parametrize("case", CASES)
def test_every_part_acts_and_detaching_leaves_nothing(case: str, adapters: dict[str, Path]) -> None:
    pipe = build(case, adapters)
    before = draw(pipe, case)
    reference = build(case, adapters)
    reference.load_lora_weights(adapters[case.split("-")[0]])
    lora = draw(reference, case)
    lora_dae.attach(pipe, adapters[case.split("-")[0]], strength=0.5)
    assert np.array_equal(draw(pipe, case, enhancement_strength=0.0), lora)  # that is plain diffusers with the LoRA
    shown = [draw(pipe, case), draw(pipe, case, source=PHOTO), draw(pipe, case, source=OTHER)]
    seen = [before, lora, *shown, draw(pipe, case, source=OTHER, enhancement_strength=0.0)]
    for k, one in enumerate(seen):
        assert np.isfinite(one).all() and not any(np.array_equal(one, other) for other in seen[:k])
    assert np.array_equal(draw(lora_dae.detach(pipe), case), before)


@pytest.mark.parametrize("case", ["sd15", "sdxl", "sd15-img2img"])
def test_trust_is_by_each_prompt_and_its_source(case: str, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Asked once a call, of the conditional half of the text; no trust is no source texture, full trust all of it."""
    family = case.split("-")[0]
    pipe = lora_dae.attach(build(case, adapters), adapters[family])
    module = pipe._lora_dae.module
    module.agreement = torch.nn.Identity()
    module.decoder = None  # with no trust it still knows where the source's patches are
    prompts = {"prompt": ["a red dress", "a blue coat"], "num_images_per_prompt": 2}
    usual = {"num_inference_steps": 3, "output_type": "np", **CASES[case][1], "source": [PHOTO, OTHER], **prompts}
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def images(trust: float | None, **more: Any) -> np.ndarray:
        def told(text: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
            asked.append((text, source))
            return None if trust is None else torch.full((len(text),), trust)

        module.trust = told
        return pipe(**{**usual, **more}, generator=torch.Generator().manual_seed(0)).images

    plain, whole = images(None, guidance_scale=2.0), images(1.0, guidance_scale=2.0)
    assert np.array_equal(plain, whole) and len({len(text) for text, _ in asked}) == 1
    (text, source) = asked[0]
    options = {"device": "cpu", "num_images_per_prompt": 2, "do_classifier_free_guidance": False}
    embedded = pipe.encode_prompt(prompt=prompts["prompt"], **options)[0]
    assert torch.equal(text, embedded) and len(source) == 4
    assert torch.equal(source[0], source[1]) and not torch.equal(source[1], source[2])
    texture, module.texture = module.texture, None
    without = images(None, guidance_scale=2.0)
    module.texture = texture
    assert np.array_equal(images(0.0, guidance_scale=2.0), without) and not np.array_equal(without, whole)
    asked.clear()
    images(1.0, guidance_scale=1.0)
    assert torch.equal(asked[0][0], embedded)


def test_callback_sees_every_step_and_may_change_it(adapters: dict[str, Path]) -> None:
    pipe = lora_dae.attach(build("sd15", adapters), adapters["sd15"])
    steps: list[int] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if step == 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    plain = draw(pipe, "sd15", source=PHOTO)
    changed = draw(pipe, "sd15", source=PHOTO, callback_on_step_end=stop)
    assert steps == sorted(steps) and len(steps) >= 3 and not np.array_equal(plain, changed)


def test_failed_call_leaves_nothing_behind(adapters: dict[str, Path]) -> None:
    """Stopped in the middle of sampling: the next call draws as before, and detaching is exact."""
    pipe = build("sd15", adapters)
    before, scheduler = draw(pipe, "sd15"), pipe.scheduler
    lora_dae.attach(pipe, adapters["sd15"], strength=0.5)
    expected = draw(pipe, "sd15", source=PHOTO)

    class StoppedError(Exception):
        pass

    def stop(*args: Any) -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        draw(pipe, "sd15", source=PHOTO, callback_on_step_end=stop)
    assert pipe.scheduler is scheduler
    assert np.array_equal(draw(pipe, "sd15", source=PHOTO), expected)
    assert np.array_equal(draw(lora_dae.detach(pipe), "sd15"), before)


def test_one_source_per_prompt_and_several_images_of_each(adapters: dict[str, Path]) -> None:
    """In one batch what each gives alone, from the same noise."""
    pipe = lora_dae.attach(build("sd15", adapters), adapters["sd15"], strength=0.5)
    pairs = [("a red dress", PHOTO), ("a blue shirt", OTHER)]
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    usual = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", **SQUARE}
    prompts, photos = (list(column) for column in zip(*pairs, strict=True))
    together = pipe(prompts, source=photos, latents=noise, num_images_per_prompt=2, **usual).images
    for k, image in enumerate(together):
        prompt, photo = pairs[k // 2]
        alone = pipe(prompt, source=photo, latents=noise[k : k + 1], **usual).images[0]
        np.testing.assert_allclose(image, alone, rtol=0, atol=1e-3)
    for other in together[1:]:
        assert not np.allclose(together[0], other, rtol=0, atol=2e-3)


@pytest.mark.parametrize("first", ["attach", "offload"])
@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_offloaded_models_draw_the_same_with_a_source(
    first: str, case: str, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """enable_model_cpu_offload() before and after; a CPU stands in for the accelerator, the hooks are accelerate's."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    expected = draw(lora_dae.attach(build(case, adapters), adapters[case]), case, source=PHOTO)
    fetched: list[Any] = []
    original = accelerate.hooks.CpuOffload.pre_forward

    def note(self: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        fetched.append(module)
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", note)
    pipe = build(case, adapters)
    if first == "offload":
        pipe.enable_model_cpu_offload()
    lora_dae.attach(pipe, adapters[case])
    if first == "attach":
        pipe.enable_model_cpu_offload()
    assert np.array_equal(draw(pipe, case, source=PHOTO), expected)
    names = [next(name for name, part in pipe.components.items() if part is module) for module in fetched]
    assert names[0] == "vae"  # for the source, before anything else
    assert {"text_encoder", "unet", "vae"} <= set(names)
    assert np.array_equal(draw(pipe, case, source=PHOTO), expected)  # and once more, from where the models are now


@pytest.mark.parametrize("case", ["sd15", "sdxl"])
def test_layers_that_are_offloaded_one_by_one_draw_the_same_with_a_source(
    case: str, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """enable_sequential_cpu_offload() before attaching: no weight is anywhere but while its layer is called."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    to_cpu = partial(accelerate.cpu_offload, execution_device=torch.device("cpu"))  # accelerate tells the two apart
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: to_cpu(model, **options))
    expected = draw(lora_dae.attach(build(case, adapters), adapters[case]), case, source=PHOTO)
    pipe = build(case, adapters)
    pipe.enable_sequential_cpu_offload()
    assert pipe.unet.conv_in.weight.is_meta
    lora_dae.attach(pipe, adapters[case])
    assert pipe.unet.source_input.conv.weight.is_meta
    np.testing.assert_allclose(draw(pipe, case, source=PHOTO), expected, rtol=0, atol=1e-5)
    assert not np.allclose(draw(pipe, case, source=OTHER), expected, rtol=0, atol=1e-3)  # the photo is seen


def test_an_attach_that_fails_leaves_nothing_behind(adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd15", adapters)
    before, load = draw(pipe, "sd15"), StableDiffusionPipeline.load_lora_weights

    def load_and_fail(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        raise MemoryError

    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", load_and_fail)
    with pytest.raises(MemoryError):
        lora_dae.attach(pipe, adapters["sd15"])
    assert type(pipe) is StableDiffusionPipeline and get_source_input(pipe.unet) is None
    assert not getattr(pipe.unet, "peft_config", None) and np.array_equal(draw(pipe, "sd15"), before)
    monkeypatch.undo()
    lora_dae.attach(pipe, adapters["sd15"])  # there is room for it again


def test_size_comes_from_where_the_pipeline_takes_it(adapters: dict[str, Path]) -> None:
    """By position, by keyword, or from the image: the source is fitted into the same square."""
    pipe = lora_dae.attach(build("sd15", adapters), adapters["sd15"])
    named = draw(pipe, "sd15", source=PHOTO, height=48, width=48)
    usual = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np", "source": PHOTO}
    placed = pipe("a red dress", 48, 48, generator=torch.Generator().manual_seed(0), **usual).images
    assert named.shape == (1, 48, 48, 3) and np.array_equal(named, placed)
    with pytest.raises(ConfigError, match="needs a square image, not 48 x 32"):
        draw(pipe, "sd15", source=PHOTO, height=48)
    pipe = lora_dae.attach(build("sd15-img2img", adapters), adapters["sd15"])
    assert draw(pipe, "sd15-img2img", image=PHOTO.resize((64, 64)), source=PHOTO).shape == (1, 64, 64, 3)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))  # as it also takes its image
    assert draw(pipe, "sd15-img2img", image=latents, source=PHOTO).shape == (1, 32, 32, 3)
    with pytest.raises(ConfigError, match="needs a square image"):
        draw(pipe, "sd15-img2img", image=PHOTO.resize((64, 32)), source=PHOTO)


def test_several_pipelines_serve_at_once(adapters: dict[str, Path]) -> None:
    """Each in a thread of its own, at another strength: bit for bit what each draws alone."""
    cases = [("sd15", 0.3), ("sd15", 1.0), ("sdxl", 0.6)]
    pipes = [lora_dae.attach(build(case, adapters), adapters[case], strength=s) for case, s in cases]

    def several(number: int) -> list[np.ndarray]:
        case = cases[number][0]
        return [draw(pipes[number], case, source=PHOTO if k % 2 else None) for k in range(4)]

    alone = [several(number) for number in range(len(pipes))]
    with ThreadPoolExecutor(len(pipes)) as pool:
        together = list(pool.map(several, range(len(pipes))))
    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_source_photo_is_framed_as_training_framed_most(adapters: dict[str, Path], tmp_path: Path) -> None:
    """A portrait draws what its middle draws, and what is transparent what the run's background draws."""
    shutil.copytree(adapters["sd15"], tmp_path / "cropped")
    file = tmp_path / "cropped" / SOURCE_FILE
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    save_file(tensors, file, {**header, **Framing(whole=False, background="blue").header()})
    pipe = lora_dae.attach(build("sd15", adapters), tmp_path / "cropped")
    cropped = draw(pipe, "sd15", source=OTHER)  # 40 x 50
    assert np.array_equal(cropped, draw(pipe, "sd15", source=OTHER.crop((0, 5, 40, 45))))
    untold = lora_dae.attach(build("sd15", adapters), adapters["sd15"])
    assert not np.array_equal(cropped, draw(untold, "sd15", source=OTHER))
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    for one, color in ((pipe, "blue"), (untold, "white")):
        plain = Image.new("RGB", (32, 32), color)
        assert np.array_equal(draw(one, "sd15", source=clear), draw(one, "sd15", source=plain)), color
