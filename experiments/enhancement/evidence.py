"""Does the enhancement earn its keep? One command, resumable: python -m experiments.enhancement.evidence

For each mode and seed: train `experiment=rank16` (and attention only); choose on the validation split the guidance that
is best for strength 0, then every control's setting at that guidance; then draw all rows on the test split with the
same captions, sources and noise, and measure them against strength 0 with paired intervals. Pictures and trained runs
stay under --work, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.precision import best_device, choose_precision
from lora_dae.cli import typed
from lora_dae.config import Config, conf_dir, register
from lora_dae.data.sources import load_splits
from lora_dae.enhancement import EnhancementModule
from lora_dae.evaluation.attributes.classifier import load_embedded
from lora_dae.evaluation.heldout import HeldOut
from lora_dae.evaluation.metrics.features import load_features, stack_images
from lora_dae.evaluation.metrics.measure import Reference, build_reference, evaluate_images
from lora_dae.evaluation.report.table import MetricValue, paired_difference, verdict
from lora_dae.evaluation.run import write_grid
from lora_dae.sampling.draw import Drawer
from lora_dae.sampling.load import LoadedRun, load_run, prepare_unet
from lora_dae.training.run import train

HERE = Path(__file__).parent
MODES = {
    "text_only": ["conditioning=none"],
    "aligned": ["data.difficulty=aligned"],
    "shifted": ["data.difficulty=shifted"],
    "reposed": ["data.difficulty=reposed"],
}
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
UNSHARP = (0.3, 0.6, 1.0)
FIXED_GAIN = (0.05, 0.1, 0.2)  # log
FREEU = ((1.05, 1.1, 0.9, 0.6), (1.1, 1.2, 0.9, 0.2), (1.2, 1.4, 0.9, 0.2))  # b1, b2, s1, s2
PARTS = {"gain": ("gain",), "source texture": ("texture",), "decoder stage": ("decoder",), "all": ()}
BASE = "strength 0"
console = Console()
Draw = Callable[[HeldOut], np.ndarray]


def config(work: Path, name: str, overrides: list[str]) -> Config:
    """The typed config of one training."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return typed(compose("train", [f"run_dir={work / name}", f"name={name}", "tracking.logger=csv", *overrides]))


def trained(work: Path, name: str, overrides: list[str]) -> LoadedRun:
    """The finished run of this name, trained if it is not there."""
    done = work / name / "trained"  # the adapter's folder is there before it is whole
    if not done.is_file():
        train(config(work, name, overrides))
        done.touch()
    return load_run(work / name, best_device())


def with_parts(run: LoadedRun, parts: tuple[str, ...]) -> EnhancementModule | None:
    """The run's module with these parts alone; all of them for ()."""
    module = copy.deepcopy(run.enhancement)
    for name in ("gain", "texture", "decoder"):
        if module is not None and parts and name not in parts:
            setattr(module, name, None)
    return module


def fixed_gain(log_gain: float) -> EnhancementModule:
    """The same gain everywhere at every step: what learning must beat."""
    module = EnhancementModule(max_log_gain=log_gain)
    assert module.gain is not None
    torch.nn.init.constant_(module.gain.output.bias, 10.0)
    return module.requires_grad_(False)


def unsharp(images: np.ndarray, amount: float) -> np.ndarray:
    """Unsharp masking of radius 1 pixel, uint8 in and out."""
    blurred = np.stack([cv2.GaussianBlur(i, (0, 0), 1.0) for i in images]).astype(np.float32)
    return np.clip(images + amount * (images.astype(np.float32) - blurred), 0, 255).round().astype(np.uint8)


class Cell:
    """One mode and seed."""

    def __init__(self, work: Path, mode: str, seed: int, scheduler: str, samples: int, tuning: int) -> None:
        self.name = f"{mode}-{scheduler}-{seed}"
        self.folder = work / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        overrides = [*MODES[mode], f"seed={seed}", f"data.test_size={max(samples, 2)}"]
        self.run = trained(work, f"{mode}_{seed}", ["experiment=rank16", *overrides])
        self.attention = trained(
            work, f"{mode}_{seed}_attention", ["experiment=attention_only", *overrides, "enhancement=none"]
        )
        steps = {"ddim": 20, "dpm++": 20}[scheduler]
        self.sampling = replace(self.run.cfg.sampling, scheduler=scheduler, num_inference_steps=steps)
        splits = load_splits(self.run.cfg.data)
        conditioning = self.run.cfg.conditioning
        self.test = HeldOut.take(splits["test"], samples, conditioning)
        self.val = HeldOut.take(splits["val"], tuning, conditioning)
        self.bf16 = choose_precision("auto", best_device()) == "bf16-mixed"
        self.extractor, self.classifier = load_features("effnet"), load_embedded()
        self.chosen = self._chosen()

    def drawer(self, module: EnhancementModule | None, run: LoadedRun | None = None) -> Drawer:
        return replace((run or self.run).drawer(self.bf16), enhancement=module, cfg=self.sampling)

    def draw(self, held_out: HeldOut, module: EnhancementModule | None = None, wrong: bool = False) -> np.ndarray:
        sources = held_out.sources
        if wrong and sources is not None:
            sources = np.roll(sources, 1, axis=0)
        return self.drawer(module).images(held_out.captions, sources, 0.0 if module is None else 1.0)

    def freeu(self, held_out: HeldOut, values: tuple[float, float, float, float]) -> np.ndarray:
        b1, b2, s1, s2 = values
        unet = self.run.backbone.unet
        unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
        try:
            return self.draw(held_out)
        finally:
            unet.disable_freeu()

    def reference(self, held_out: HeldOut) -> Reference:
        return build_reference(stack_images([p.image for p in held_out.pairs]), held_out.masks, self.extractor)

    def distance(self, images: np.ndarray, real: Reference) -> float:
        found = evaluate_images(stack_images(list(images)), real, self.extractor, bootstrap=2)
        return found["fd_effnet"].value

    def _chosen(self) -> dict:
        """Guidance for strength 0, then each control's setting, by distance on the validation split."""
        file = self.folder / "chosen.json"
        chosen = json.loads(file.read_text()) if file.is_file() else {}
        real = self.reference(self.val)
        if "guidance" not in chosen:
            found = {}
            for scale in GUIDANCE:
                self.sampling = replace(self.sampling, guidance_scale=scale, source_guidance_scale=scale)
                found[scale] = self.distance(self.draw(self.val), real)
            chosen |= {"guidance": min(found, key=found.get), "guidance_fd": {f"{k:g}": v for k, v in found.items()}}  # type: ignore[arg-type]
        scale = chosen["guidance"]
        self.sampling = replace(self.sampling, guidance_scale=scale, source_guidance_scale=scale)
        if "unsharp" not in chosen:
            plain = self.draw(self.val)
            controls: dict[str, tuple[tuple, Callable[..., np.ndarray]]] = {
                "unsharp": (UNSHARP, lambda amount: unsharp(plain, amount)),
                "fixed_gain": (FIXED_GAIN, lambda gain: self.draw(self.val, fixed_gain(gain))),
                "freeu": (FREEU, lambda values: self.freeu(self.val, values)),
            }
            for name, (values, make) in controls.items():
                distances = [self.distance(make(value), real) for value in values]
                chosen[name] = values[int(np.argmin(distances))]
                chosen[f"{name}_fd"] = distances
        file.write_text(json.dumps(chosen, indent=1) + "\n")
        console.print(self.name, chosen, highlight=False)
        return chosen

    def rows(self) -> dict[str, np.ndarray]:
        """Every row's pictures on the test split, uint8 (N, H, W, 3), drawn once and kept."""
        chosen, test = self.chosen, self.test
        scale = self.sampling.guidance_scale

        def guided(text: float, source: float) -> np.ndarray:
            sampling = replace(self.sampling, guidance_scale=text, source_guidance_scale=source)
            return replace(self.drawer(None), cfg=sampling).images(test.captions, test.sources, 0.0)

        def attention() -> np.ndarray:
            return self.drawer(None, self.attention).images(test.captions, test.sources, 0.0)

        makers: dict[str, Callable[[], np.ndarray]] = {
            BASE: lambda: self.draw(test),
            "frozen backbone": self._frozen,
            "LoRA, attention only": attention,
        }
        for name, parts in PARTS.items():
            module = with_parts(self.run, parts)
            if module is not None and any(getattr(module, p) is not None for p in parts or ("gain",)):
                makers[f"LoRA-DAE: {name}"] = partial(self.draw, test, module)
        makers |= {
            "unsharp mask": lambda: unsharp(self.kept(BASE, makers[BASE]), chosen["unsharp"]),
            "fixed gain": lambda: self.draw(test, fixed_gain(chosen["fixed_gain"])),
            "FreeU": lambda: self.freeu(test, tuple(chosen["freeu"])),  # type: ignore[arg-type]
            "more text guidance": lambda: guided(scale + 1, scale),
        }
        if test.sources is not None:
            makers["more source guidance"] = lambda: guided(scale, scale + 1)
            makers["wrong source, strength 0"] = lambda: self.draw(test, None, wrong=True)
            makers["wrong source, all"] = lambda: self.draw(test, with_parts(self.run, ()), wrong=True)
        else:
            makers["guidance 1"] = lambda: guided(1, 1)
        return {name: self.kept(name, make) for name, make in makers.items()}

    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        file = self.folder / f"{name.replace(' ', '_').replace(':', '')}.npy"
        if not file.is_file():
            images = make()
            with file.with_suffix(".partial").open("wb") as partial_file:
                np.save(partial_file, images)
            file.with_suffix(".partial").replace(file)
            console.print(f"{self.name}: {name}", highlight=False)
        return np.load(file)

    def _frozen(self) -> np.ndarray:
        backbone = load_backbone(self.run.cfg.backbone, best_device())
        prepare_unet(backbone, self.run.cfg)
        drawer = Drawer(backbone, None, "none", "none", self.run.cfg.data.resolution, self.sampling, self.bf16)
        return drawer.images(self.test.captions, None, 0.0)

    def measure(self) -> dict[str, dict[str, MetricValue]]:
        """Metrics by row, against the real photos; ``fd_recon`` against their VAE reconstructions."""
        rows, test = self.rows(), self.test
        real = self.reference(test)
        with torch.no_grad():
            latents = self.run.backbone.encode_images(np.stack([p.image for p in test.pairs]))[0]
            decoded = self.run.backbone.decode(latents)
        recon = build_reference(decoded, test.masks, self.extractor)
        methods = {}
        for name, images in rows.items():
            paired = test.sources is not None and name != "frozen backbone"
            found = evaluate_images(
                stack_images(list(images)), real, self.extractor, attributes=test.attributes,
                classifier=self.classifier, paired=paired,
            )  # fmt: skip
            again = evaluate_images(stack_images(list(images)), recon, self.extractor)
            methods[name] = {**found, "fd_recon": again["fd_effnet"]}
        write_grid(rows, test, self.folder / "grid.png")
        return methods


def against_base(methods: dict[str, dict[str, MetricValue]]) -> dict[str, dict[str, dict]]:
    """For the results file: value, interval, difference to strength 0 with its interval, and the verdict."""
    base = methods[BASE]
    results: dict[str, dict[str, dict]] = {}
    for name, metrics in methods.items():
        results[name] = {}
        for key, metric in metrics.items():
            entry = metric.as_dict()
            twin = methods["wrong source, strength 0"] if name == "wrong source, all" else base
            if name != BASE and key in twin:
                difference = paired_difference(metric, twin[key])
                entry |= {"difference": None if difference is None else difference.as_dict()}
                entry |= {"verdict": verdict(metric, twin[key]) or "cannot tell"}
            results[name][key] = entry
    return results


SHOWN = (
    "fd_effnet",
    "fd_recon",
    "psnr_garment",
    "ssim",
    "edge_f1",
    "attr_pattern",
    "power_high_garment",
    "lsd_garment",
)


def summary(title: str, methods: dict[str, dict[str, MetricValue]]) -> Table:
    """The columns that decide, with what differs from strength 0 marked."""
    table = Table("row", *SHOWN, title=title)
    for name, metrics in methods.items():
        cells = []
        for key in SHOWN:
            metric = metrics.get(key)
            base = methods[BASE].get(key)
            said = None if metric is None or base is None or name == BASE else verdict(metric, base)
            mark = {"better": " +", "worse": " -", None: ""}[said]
            cells.append("" if metric is None else f"{metric.value:.3g}{mark}")
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--schedulers", nargs="+", default=["ddim", "dpm++"], choices=["ddim", "dpm++"])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tuning-samples", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("build/enhancement"))
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    work = args.work.resolve()
    everything = json.loads(args.results.read_text()) if args.results.is_file() else {}
    for mode in args.modes:
        for seed in args.seeds:
            for scheduler in args.schedulers:
                cell = Cell(work, mode, seed, scheduler, args.samples, args.tuning_samples)
                methods = cell.measure()
                everything[cell.name] = {
                    "samples": len(cell.test.pairs), "chosen": cell.chosen, "rows": against_base(methods),
                }  # fmt: skip
                args.results.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
                console.print(summary(cell.name, methods))


if __name__ == "__main__":
    main()
