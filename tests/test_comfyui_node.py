"""The ComfyUI node on ComfyUI's interface: its Euler steps are those of our enhanced Euler scheduler."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from lora_dae.config import ConfigError
from lora_dae.enhancement.files import save_enhancement
from lora_dae.enhancement.hook import enhance_scheduler
from lora_dae.enhancement.module import EnhancementModule

FOLDER = Path(__file__).parent.parent / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def node() -> ModuleType:
    """Imported as ComfyUI does: a folder of custom_nodes, by its path."""
    places = [str(FOLDER)]
    spec = importlib.util.spec_from_file_location(
        "lora_dae_node", FOLDER / "__init__.py", submodule_search_locations=places
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lora_dae_node"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = EnhancementModule()
    torch.nn.init.normal_(module.gain.output.weight)
    torch.nn.init.normal_(module.gain.output.bias)
    return save_enhancement(module, tmp_path / "enhancement.safetensors")


class Sampling:
    """``model_sampling`` of an epsilon model: percent of the timesteps to sigma."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 999999999.9
        return 0.0 if percent >= 1 else float(self.sigmas[int((1 - percent) * (len(self.sigmas) - 1))])


class Model:
    """The three members of ComfyUI's ModelPatcher that a node uses."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.functions = sampling, list[Any]()

    def clone(self) -> Model:
        return Model(self.sampling)

    def get_model_object(self, name: str) -> Sampling:
        assert name == "model_sampling"
        return self.sampling

    def set_model_sampler_post_cfg_function(self, function: Any) -> None:
        self.functions.append(function)


def noise_of(sample: Tensor, shift: float) -> Tensor:
    """Stand-in for the network, on normalized samples."""
    return (sample * 0.9 + shift).tanh()


def ours(file: Path, start: Tensor, steps: int, strength: float) -> Tensor:
    from lora_dae.enhancement.files import load_enhancement

    scheduler: Any = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler = enhance_scheduler(scheduler, load_enhancement(file), strength)
    scheduler.set_timesteps(steps)
    x = start * scheduler.sigmas[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(x, t)
            conditional, plain = noise_of(inputs, 0.1), noise_of(inputs, 0.0)
            scheduler.set_conditional(conditional)
            x = scheduler.step(plain + 3 * (conditional - plain), t, x).prev_sample
    return x


def comfy(functions: list[Any], start: Tensor, steps: int) -> Tensor:
    """Euler as k-diffusion has it, with ComfyUI's call after guidance."""
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas
    x = start * sigmas[0]
    for k in range(steps):
        sigma = sigmas[k]
        inputs = x / (sigma**2 + 1) ** 0.5
        conditional, plain = (x - sigma * noise_of(inputs, shift) for shift in (0.1, 0.0))
        args = {
            "denoised": plain + 3 * (conditional - plain),
            "cond_denoised": conditional,
            "uncond_denoised": plain,
            "sigma": sigma.expand(len(x)),
            "input": x,
            "model_options": {"transformer_options": {"sample_sigmas": sigmas}},
        }
        for function in functions:
            args["denoised"] = function(args)
        x = x + (x - args["denoised"]) / sigma * (sigmas[k + 1] - sigma)
    return x


def patched(node: ModuleType, file: Path, **widgets: Any) -> list[Any]:
    values = {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0, "first_order": True, **widgets}
    sigmas = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).sigmas
    model = Model(Sampling(sigmas.flip(0)[1:]))
    (clone,) = node.NODE_CLASS_MAPPINGS["LoraDaeEnhancement"]().apply(model, str(file), **values)
    assert not model.functions  # the model that came in stays as it is
    return clone.functions


def test_draws_what_the_enhanced_scheduler_draws(node: ModuleType, file: Path) -> None:
    start = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, plain = ours(file, start, 8, 0.8), comfy([], start, 8)
    torch.testing.assert_close(comfy(patched(node, file), start, 8), expected, rtol=1e-3, atol=1e-3)
    assert (expected - plain).abs().max() > 0.1


def test_off_is_off(node: ModuleType, file: Path) -> None:
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = comfy([], start, 6)
    for widgets in ({"strength": 0.0}, {"start_percent": 1.0}, {"end_percent": 0.0}):
        assert torch.equal(comfy(patched(node, file, **widgets), start, 6), plain), widgets
    half = comfy(patched(node, file, start_percent=0.8), start, 6)
    assert not torch.equal(half, plain) and not torch.equal(half, comfy(patched(node, file), start, 6))


def test_wrong_file_is_one_sentence(node: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no enhancement file"):
        patched(node, tmp_path / "nowhere.safetensors")


def test_workflow_fits_the_node(node: ModuleType) -> None:
    """Every input that the workflow gives is a widget or a link of the node, and none is missing."""
    flow = json.loads((FOLDER / "workflow.json").read_text())
    used = [step for step in flow.values() if step["class_type"] in node.NODE_CLASS_MAPPINGS]
    assert len(used) == 1
    wanted = node.NODE_CLASS_MAPPINGS["LoraDaeEnhancement"].INPUT_TYPES()["required"]
    assert used[0]["inputs"].keys() == wanted.keys()
    links = [v for step in flow.values() for v in step["inputs"].values() if isinstance(v, list)]
    assert all(link[0] in flow for link in links)


def test_a_file_without_a_gain_is_no_silent_node(node: ModuleType, tmp_path: Path) -> None:
    """A run whose judging has kept no gain has source texture alone."""
    texture = save_enhancement(EnhancementModule(max_log_gain=0, source_channels=4), tmp_path / "texture.safetensors")
    with pytest.raises(ConfigError, match=r"texture.safetensors has no gain, the one part that this node adds"):
        patched(node, texture)


def test_a_gain_of_the_direction_term_is_none_of_x0(node: ModuleType, tmp_path: Path) -> None:
    file = save_enhancement(EnhancementModule(placement="direction"), tmp_path / "direction.safetensors")
    with pytest.raises(ConfigError, match="direction term, which a node cannot"):
        node.LoraDaeEnhancement().apply(Model(Sampling(torch.ones(2))), str(file), 1.0, 0.0, 1.0, True)


def test_a_file_that_was_written_anew_is_read_anew(node: ModuleType, file: Path, tmp_path: Path) -> None:
    """ComfyUI runs a node again where IS_CHANGED says another value; the model is no argument of it, or None."""
    changed = node.NODE_CLASS_MAPPINGS["LoraDaeEnhancement"].IS_CHANGED
    widgets = {"strength": 0.8, "start_percent": 0.0, "end_percent": 1.0, "first_order": True}
    os.utime(file, (1000, 1000))
    before = changed(enhancement=str(file), **widgets)
    assert changed(enhancement=str(file), model=None, **widgets) == before
    os.utime(file, (2000, 2000))
    assert changed(enhancement=str(file), **widgets) != before
    assert changed(enhancement=str(tmp_path / "nowhere.safetensors"), **widgets) != before
