"""python -m benchmarks.train_speed: images/s of train.py against diffusers' text-to-image LoRA example, both whole.

The same backbone folder, photos, batch, rank and precision, LoRA on the attention projections alone. Every run is a
process of its own, all kinds in turns; the rate is that between two optimizer steps, so that starting is not in it;
ratios are of one turn's two rates, medians over turns, beside half their interquartile range. Ours: as by default, with
latents and texts cached on disk (encoded before the first turn), and with data.cache=off, where VAE and text encoder
work in the loop as in the example (benchmarks.example). The example needs accelerate and datasets.

    first step   from the start of train.py experiment=rank16 on the studio to the end of its first optimizer step, with
                 its default logger; all that a first run leaves in data.cache_dir is there
    import       of the bare package
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from benchmarks.steps import half_range
from benchmarks.timing import console, show
from lora_dae.backbone.layout import STUDIO
from lora_dae.data.studio.attributes import draw_look, stream
from lora_dae.data.studio.captions import caption
from lora_dae.data.studio.scene import photo

PRECISIONS = {"fp32": ("32-true", "no"), "bf16": ("bf16-mixed", "bf16")}  # Lightning's word, accelerate's
RANK = 16
QUIET = ["logger=none", "tracking.sample_every_n_steps=0"]


def render(folder: Path, count: int, side: int) -> None:
    """Studio photos as JPEG files with metadata.jsonl, which both sides read; what is there stays."""
    if (folder / "metadata.jsonl").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        look = draw_look(0, index, "target")
        Image.fromarray(photo(look, 0, index, side).image).save(folder / f"{index:04d}.jpg", quality=95)
        row = {"file_name": f"{index:04d}.jpg", "text": caption(look, stream(0, index, "caption"))}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def overrides(args: argparse.Namespace, precision: str, cache: str) -> list[str]:
    """train.py's words for what the example trains."""
    steps = 10 * args.steps  # so that neither validation nor checkpoint comes before the last stamp
    return [
        "data=folder", f"data.root={args.work / 'photos'}", f"data.resolution={args.resolution}",
        f"data.batch_size={args.batch}", f"data.cache={cache}", f"data.cache_dir={args.work / 'cache'}",
        "backbone=folder", f"backbone.path={args.backbone}", "enhancement=none", f"adapter.rank={RANK}",
        "adapter.targets=[cross_attention,self_attention]", f"trainer.precision={PRECISIONS[precision][0]}",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}",
        f"hydra.run.dir={args.work / 'run'}", *QUIET,
    ]  # fmt: skip


def example(args: argparse.Namespace, precision: str) -> list[str]:
    return [
        "benchmarks.example", "--backbone", str(args.backbone), "--photos", str(args.work / "photos"),
        "--work", str(args.work / "datasets"), "--file", str(args.work / "stamps.json"), "--batch", str(args.batch),
        "--resolution", str(args.resolution), "--steps", str(args.steps), "--precision", PRECISIONS[precision][1],
        "--rank", str(RANK),
    ]  # fmt: skip


def stamped(args: argparse.Namespace, steps: int, words: list[str]) -> list[str]:
    return ["benchmarks.stamped", str(steps), str(args.work / "stamps.json"), *words]


def run(args: argparse.Namespace, command: list[str]) -> tuple[float, list[float]]:
    """(start, time of each step), Unix times, of a process."""
    shutil.rmtree(args.work / "run", ignore_errors=True)
    start = time.time()
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return start, json.loads((args.work / "stamps.json").read_text())


def rate(times: list[float], skip: int, batch: int) -> float:
    """Images per second from the end of step ``skip`` to that of the last one."""
    return batch * (len(times) - skip) / (times[-1] - times[skip - 1])


def speed(args: argparse.Namespace) -> dict[str, float]:
    render(args.work / "photos", args.photos, 2 * args.resolution)
    commands: dict[str, list[str]] = {}
    for precision in args.precision:
        ours = {name: stamped(args, args.steps, overrides(args, precision, name)) for name in ("disk", "off")}
        run(args, stamped(args, 1, overrides(args, precision, "disk")))  # fills the cache
        commands |= {f"{precision}, ours, cached": ours["disk"], f"{precision}, ours, cache off": ours["off"]}
        commands[f"{precision}, example"] = example(args, precision)
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(args.repeats):
        for name, command in commands.items():
            rates[name].append(rate(run(args, command)[1], args.skip, args.batch))
            console.print(f"turn {turn + 1}: {name}: {rates[name][-1]:.2f} images/s", highlight=False)
    found = {f"{name}, images/s": statistics.median(values) for name, values in rates.items()}
    for precision in args.precision:
        for kind in ("cached", "cache off"):
            pairs = zip(rates[f"{precision}, ours, {kind}"], rates[f"{precision}, example"], strict=True)
            ratios = [a / b for a, b in pairs]
            found[f"{precision}, ours, {kind} / example"] = statistics.median(ratios)
            found[f"{precision}, ours, {kind} / example, +-"] = half_range(ratios)
    return found


def first_step(args: argparse.Namespace) -> dict[str, float]:
    folders = [f"data.cache_dir={args.work / 'cache'}", f"hydra.run.dir={args.work / 'run'}"]
    command = stamped(args, 1, ["experiment=rank16", *folders])
    run(args, command)  # what it leaves is what the others find
    seconds = []
    for _ in range(args.repeats):
        start, times = run(args, command)
        seconds.append(times[0] - start)
    code = "import time; start = time.perf_counter(); import lora_dae; print(time.perf_counter() - start)"
    imports = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(args.repeats + 1)
    ]
    return {"first step, s": statistics.median(seconds), "import lora_dae, s": statistics.median(imports[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_speed", description=__doc__)
    parser.add_argument("--backbone", type=Path, default=STUDIO, help="a folder in diffusers' layout")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--photos", type=int, default=256)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--skip", type=int, default=5, help="so many first steps are not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("speed", "start"), help="one half of it")
    parser.add_argument("--work", type=Path, default=Path("build/train_speed"))
    parser.add_argument("--output", type=Path, default=Path("build/train_speed.json"))
    args = parser.parse_args()
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    results: dict[str, float] = {}
    if args.only != "start":
        results |= speed(args)
    if args.only != "speed":
        results |= first_step(args)
    show(results, args.output)


if __name__ == "__main__":
    main()
