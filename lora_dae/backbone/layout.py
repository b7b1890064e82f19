"""A diffusers folder, judged from its small JSON files alone: what is checked before any weight loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_dae.config import BackboneConfig, ConfigError

STUDIO = Path(__file__).parent / "studio" / "weights"
VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
WEIGHTED_PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# Weight files up to this size are hashed whole; of larger ones, evenly spread slices (see fingerprint).
WHOLE_FILE_BYTES = 100_000_000
SLICES, SLICE_BYTES = 64, 65_536


@dataclass(frozen=True)
class BackboneFolder:
    """A folder whose parts exist, are of classes that we load, and fit each other."""

    path: Path
    vae_class: str  # one of VAE_CLASSES
    vae_scale_factor: int  # pixels per latent pixel, along one side
    latent_channels: int
    unet_factor: int  # how often the UNet halves its input, as a factor: 8 for SD 1.5
    scheduler_class: str
    variants: dict[str, str | None]  # part -> the variant of its weight files ("fp16") or None

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
        for file in sorted(self.path.glob("*/*")):
            if parts and file.parent.name not in parts:
                continue
            if file.suffix in (".json", ".txt", ".safetensors"):
                digest.update(file.relative_to(self.path).as_posix().encode())
                digest.update(_digest(file))
        return digest.hexdigest()[:16]


def inspect_backbone(cfg: BackboneConfig, resolution: int | None = None) -> BackboneFolder:
    """Checks the folder that ``cfg`` names (None = the shipped ``studio``), and ``resolution`` if given.

    Reads no weights. Raises ConfigError if the folder or a part is missing, its weights are pickled, a
    class is not that of Stable Diffusion 1.x/2.x, the parts do not fit, or the resolution does not.
    """
    folder = _inspect(_locate(cfg))
    if resolution is not None:
        folder.check_resolution(resolution)
    return folder


def _locate(cfg: BackboneConfig) -> Path:
    if cfg.path is None:
        if cfg.name != "studio":
            raise ConfigError(f"backbone={cfg.name} needs its diffusers folder: give backbone.path=<folder>.")
        if not (STUDIO / "model_index.json").is_file():
            raise ConfigError(f"the shipped backbone is missing at {STUDIO}: run `make backbone`.")
        return STUDIO
    path = Path(cfg.path).expanduser()
    if not path.is_dir():
        raise ConfigError(f"backbone.path={cfg.path} is not a folder: give a diffusers folder (with unet/, vae/, ...).")
    return path


def _inspect(path: Path) -> BackboneFolder:
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        if not (path / part).is_dir():
            raise ConfigError(
                f"the backbone at {path} has no {part}/: give a Stable Diffusion folder in diffusers' layout."
            )
    index = _json(path / "model_index.json")
    unet, vae, text = (_json(path / part / "config.json") for part in WEIGHTED_PARTS)
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    vae_class = str((index.get("vae") or [None, None])[1])
    if vae_class not in VAE_CLASSES:
        raise ConfigError(
            f"the VAE of the backbone at {path} is a {vae_class} by model_index.json: "
            f"only {' and '.join(VAE_CLASSES)} are supported."
        )
    if "text_encoder_2" in index or unet.get("addition_embed_type"):
        raise ConfigError(
            f"the backbone at {path} has a second text encoder, as SDXL does: only Stable Diffusion 1.x and "
            "2.x (one CLIP text encoder) are supported."
        )
    latent_channels = int(vae.get("latent_channels", 4))
    in_channels = unet.get("in_channels", 4)
    if in_channels != latent_channels:
        raise ConfigError(
            f"the UNet at {path} takes {in_channels} channels but its VAE gives {latent_channels} "
            "(an inpainting or instruction model?): give a text-to-image backbone."
        )
    attended, given = unet.get("cross_attention_dim"), text.get("hidden_size")
    if attended != given:
        raise ConfigError(
            f"the UNet at {path} attends to {attended} text features but the text encoder gives "
            f"{given}: the folder mixes parts of different models."
        )
    vae_widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [64] * 4
    return BackboneFolder(
        path=path,
        vae_class=vae_class,
        vae_scale_factor=2 ** (len(vae_widths) - 1),
        latent_channels=latent_channels,
        unet_factor=2 ** (len(unet.get("block_out_channels", [320, 640, 1280, 1280])) - 1),
        scheduler_class=str(scheduler.get("_class_name")),
        variants={part: _variant(path / part, stem) for part, stem in WEIGHTED_PARTS.items()},
    )


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
            digest.update(stream.read())
        else:
            digest.update(str(size).encode())
            digest.update(stream.read(min(size, int.from_bytes(stream.read(8), "little"))))
            for slice_number in range(SLICES):
                stream.seek((size - SLICE_BYTES) * slice_number // (SLICES - 1))
                digest.update(stream.read(SLICE_BYTES))
    return digest.digest()
