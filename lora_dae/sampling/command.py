"""``sample.py``: a few images, or a grid over strengths, from a finished run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from rich.console import Console

from lora_dae.adapter.source_input import load_framing
from lora_dae.backbone.precision import best_device, draws_in_bf16
from lora_dae.config import Config, ConfigError, overridden_sampling
from lora_dae.data.pair import Pair
from lora_dae.data.sources import load_split
from lora_dae.data.square import Framing
from lora_dae.rules import check
from lora_dae.sampling.finished import read_config
from lora_dae.sampling.load import LoadedRun, load_run
from lora_dae.sampling.sheet import image_grid

NAME_BYTES = 80  # of seed and prompt in a file name; file systems end at 255


@dataclass
class SampleRequest:
    """The keys of conf/sample.yaml."""

    run: str
    prompt: str | None
    source: str | None
    example: int | None
    strength: float | None
    strengths: list[float] | None
    seed: int | None
    num_images: int
    scheduler: str | None
    num_inference_steps: int | None
    guidance_scale: float | None
    source_guidance_scale: float | None
    sampling_method: str | None
    tiled_decode: bool | None
    batch_size: int | None
    weights: str | None
    vae: str | None
    output: str | None


def request_of(values: DictConfig) -> SampleRequest:
    """The keys and values of conf/sample.yaml; raises ConfigError for one of another type, and without a run."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SampleRequest), values)
        if OmegaConf.is_missing(merged, "run"):
            raise ConfigError("run is missing: give run=runs/<run>.")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        given = f"{error.full_key}={OmegaConf.select(values, str(error.full_key))}"
        raise ConfigError(f"{given} is of a type that it does not take: see conf/sample.yaml.") from error


def draw_samples(request: SampleRequest, console: Console) -> Path:
    """Draw and save; returns the picture's path. All input is checked before weights are loaded."""
    cfg = read_config(Path(request.run))
    backbone = replace(cfg.backbone, weights=request.weights or cfg.backbone.weights)
    cfg = replace(cfg, sampling=overridden_sampling(cfg.sampling, request), backbone=backbone)
    check(cfg, trains=False)
    if request.weights is not None and cfg.adapter.full_finetune:
        raise ConfigError(f"weights= is for a frozen UNet, and run={request.run} has trained its own: leave it out.")
    strengths = _strengths(request, cfg)
    if request.num_images < 1:
        raise ConfigError(f"num_images={request.num_images} is below 1: give at least 1.")
    prompt, source = _conditions(request, cfg)
    if cfg.conditioning == "source" and source is None:
        console.print("no source photo given: drawing from the caption alone")
    stem = _stem(request, cfg, prompt, source, strengths)
    device = best_device()
    run = load_run(Path(request.run), device, request.weights, request.vae)
    run.cfg = cfg
    if device.type != "cpu":  # text encoders and VAE wait on the host, as they did while it trained
        run.backbone.rest(device)
    columns = [_images(run, prompt, source, s, request.num_images) for s in strengths]
    output = Path(request.output) if request.output else Path(request.run) / "samples"
    output.mkdir(parents=True, exist_ok=True)
    for s, images in zip(strengths, columns, strict=True):
        for k, image in enumerate(images):
            Image.fromarray(image).save(output / f"{stem}_s{s:g}_{k}.png")
    flat = [column[k] for k in range(request.num_images) for column in columns]
    labels = [f"strength {s:g}" for s in strengths]
    if source is not None:
        flat = [x for k in range(request.num_images) for x in (source, *(column[k] for column in columns))]
        labels = ["source", *labels]
    captions = [""] * (request.num_images - 1) + [prompt]
    path = output / f"{stem}.png"
    image_grid(flat, request.num_images, len(labels), labels, captions, zoom=max(1, 256 // flat[0].shape[1])).save(path)
    return path


def _images(run: LoadedRun, prompt: str, source: np.ndarray | None, strength: float, count: int) -> np.ndarray:
    bf16 = draws_in_bf16(run.cfg, run.backbone.device)
    sources = None if source is None else np.stack([source] * count)
    return run.drawer(bf16).images([prompt] * count, sources, strength)


def _stem(request: SampleRequest, cfg: Config, prompt: str, source: np.ndarray | None, strengths: list[float]) -> str:
    """How the files are called: for people seed and prompt, and a hash of what the pictures depend on.

    So the same command writes the same files, and another one never over them.
    """
    run = Path(request.run).resolve()
    weights = [(file.name, file.stat().st_mtime_ns) for file in sorted((run / "adapter").rglob("*.safetensors"))]
    given = (prompt, [float(s) for s in strengths], request.num_images, request.vae, request.weights)
    asked = (str(run), weights, cfg.sampling, *given)
    digest = hashlib.blake2b(repr(asked).encode(errors="backslashreplace"), digest_size=6)
    digest.update(b"" if source is None else source.tobytes())
    name = f"seed{cfg.sampling.seed}_{'_'.join(prompt.split()[:8])}".replace("/", "-").replace(",", "")
    return f"{name.encode(errors='ignore')[:NAME_BYTES].decode(errors='ignore')}_{digest.hexdigest()}"


def _strengths(request: SampleRequest, cfg: Config) -> list[float]:
    if request.strengths == []:
        raise ConfigError("strengths=[] names none: give a list such as [0,0.5,1], or leave it out.")
    strengths, enhances = request.strengths, cfg.enhancement.enabled and cfg.enhancement.placement != "none"
    if strengths is None:
        own = cfg.enhancement.strength if enhances else 0.0
        strengths = [own if request.strength is None else request.strength]
    for s in strengths:
        if s < 0:
            raise ConfigError(f"strength={s} is below 0: 0 switches the enhancement off, 1 is as trained.")
    if any(s > 0 for s in strengths) and not enhances:
        raise ConfigError(f"run={request.run} was trained without enhancement: leave strength out, or give 0.")
    return strengths


def _conditions(request: SampleRequest, cfg: Config) -> tuple[str, np.ndarray | None]:
    """The caption, and the source photo as uint8 (H, W, 3) or None."""
    pair: Pair | None = None
    if request.example is not None or request.prompt is None:
        test = load_split(cfg.data, "test")
        number = request.example or 0
        if not 0 <= number < len(test):
            raise ConfigError(f"example={number} is not in the test split: it has 0 to {len(test) - 1}.")
        pair = test[number]
    source = None
    if request.source is not None:
        if cfg.conditioning != "source":
            raise ConfigError(f"run={request.run} was trained on captions alone: leave source out.")
        source = _read(Path(request.source), cfg.data.resolution, load_framing(Path(request.run) / "adapter"))
    elif pair is not None and cfg.conditioning == "source":
        source = pair.source
    prompt = request.prompt
    if prompt is None:
        assert pair is not None  # without a prompt there is an example
        prompt = pair.caption
    return prompt, source


def _read(path: Path, resolution: int, framing: Framing) -> np.ndarray:
    if not path.is_file():
        raise ConfigError(f"source={path} does not exist: give a photo of the garment.")
    try:
        with Image.open(path) as photo:
            return framing.fit(photo, resolution)
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"source={path} cannot be read as an image ({error}): give a JPEG or PNG.") from error
