"""A backbone, judged from small JSON files and weight headers alone: what is checked before any weight loads.

It is a diffusers folder, or one ``.safetensors`` in the layout of CompVis/SGM together with a folder of configs
(the package has them for every family).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_dae.backbone.family import FAMILIES, read_shapes, unet_family
from lora_dae.backbone.hub import fetch, repository
from lora_dae.config import BackboneConfig, ConfigError

STUDIO = Path(__file__).parent / "studio" / "weights"
CONFIGS = Path(__file__).parent / "configs"
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
WEIGHTED_PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
# Weight files up to this size are hashed whole; of larger ones, evenly spread slices (see fingerprint).
WHOLE_FILE_BYTES = 100_000_000
SLICES, SLICE_BYTES = 64, 65_536
_UP_BLOCKS = ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3]  # diffusers' default, which configs may leave out


@dataclass(frozen=True)
class BackboneFolder:
    """A backbone whose parts exist, are of classes that we load, and fit each other."""

    path: Path  # the diffusers folder; of a single file the folder of its configs
    family: str  # sd1 | sd2 | sdxl, by the UNet's weights
    vae_path: Path  # a folder with the VAE's config (and weights, unless they are in the single file)
    vae_class: str  # one of VAE_CLASSES
    vae_scale_factor: int  # pixels per latent pixel, along one side
    latent_channels: int
    unet_factor: int  # how often the UNet halves its input, as a factor: 8 for SD 1.5
    unet_config: dict[str, Any]
    scheduler_class: str
    prediction_type: str | None  # None: as the scheduler's own config says
    zero_terminal_snr: bool
    zeros_for_empty: bool  # the empty caption is zeros (SDXL), not the encoded empty string
    variants: dict[str, str | None]  # part -> the variant of its weight files ("fp16") or None
    single_file: Path | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The text encoders, by name."""
        return ("text_encoder", "text_encoder_2") if self.family == "sdxl" else ("text_encoder",)

    def check_resolution(self, resolution: int) -> None:
        """Raises ConfigError unless images of ``resolution`` squared pixels pass VAE and UNet evenly."""
        factor = self.vae_scale_factor * self.unet_factor
        if resolution <= 0 or resolution % factor:
            near = max(1, round(resolution / factor)) * factor
            raise ConfigError(
                f"data.resolution={resolution} is not a multiple of {factor} (VAE {self.vae_scale_factor} x "
                f"UNet {self.unet_factor}) as the backbone at {self.path} needs: use {near}."
            )

    def check_bucket(self, size: tuple[int, int]) -> None:
        """Raises ConfigError unless images of ``size`` (width, height) pass VAE and UNet evenly."""
        factor = self.vae_scale_factor * self.unet_factor
        if size[0] % factor or size[1] % factor:
            raise ConfigError(
                f"data.buckets has {size[0]}x{size[1]}, not a multiple of {factor} (VAE {self.vae_scale_factor} x UNet "
                f"{self.unet_factor}) as the backbone at {self.path} needs: set data.bucket_step={factor}."
            )

    def fingerprint(self, *parts: str) -> str:
        """16 hex digits of the content of every JSON, text and weight file, of all parts or of those named.

        Weight files above 100 MB are hashed by size, header (tensor names and offsets) and 64 slices of
        64 kB spread over the file: training or quantizing changes values everywhere, and reading 4 GB at
        each start would take longer than it saves.
        """
        digest = hashlib.sha256()
        files = [(file.relative_to(self.path).as_posix(), file) for file in sorted(self.path.glob("*/*"))]
        if self.vae_path != self.path / "vae":
            files += [(f"own vae/{file.name}", file) for file in sorted(self.vae_path.glob("*"))]
        for name, file in files:
            part = "vae" if name.startswith("own vae/") else file.parent.name
            if parts and part not in parts:
                continue
            if file.suffix in (".json", ".txt", ".safetensors"):
                digest.update(name.encode())
                digest.update(_digest(file))
        if self.single_file is not None:
            digest.update(_digest(self.single_file))
        return digest.hexdigest()[:16]


def inspect_backbone(cfg: BackboneConfig, resolution: int | None = None) -> BackboneFolder:
    """Checks what ``cfg`` names (no path: the shipped ``studio``, or a hub model), and ``resolution`` if given.

    Reads no weights, but may fetch a hub model. Raises ConfigError if a part is missing, its weights are
    pickled, a class is not that of Stable Diffusion 1.x, 2.x or XL, the parts do not fit, or the resolution
    does not.
    """
    path = _locate(cfg)
    folder = _inspect_file(path, cfg) if path.is_file() else _inspect(path, cfg)
    if resolution is not None:
        folder.check_resolution(resolution)
    return folder


def _locate(cfg: BackboneConfig) -> Path:
    """The diffusers folder or the single file."""
    if cfg.path is None:
        if repository(cfg) is not None:
            return fetch(cfg)
        if cfg.name != "studio":
            kind = "checkpoint (.safetensors)" if cfg.name == "file" else "diffusers folder"
            raise ConfigError(f"backbone={cfg.name} needs its {kind}: give backbone.path=<{cfg.name}>.")
        if not (STUDIO / "model_index.json").is_file():
            raise ConfigError(f"the shipped backbone is missing at {STUDIO}: run `make backbone`.")
        return STUDIO
    path = Path(cfg.path).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ConfigError(
                f"{path} is a pickle, which can run code when it is loaded: load it once where you trust it, with "
                "StableDiffusionPipeline.from_single_file of diffusers, save_pretrained it, and give that folder."
            )
        return path
    if not path.is_dir():
        raise ConfigError(
            f"backbone.path={cfg.path} is neither a folder nor a file: give a diffusers folder (with unet/, vae/, ...) "
            "or a .safetensors checkpoint."
        )
    return path


def _inspect_file(file: Path, cfg: BackboneConfig) -> BackboneFolder:
    """A single checkpoint: its family by its weights, everything else by the configs of that family."""
    shapes = read_shapes(file)
    prefix = "model.diffusion_model."
    unet = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    if not unet:
        raise ConfigError(f"{file} holds no UNet in the CompVis/SGM layout ({prefix}*): give a full checkpoint.")
    family = unet_family(unet)
    # Markers that trainers leave in such checkpoints; what the config says itself stays.
    if "v_pred" in shapes and cfg.prediction_type == "auto":
        cfg = replace(cfg, prediction_type="v_prediction")
    if "ztsnr" in shapes and cfg.prediction_type == "v_prediction" and cfg.zero_terminal_snr is None:
        cfg = replace(cfg, zero_terminal_snr=True)
    if family == "sd2" and cfg.prediction_type == "auto" and cfg.configs is None:
        raise ConfigError(
            f"{file} is SD 2.x and does not say what it predicts: set backbone.prediction_type=epsilon (base models, "
            "512 pixels) or v_prediction (768 pixels)."
        )
    configs = Path(cfg.configs).expanduser() if cfg.configs is not None else CONFIGS / family
    if not (configs / "model_index.json").is_file():
        raise ConfigError(f"backbone.configs={cfg.configs} is not a folder of configs in diffusers' layout.")
    folder = _inspect(configs, cfg, file)
    config = folder.unet_config
    found = list(unet.get("input_blocks.0.0.weight", [0, 0])[:2])
    expected = [config["block_out_channels"][0], config.get("in_channels", 4)]
    if found != expected:
        raise ConfigError(
            f"{file} is no plain {FAMILIES[family]} text-to-image model: its first convolution is "
            f"{found[1]} -> {found[0]} channels, expected {expected[1]} -> {expected[0]}."
        )
    return folder


def _inspect(path: Path, cfg: BackboneConfig, single_file: Path | None = None) -> BackboneFolder:
    index = _json(path / "model_index.json")
    second = ["text_encoder_2", "tokenizer_2"] if "text_encoder_2" in index else []
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", *second):
        if not (path / part).is_dir():
            raise ConfigError(
                f"the backbone at {path} has no {part}/: give a Stable Diffusion folder in diffusers' layout."
            )
    vae_path = path / "vae" if cfg.vae_path is None else Path(cfg.vae_path).expanduser()
    unet, text = (_json(path / part / "config.json") for part in ("unet", "text_encoder"))
    if cfg.vae_path is not None and not (vae_path / "config.json").is_file():
        raise ConfigError(
            f"there is no VAE in {vae_path}, which has no config.json: give a folder of diffusers' layout."
        )
    vae = _json(vae_path / "config.json")
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    vae_class = str(vae.get("_class_name") if cfg.vae_path is not None else (index.get("vae") or [None, None])[1])
    if vae_class not in VAE_CLASSES:
        raise ConfigError(
            f"the VAE at {vae_path} is a {vae_class} by its config: only {' and '.join(VAE_CLASSES)} are supported."
        )
    latent_channels = int(vae.get("latent_channels", 4))
    in_channels = unet.get("in_channels", 4)
    if in_channels != latent_channels:
        remedy = "(an inpainting or instruction model?): give a text-to-image backbone."
        if cfg.vae_path is not None:
            remedy = f"({vae_path}): give one that was made for this backbone's latents, or leave it out."
        raise ConfigError(
            f"the UNet at {path} takes {in_channels} channels but its VAE gives {latent_channels} {remedy}"
        )
    attended, given = unet.get("cross_attention_dim"), int(text.get("hidden_size", 512))
    if second:
        given += int(_json(path / "text_encoder_2" / "config.json").get("hidden_size", 512))
    if attended != given:
        raise ConfigError(
            f"the UNet at {path} attends to {attended} text features but the text encoder gives "
            f"{given}: the folder mixes parts of different models."
        )
    own_vae = single_file is not None and cfg.vae_path is None
    parts = [] if single_file is not None else ["unet", "text_encoder", *second[:1]]
    variants = {part: _variant(path / part, WEIGHTED_PARTS[part]) for part in parts}
    if not own_vae:
        variants["vae"] = _variant(vae_path, WEIGHTED_PARTS["vae"])
    if single_file is None:
        family = _folder_family(path, unet, variants["unet"])
    else:
        family = "sdxl" if second else ("sd2" if unet.get("use_linear_projection") else "sd1")
    if (family == "sdxl") != bool(second):
        raise ConfigError(
            f"the UNet at {path} is {FAMILIES[family]} by its weights, but model_index.json lists "
            f"{'two text encoders' if second else 'one text encoder'}: the folder mixes parts of different models."
        )
    prediction = None if cfg.prediction_type == "auto" else cfg.prediction_type
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr") if cfg.zero_terminal_snr is None else cfg.zero_terminal_snr)
    if zero_snr and (prediction or scheduler.get("prediction_type", "epsilon")) == "epsilon":
        raise ConfigError(
            "backbone.zero_terminal_snr=true needs a network that predicts v: at pure noise the noise says nothing "
            "about the image; set backbone.prediction_type=v_prediction if the backbone was trained so."
        )
    vae_widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [64] * 4
    return BackboneFolder(
        path=path,
        family=family,
        vae_path=vae_path,
        vae_class=vae_class,
        vae_scale_factor=2 ** (len(vae_widths) - 1),
        latent_channels=latent_channels,
        unet_factor=2 ** (len(unet.get("block_out_channels", [320, 640, 1280, 1280])) - 1),
        unet_config={"layers_per_block": 2, "up_block_types": _UP_BLOCKS, **unet},
        scheduler_class=str(scheduler.get("_class_name")),
        prediction_type=prediction or scheduler.get("prediction_type"),
        zero_terminal_snr=zero_snr,
        zeros_for_empty=bool(second) and bool(index.get("force_zeros_for_empty_prompt", True)),
        variants=variants,
        single_file=single_file,
    )


def _folder_family(path: Path, config: dict[str, Any], variant: str | None) -> str:
    """By the headers of the UNet's weight files; raises ConfigError where they contradict its config."""
    shapes: dict[str, list[int]] = {}
    for file in _weight_files(path / "unet", WEIGHTED_PARTS["unet"], variant):
        shapes |= read_shapes(file)
    attends = {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
    if attends and attends != {config.get("cross_attention_dim")}:
        raise ConfigError(
            f"the weights of the UNet at {path} attend to {max(attends)} text features, its config says "
            f"{config.get('cross_attention_dim')}: restore the folder from the model's source."
        )
    family = unet_family(shapes)
    if (family == "sdxl") != (config.get("addition_embed_type") == "text_time"):
        raise ConfigError(
            f"the UNet at {path} is {FAMILIES[family]} by its weights, its config (addition_embed_type) says "
            "otherwise: restore the folder from the model's source."
        )
    return family


def _weight_files(part: Path, stem: str, variant: str | None) -> list[Path]:
    """The whole file, or the shards that the index names. Raises ConfigError for one that is missing."""
    dotted = "" if variant is None else f".{variant}"
    whole, index = part / f"{stem}{dotted}.safetensors", part / f"{stem}.safetensors.index{dotted}.json"
    if whole.is_file():
        return [whole]
    files = [part / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise ConfigError(f"{missing} is missing, which {index.name} names: restore it from the model's source.")
    return files


def _variant(part: Path, stem: str) -> str | None:
    """None for ``stem.safetensors``, "fp16" for ``stem.fp16.safetensors``; shards count by their index."""
    for variant in (None, "fp16"):
        dotted = "" if variant is None else f".{variant}"
        whole, shards = part / f"{stem}{dotted}.safetensors", part / f"{stem}.safetensors.index{dotted}.json"
        if whole.is_file() or shards.is_file():
            return variant
    pickled = sorted(file.name for suffix in ("bin", "pt", "pth", "ckpt") for file in part.glob(f"*.{suffix}"))
    if pickled:
        raise ConfigError(
            f"{part / pickled[0]} is a pickle, which can run code when it is loaded: convert the backbone to "
            "safetensors (save_pretrained of diffusers does) and give that folder."
        )
    raise ConfigError(f"{part} holds no weights: {stem}.safetensors is missing.")


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{file} is missing: give a Stable Diffusion folder in diffusers' layout.")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} is not a JSON object ({error}): restore it from the model's source.") from error


def _digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_FILE_BYTES:
            return hashlib.file_digest(stream, "sha256").digest()  # piece by piece
        digest.update(str(size).encode())
        digest.update(stream.read(min(size, int.from_bytes(stream.read(8), "little"))))
        for slice_number in range(SLICES):
            stream.seek((size - SLICE_BYTES) * slice_number // (SLICES - 1))
            digest.update(stream.read(SLICE_BYTES))
    return digest.digest()
