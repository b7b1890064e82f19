"""What the frozen network computes faster is what PyTorch computes."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from adapter_models import TEXT_DIM, randomize, tiny_unet
from torch import Tensor, nn

from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.backbone import precision
from lora_dae.backbone.group_norm import NarrowGroupNorm, quicken_group_norms
from lora_dae.backbone.precision import choose_precision, draws_in_bf16, half_type, round_frozen
from lora_dae.config import AdapterConfig, Config

SHAPES = [(3, 64, 16, 16), (1, 96, 5, 7), (2, 32, 32, 32), (1, 320, 40, 32)]  # few pixels; one sample; many pixels


def test_emulated_bfloat16_is_not_drawn_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 says that it has bfloat16, unless it is asked for its own."""
    for own in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=own: including_emulation or own
        )
        assert half_type(torch.device("cuda")) == (torch.bfloat16 if own else torch.float16)
    assert half_type(torch.device("cpu")) == torch.bfloat16


def norms(channels: int) -> tuple[nn.GroupNorm, nn.GroupNorm]:
    """PyTorch's and the quick one, of the same frozen parameters."""
    theirs = nn.GroupNorm(32, channels, eps=1e-5)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    theirs.requires_grad_(False)
    ours = nn.Sequential(copy.deepcopy(theirs))
    quicken_group_norms(ours)
    assert isinstance(ours[0], NarrowGroupNorm)
    return theirs, ours[0]


def both(norm: nn.GroupNorm, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the input's gradient."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = norm(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quick_group_norm_is_as_near_to_the_exact_one_as_pytorch_s(shape: tuple[int, ...]) -> None:
    """Against float64, far from zero and with a gradient that has a mean: where careless sums would show."""
    torch.manual_seed(0)
    theirs, ours = norms(shape[1])
    x, grad = (
        (scale * torch.randn(shape) + mean).bfloat16().contiguous(memory_format=torch.channels_last)
        for scale, mean in ((2.0, 5.0), (1.0, 0.5))
    )
    exact = both(copy.deepcopy(theirs).double(), x.double(), grad.double())
    for value, torch_s, truth in zip(both(ours, x, grad), both(theirs, x, grad), exact, strict=True):
        assert value.dtype == torch.bfloat16 and value.is_contiguous(memory_format=torch.channels_last)
        error, its_error = ((v.double() - truth).norm() / truth.norm() for v in (value, torch_s))
        assert error < 1.02 * its_error, (error, its_error)


def test_group_norm_stays_pytorch_s_in_float32_in_other_layouts_and_where_it_trains() -> None:
    theirs, ours = norms(64)
    x, grad = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 8, 8)
    channels_last = {"memory_format": torch.channels_last}
    for prepared in (lambda t: t, lambda t: t.contiguous(**channels_last), lambda t: t.bfloat16()):
        for got, expected in zip(both(ours, prepared(x), prepared(grad)), both(theirs, prepared(x), prepared(grad))):  # noqa: B905
            assert torch.equal(got, expected)
    for norm in (theirs, ours):
        norm.requires_grad_()
        moving = x.bfloat16().contiguous(**channels_last).requires_grad_()  # type: ignore[call-overload]
        norm(moving).backward(grad.bfloat16().contiguous(**channels_last))  # type: ignore[call-overload]
    assert ours.weight.grad is not None and theirs.weight.grad is not None
    assert torch.equal(ours.weight.grad, theirs.weight.grad)


def test_wide_groups_are_left_alone() -> None:
    model = nn.Sequential(nn.GroupNorm(32, 512), nn.GroupNorm(2, 8, affine=False), nn.LayerNorm(8))
    quicken_group_norms(model)
    assert not any(isinstance(module, NarrowGroupNorm) for module in model)


@pytest.mark.parametrize("given", [None, "7"])
def test_commands_let_onednn_keep_the_kernels_of_many_sizes(given: str | None) -> None:
    """It looks at the environment when it makes the first one; what the user set stays."""
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    environment = {key: value for key, value in os.environ.items() if key != name}
    code = f"import lora_dae.cli, os; print(os.environ['{name}'])"
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment | ({} if given is None else {name: given}), check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert told.stdout.strip() == (given or "16384")


@pytest.mark.parametrize("kernel", ["fused", "peft"])
def test_weights_that_are_rounded_once_give_the_same_bits(kernel: str) -> None:
    """Predictions and gradients under autocast, which rounds them in every call."""
    unets = []
    for rounded in (False, True):
        unet = tiny_unet()
        torch.manual_seed(5)
        inject(unet, AdapterConfig(rank=2, kernel=kernel))
        randomize(unet)
        if rounded:
            assert round_frozen(unet, "32-true") == 0
            count = round_frozen(unet, "bf16-mixed")
            layers = [m for m in unet.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
            assert count == sum(m.weight.dtype == torch.bfloat16 for m in layers) > 0
        unets.append(unet)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 3, TEXT_DIM)
    outputs = []
    for unet in unets:
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(sample, 500, text).sample
        output.float().square().mean().backward()
        outputs.append(output.detach())
    assert torch.equal(*outputs)
    for (name, one), other in zip(
        trainable_parameters(unets[0]).items(), trainable_parameters(unets[1]).values(), strict=True
    ):
        assert one.dtype == torch.float32 and one.grad is not None and other.grad is not None
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize(("half", "chosen"), [(0.7, "bf16-mixed"), (0.9, "32-true"), (5.0, "32-true")])
def test_auto_takes_bfloat16_where_it_is_clearly_faster(
    half: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def time(dtype: torch.dtype, hopeless: float = math.inf) -> float:
        asked.append((dtype, hopeless))
        return 1.0 if dtype == torch.float32 else half

    monkeypatch.setattr(precision, "_time", time)
    monkeypatch.setattr(precision, "_cpu_gains", functools.cache(precision._cpu_gains.__wrapped__))
    assert [choose_precision("auto", torch.device("cpu")) for _ in range(2)] == [chosen] * 2
    assert asked == [(torch.float32, math.inf), (torch.bfloat16, 3.0)]  # measured once in a process
    assert choose_precision("bf16-mixed", torch.device("cpu")) == "bf16-mixed"
    assert choose_precision("auto", torch.device("mps")) == "32-true"


@pytest.mark.parametrize(
    ("trainer", "halved"),
    [
        ({"precision": "32-true"}, False),
        ({"precision": "16-mixed"}, False),
        ({"precision": "bf16-mixed"}, True),
        ({}, True),
    ],
)
def test_a_run_is_drawn_in_the_precision_that_it_asks_for(
    trainer: dict[str, str], halved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where auto, which is the default, would be bfloat16."""
    monkeypatch.setattr(precision, "_cpu_gains", lambda: True)
    assert draws_in_bf16(Config(run_dir="run", trainer=trainer), torch.device("cpu")) == halved


def test_what_is_emulated_is_not_measured_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(precision, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))  # a second each
    assert precision._time(torch.float32, hopeless=0.5) == 1.0 and next(clock) == 2 * 2
    assert precision._time(torch.float32, hopeless=1.5) == 1.0 and next(clock) == 5 + 2 * 6
