"""The benchmarks measure what they say: steps that train, a floor that does not, and a comparison that knows noise."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import cells_of, write_study
from compose import SHORT
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import __main__ as enhancement
from benchmarks import compare, ddp, evaluation, kinds, models, rows, steps, timing
from lora_dae.adapter.inject import inject, trainable_parameters
from lora_dae.backbone.load import load_backbone
from lora_dae.config import AdapterConfig, BackboneConfig, ConfigError, OptimizerConfig
from lora_dae.enhancement import registration


def parts(tiny_backbone: Path) -> models.Parts:
    backbone = load_backbone(BackboneConfig(name="folder", path=str(tiny_backbone)))
    backbone.unet.requires_grad_(False)
    width = backbone.unet.config["cross_attention_dim"]
    config = CLIPTextConfig(
        vocab_size=500, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    text_encoder = CLIPTextModel(config)
    return models.Parts(
        backbone.unet, backbone.vae, text_encoder.requires_grad_(False), torch.randn(2, 8, 16, 16),
        torch.rand(2, 3, 64, 64), torch.randint(0, 400, (2, 8)), torch.randn(2, 8, width),
    )  # fmt: skip


def test_steps_leave_the_shared_weights_and_their_layout_as_they_are(tiny_backbone: Path) -> None:
    """All rows are made first, as the benchmark makes them: none of them lays out another's weights."""
    found = parts(tiny_backbone)
    before = {k: v.clone() for k, v in found.unet.state_dict().items()}
    made = {name: steps.row(name, found) for name in steps.ROWS}
    weights = {n: s.unet.up_blocks[0].resnets[0].conv1 for n, s in made.items() if isinstance(s, steps.Step)}
    for name, conv in weights.items():
        weight = getattr(conv, "base_layer", conv).weight
        plain = "example" in name or name == "PEFT as it comes"
        assert weight.is_contiguous() == plain and weight.is_contiguous(memory_format=torch.channels_last) != plain
        assert (weight.dtype == torch.bfloat16) == ("example bf16" in name or name == "floor, our kernels")
    for step in made.values():
        step()
        step()
    assert all(torch.equal(v, before[k]) for k, v in found.unet.state_dict().items())
    assert all(v.dtype == torch.float32 for v in found.unet.state_dict().values())
    assert all(p.grad is None for p in found.unet.parameters())


def test_our_rows_layers_are_those_of_peft_and_its_optimizer_that_of_training(tiny_backbone: Path) -> None:
    found = parts(tiny_backbone)
    ours, peft = (steps.row(name, found) for name in ("ours", "PEFT, same layers"))
    assert isinstance(ours, steps.Step) and isinstance(peft, steps.Step)
    names = [list(trainable_parameters(one.unet)) for one in (ours, peft)]
    assert names[0] == names[1] and len(names[0]) > 20
    cfg = OptimizerConfig()
    group = ours.optimizer.param_groups[0]  # type: ignore[union-attr]
    assert (tuple(group["betas"]), group["weight_decay"]) == (tuple(cfg.betas), cfg.weight_decay)
    assert [id(p) for p in group["params"]] == [id(p) for p in trainable_parameters(ours.unet).values()]
    before = [p.detach().clone() for p in group["params"]]
    ours()
    assert all(not torch.equal(p, old) for p, old in zip(group["params"], before, strict=True) if old.abs().sum() == 0)


def test_ours_and_pefts_step_train_the_same(tiny_backbone: Path) -> None:
    """A benchmark of two computations is one of speed only while their results are the same; float32, one step."""
    found, gradients = parts(tiny_backbone), []
    for kernel in ("fused", "peft"):
        unet = found.arranged()
        torch.manual_seed(0)
        inject(unet, AdapterConfig(rank=4, kernel=kernel))
        for p in trainable_parameters(unet).values():
            nn.init.normal_(p, std=0.1)
        steps.Step(unet, lambda: (found.latents, torch.tensor([5, 700]), found.text), None, bf16=False)()
        gradients.append({name: p.grad for name, p in trainable_parameters(unet).items()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)


def test_what_is_said_of_64_gpus_is_what_its_arithmetic_gives() -> None:
    """Each figure of the table, in the digits that it has; alone there is nothing to wait for."""
    text = (Path(ddp.__file__).parent / "ddp.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+) (MB|GB) .*\| ([\d.]+) ms \| ([\d.]+) ms \|$", text, flags=re.MULTILINE)
    assert len(rows) == 4
    for size, unit, *said in rows:
        for nodes, figure in zip((1, 8), said, strict=True):
            found = 1e3 * ddp.projection(float(size) * {"MB": 1e6, "GB": 1e9}[unit], nodes=nodes)
            assert f"{found:.{len(figure.partition('.')[2])}f}" == figure
    assert ddp.projection(1e9, nodes=1, gpus=1) == 0


def test_a_first_call_is_in_no_time_and_all_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the functions move: 100 s in their first call, then 2 s and 3 s."""
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def function(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            clock[0] += seconds if name in calls else 100.0
            calls.append(name)

        return run

    found = timing.timings({"a": function("a", 2.0), "b": function("b", 3.0)}, 3)
    assert found == {"a": [2.0] * 3, "b": [3.0] * 3} and calls == ["a", "b"] * 4


class Normed(nn.Module):
    """A norm out of torch's own operators, inside a function of its own, as a kernel would be written."""

    class GroupNormProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean(-1, keepdim=True)).mul(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.GroupNormProduct.apply(x)


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (nn.Conv2d(32, 32, 3), (8, 32, 32, 32), "convolution"),
        (nn.Linear(512, 512), (512, 512), "matmul"),
        (nn.GroupNorm(4, 32), (8, 32, 32, 32), "norms"),
        (nn.Softmax(-1), (512, 512), "attention"),
        (nn.SiLU(), (512, 512), "elementwise + copies"),
        (Normed(), (512, 512), "norms"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_step_of_one_kind_of_work_is_of_that_kind(module: nn.Module, shape: tuple[int, ...], kind: str) -> None:
    x = torch.randn(shape)
    with torch.no_grad():
        module(x)
        found = kinds.shares(lambda: module(x))
    assert sum(found.values()) == pytest.approx(1) and max(found, key=lambda name: found[name]) == kind


def test_the_command_writes_ratios_and_compare_knows_what_is_noise(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "build", lambda *_: parts(tiny_backbone))
    monkeypatch.setattr(steps, "rates", lambda: {"matmul_gflops": 1.0})  # takes seconds, as each profile does
    monkeypatch.setattr(steps, "PROFILED", ("ours",))
    monkeypatch.setattr(steps, "shares", partial(kinds.shares, calls=1))
    file = tmp_path / "steps.json"
    words = ["--repeats", "2", "--rows", "ours", "PEFT, same layers", "--batch", "2", "3", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["steps", *words])
    steps.main()
    found = json.loads(file.read_text())
    assert [case["title"].split(",")[1] for case in found["cases"]] == [" batch 2", " batch 3"]
    for case in found["cases"]:
        assert case["rows"]["floor"]["of_floor"] == 1 and case["rows"]["ours"]["seconds"] > 0
        assert case["stages"].keys() == set(steps.STAGES) and case["stages"]["backward"] > case["stages"]["zero_grad"]
        assert case["kinds"]["ours"]["convolution"] > 0 and "ours / PEFT, same layers" in case["ratios"]
    ratio = {"of_floor": 1.2, "of_floor_spread": 0.01}
    old = {"a": ratio, "b": {**ratio, "of_floor_spread": 0.1}}
    new = {"a": {**ratio, "of_floor": 1.3}, "b": {"of_floor": 1.3, "of_floor_spread": 0.1}}
    assert {k: v[2] for k, v in compare.moved(old, new).items()} == {"a": True, "b": False}
    monkeypatch.setattr(sys, "argv", ["compare", str(file), str(file)])
    compare.main()
    assert capsys.readouterr().out.count("within noise") == 2 * len(found["cases"][0]["rows"])
    other = tmp_path / "other.json"
    for changed in ({"machine": "another"}, {"cases": [{**found["cases"][0], "title": "another model"}]}):
        other.write_text(json.dumps({**found, **changed}))
        monkeypatch.setattr(sys, "argv", ["compare", str(file), str(other)])
        with pytest.raises(SystemExit, match="like with like"):
            compare.main()


def test_the_evaluations_benchmark_compares_the_folders_way_with_the_bare_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "evaluation.json"
    words = ["--images", "5", "--size", "32", "--repeats", "1", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["evaluation", *words])
    evaluation.main()
    found = json.loads(file.read_text())
    assert found["bare_images_per_second"] > 0 and found["folder_of_bare"] > 0 and found["everything_of_bare"] > 0
    assert found["memory_kB_per_image"] >= 0  # a peak does not fall


def test_registration_is_the_search_and_what_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: dict[str, Callable[[], object]] = {}
    monkeypatch.setattr(
        enhancement,
        "interleaved",
        lambda functions, _: turns.update(functions) or {"unet": 2.0, "search": 3.0, "all": 5.0},
    )
    assert enhancement.registration(1) == {"registration_in_calls_search": 1.5, "registration_in_calls_all": 2.5}
    searched, encoded = list[int](), list[int]()
    plain, encode = registration.register, enhancement.Drawer.encode
    for place in (registration, enhancement):
        monkeypatch.setattr(place, "register", lambda *given: searched.append(len(given[0])) or plain(*given))
    monkeypatch.setattr(
        enhancement.Drawer, "encode", lambda self, photos: encoded.append(len(photos)) or encode(self, photos)
    )
    turns["search"]()
    assert (searched, encoded) == ([32], [])
    turns["all"]()
    assert (searched, encoded) == ([32, 32], [32])


def test_rows_of_a_comparison_are_timed_with_all_their_parts(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each against the row that it is tested against; what is untrained draws as the network without it."""
    monkeypatch.chdir(tmp_path)
    common = json.dumps([*SHORT, "experiment=rank4", f"backbone.path={tiny_backbone}"])
    study = write_study(tmp_path / "study", f"""
title: A study
seeds: [0]
baseline: plain
metrics: [fd_effnet]
common: {common}
cells:
  plain: [enhancement.strength=0]
  ours: [sampling.guidance_scale=1.5, sampling.source_guidance_scale=2]
  frozen: {{overrides: [], row: frozen backbone}}
  text: {{overrides: [conditioning=none, enhancement.strength=0], against: ours}}
""")  # fmt: skip
    found = rows.measure(rows.read_comparison(study), "", 2, 1)
    assert {n: (r["against"], r["calls"], r["calls_against"]) for n, r in found.items()} == {
        "ours": ("plain", 6, 4), "frozen": ("plain", 4, 4), "text": ("ours", 4, 6),
    }  # fmt: skip
    assert all(0 < r["low"] <= r["ratio"] <= r["high"] and r["seconds"] > 0 for r in found.values())
    assert set(rows.measure(rows.read_comparison(study), "froz", 2, 1)) == {"frozen"}

    plain, ours, *_ = (one for one in cells_of(study))
    drawer = rows.untrained(ours.cfg, bf16=False)
    module = drawer.enhancement
    assert module is not None and None not in (module.gain, module.texture, module.decoder, module.agreement)
    assert rows.untrained(plain.cfg, bf16=False).enhancement is None
    bare = rows.untrained(replace(plain.cfg, conditioning="none"), bf16=False, frozen=True).backbone.unet
    assert not any("lora" in name for name, _ in bare.named_parameters())
    with pytest.raises(ConfigError, match="--match 'frozn' names no row"):
        rows.measure(rows.read_comparison(study), "frozn", 2, 1)
    module.finest_log_gain = 0.0
    sources = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    without, whole = (drawer.images(["a shirt"] * 2, sources, strength) for strength in (0.0, 1.0))
    assert np.array_equal(without, whole)
