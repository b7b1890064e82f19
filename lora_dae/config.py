"""What can be configured: one dataclass per conf/ group, registered in Hydra's ConfigStore.

The YAML files under ``conf/`` are small diffs on these defaults. ``rules.check`` holds every rule
over them; it runs before any weight is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PLACEMENTS = ("prediction", "direction", "none")
CONDITIONINGS = ("source", "none")
GATE_INPUTS = ("energy", "place", "time")
SCHEDULERS = ("ddim", "ddpm", "dpm++", "unipc", "pndm", "euler", "euler_a", "heun", "lms")
# Published ways to better pictures inside the sampler, with their options; one setting each, whatever the family.
METHODS: dict[str, dict[str, float]] = {
    "none": {},
    "freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6},  # diffusers' for SD 1.5
    "sag": {"scale": 0.75},
    "pag": {"scale": 3.0},
    "apg": {"eta": 0.0, "norm": 15.0, "momentum": -0.5},  # SDXL's
    "rescale": {"phi": 0.7},
    "frequency": {"low": 1.0, "high": 2.0},  # our own: published scales belong to a guidance that is not tuned
    "detail_daemon": {"amount": 0.1, "start": 0.2, "end": 0.8},
    "wavelet": {"low": 0.005, "high": 0.0},  # of the authors' script; they tune both per model
    "band_gain": {"log_gain": 0.1},  # no paper: the constant that a learned gain has to beat
    "unsharp": {"amount": 0.5, "radius": 1.0},  # no paper
    "deepcache": {"interval": 3},
}
UNET_GROUPS = ("cross_attention", "self_attention", "feed_forward", "conv", "conv_in", "conv_out")
TARGET_GROUPS = (*UNET_GROUPS, "text_encoder")
SOURCES = (
    "studio", "folder", "fashion_mannequin", "viton_hd", "dress_code", "deepfashion_multimodal", "fashion_product",
    "fashion_gen", "hf", "webdataset", "litdata", "shards",
)  # fmt: skip
# The gain's (at least one of the first two), then the decoder stage's.
LOSSES = ("distribution", "power", "energy", "edges")
LOGGERS = ("wandb", "tensorboard", "csv", "none")
DIFFICULTIES = ("aligned", "shifted", "reposed")
Section = TypeVar("Section", bound=Any)


class ConfigError(ValueError):
    """Bad input, said in one sentence: what, where, what to do."""


@dataclass
class BackboneConfig:
    """Which frozen Stable Diffusion: shipped in the package, a diffusers folder, one checkpoint, or from the hub."""

    name: str = "studio"  # studio | folder | file | sd15 | sd21 | sdxl
    path: str | None = None  # a diffusers folder or a .safetensors checkpoint; None = shipped, or from the hub
    repo: str | None = None  # a hub id; None = that of `name`
    revision: str | None = None  # of `repo`; None = pinned for sd15 and sdxl
    configs: str | None = None  # of a checkpoint: folder of configs; None = those of its family
    vae_path: str | None = None  # another VAE (SDXL's fp16-fix, TAESD); None = the backbone's own
    prediction_type: str = "auto"  # auto (as the backbone says) | epsilon | v_prediction
    zero_terminal_snr: bool | None = None  # None = as the backbone says
    weights: str = "fp32"  # of the frozen UNet: fp32 | bf16 | fp16 | int8 (half of bf16); what trains stays fp32
    gradient_checkpointing: bool | str = False  # true | attention (its blocks alone: two thirds of what true saves)
    attention: str = "auto"  # auto (measured at start) | plain | sdpa
    text_chunks: int = 1  # captions of up to 75 tokens a chunk; above 1 plain pipelines need prompt_embeds


@dataclass
class CaptionConfig:
    """What becomes of captions before the text encoder sees them."""

    template: str | None = None  # "a {gender} model wearing a {color} {category}": in place of all captions
    missing: str = "error"  # photos without caption: error | file_name | category | drop
    file: str | None = None  # captions.jsonl of the captioner, {"id": ..., "text": ...} a line
    trigger: str | None = None  # a word put first
    shuffles: int = 0  # further captions with the comma-separated tags in another order
    keep_tags: int = 1  # so many first tags stay where they are


@dataclass
class DataConfig:
    """Where the fashion pairs come from."""

    name: str = "studio"  # one of SOURCES
    root: str | None = None  # every source but studio: where it lies
    resolution: int = 128  # side of the square, or of the square as large as a bucket, pixels
    cache_dir: str = "cache"  # rendered photos, latents, text embeddings
    cache: str = "disk"  # latents and text embeddings: disk | memory | off
    batch_size: int = 16
    seed: int = 0  # of the split (folder) or of the renderer (studio)
    difficulty: str = "aligned"  # studio pairs: aligned | shifted | reposed
    train_size: int = 1200  # studio
    val_size: int = 128  # studio
    test_size: int = 128  # studio
    val_fraction: float = 0.06  # where the publisher has no validation split
    test_fraction: float = 0.06  # where the publisher has no splits
    max_images: int | None = None  # use only the first so many
    max_bad_fraction: float = 0.01  # unreadable files are left out, up to this share
    category: str | None = None  # dress_code: dresses | upper_body | lower_body; None = all
    buckets: list[str] = field(default_factory=list)  # [] = square, [auto], or sizes like [512x704,512x512]
    bucket_step: int | None = None  # sides are multiples of it; None = 64 from 512 pixels up, below an eighth
    background: str = "white"  # under transparent parts
    missing_source: str = "error"  # some photos have no source photo: error (in conditioning=source) | drop those
    masks: str | None = None  # a folder of garment masks, as `python -m lora_dae.data masks` writes it
    flip: bool = False  # also train on mirrored pairs
    # Not pairs whose captions, the publisher's too, or attributes have one of these words, also with -s, -es, -ing.
    no_flip_words: list[str] = field(default_factory=lambda: ["logo", "text", "letter", "left", "right"])
    captions: CaptionConfig = field(default_factory=CaptionConfig)


@dataclass
class AdapterConfig:
    """LoRA by PEFT: which groups of layers, at which rank."""

    targets: list[str] = field(default_factory=lambda: ["cross_attention", "conv"])  # of TARGET_GROUPS
    rank: int = 16
    alpha: float | None = None  # None = rank (scale 1)
    conv_rank: int | None = None  # None = rank
    conv_alpha: float | None = None  # None = conv_rank
    dropout: float = 0.0
    init: str = "kaiming"  # kaiming (PEFT's default) | gaussian
    use_dora: bool = False
    use_rslora: bool = False
    kernel: str = "fused"  # fused (one product per layer) | peft (PEFT's own three)
    init_from: str | None = None  # start from this LoRA file (kohya's or diffusers' layout)
    allow_partial: bool = False  # leave out layers of init_from that do not train here
    full_finetune: bool = False  # train every UNet weight instead of an adapter (a baseline)
    kind: str = "lora"  # lora | loha | lokr | textual_inversion: the others to compare with
    words: int = 4  # textual_inversion: vectors in front of every caption

    @property
    def trains_text(self) -> bool:
        """Whether the text encoders train, so that captions are encoded in every step."""
        return "text_encoder" in self.targets


@dataclass
class EnhancementConfig:
    """The adaptive enhancement module in every reverse step."""

    placement: str = "prediction"  # prediction | direction | none
    enabled: bool = True
    strength: float = 1.0  # a sampling-time number; training does not depend on it
    gain: bool = True  # a gain per band, place and noise level: all that acts without a source photo
    texture: bool = True  # the source photo's bands, brought to where they belong (conditioning=source)
    decoder: bool = True  # both once more on the decoded pixels
    levels: int = 3  # undecimated frequency bands
    hidden: int = 32
    max_log_gain: float = 0.405  # log(1.5)
    losses: list[str] = field(default_factory=lambda: list(LOSSES))  # beside errors of bands, which always count
    gate_inputs: str = "energy"  # what gates see beside time: energy of each band | place: of all together | time: none
    texture_steps: int = 160  # of the texture's training, which comes first
    texture_batch_size: int = 16
    decoder_steps: int = 40  # of the decoder stage's
    decoder_learning_rate: float = 1e-2
    registered: bool = False  # texture of sources that are not in place: they are moved to where the drawn garment is
    agreement: bool = True  # of texture: it stays out where the caption says otherwise than the source photo shows
    joint: bool = False  # the texture trains in the adapter's steps, both on both losses, instead of after it
    wrong_source: float = 0.15  # share of its batches that shows the module another sample's source
    max_steps: int = 10  # of the gain's training; each is one whole sampling chain
    batch_size: int = 8  # of decoder and gain
    learning_rate: float = 2e-2  # of texture and gain
    guidance_range: list[float] = field(default_factory=lambda: [1.0, 8.0])
    steps_range: list[int] = field(default_factory=lambda: [8, 50])
    # How validation pairs are drawn to calibrate it; 0 and []: as the studio's are.
    judged_steps: int = 0
    judged_guidance: list[float] = field(default_factory=list)  # of text and source


@dataclass
class ObjectiveConfig:
    """The LoRA's own loss."""

    min_snr_gamma: float = 5.0  # 0 = unweighted
    caption_dropout: float = 0.1
    source_dropout: float = 0.1
    prior_weight: float = 0.0  # DreamBooth's prior preservation: of the loss on the frozen backbone's own pictures
    prior_images: int = 64  # so many of them, drawn before the first step
    prior_caption: str = "a photo of a person"
    low_resolution_share: float = 0.0  # of the steps, the first ones, on latents of half the size: quicker, coarser
    token_share: float = 1.0  # of the tokens that each self-attention sees in a training step: quicker, noisier
    garment_weight: float = 1.0  # how much an error on the garment counts against one beside it; needs masks


@dataclass
class OptimizerConfig:
    learning_rate: float = 2e-3
    source_learning_rate: float | None = None  # of the source photo's input layer; None = learning_rate
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    warmup_steps: int = 20
    ema_decay: float = 0.99


@dataclass
class SamplingConfig:
    scheduler: str = "dpm++"
    num_inference_steps: int = 12
    guidance_scale: float = 1.75  # between 1.5 and 2, the best at strength 0: experiments/tuning
    source_guidance_scale: float = 1.75  # equal to guidance_scale: two network calls a step, else three
    batch_size: int = 32
    seed: int = 1234
    method: str = "none"  # one of METHODS
    method_options: dict[str, float] = field(default_factory=dict)  # in place of those in METHODS
    tiled_decode: bool = False  # large pictures leave the VAE in overlapping tiles: less memory, slightly other pixels


@dataclass
class EvaluationConfig:
    num_samples: int = 128
    features: str = "effnet"  # effnet (offline) | inception (needs `pip install lora-dae[fid]`)
    frozen: bool = True  # also measure the frozen backbone
    bootstrap: int = 1000
    lpips: str | None = None  # safetensors of torchvision's AlexNet features; None = LPIPS is left out
    dists: bool = False  # needs torchvision and its VGG16 weights
    clip: str | None = None  # a CLIP model (folder or hub name) for CLIPScore; None = left out
    clean_fid: bool = False  # FID and KID by clean-fid, for final tables (needs `pip install lora-dae[fid]`)
    dinov2: str | None = None  # a DINOv2 model (folder or hub name) for FD-DINOv2; None = left out
    cmmd: str | None = None  # a CLIP vision model (folder or hub name) for CMMD; None = left out
    controls: bool = True  # also real photos: training ones, through the VAE, blurred, over-sharpened
    split: str = "test"  # test | val: for choosing settings
    first_pair: int = 0  # of the split: those before it are passed over
    wrong_source: bool = False  # every picture is steered by the next pair's source photo
    reconstructions: bool = False  # also distances to the real photos as the VAE gives them back


@dataclass
class ExportConfig:
    """What the run's adapter folder holds for other programs."""

    kohya: bool = True  # also adapter_kohya.safetensors (ComfyUI, A1111, Forge, kohya)
    dtype: str = "fp32"  # of that file: fp32 | fp16 | bf16
    license: str = "other"  # in the model card's head


@dataclass
class TrackingConfig:
    """Where numbers and pictures go, besides the run folder."""

    logger: str = "wandb"  # wandb | tensorboard | csv | none; the first two write the CSV log as well
    wandb: str = "auto"  # auto (online if logged in, else offline) | online | offline | disabled
    project: str = "lora-dae"
    group: str | None = None
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    sample_every_n_steps: int = 200
    num_grid_prompts: int = 6
    distance_every_n_steps: int = 0  # fd_effnet, kd_effnet of evaluation.num_samples validation prompts; 0 = off


@dataclass
class Config:
    """One run. ``trainer`` takes lightning.Trainer's own argument names, and ``early_stop_patience``."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    enhancement: EnhancementConfig = field(default_factory=EnhancementConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    name: str = "default"
    conditioning: str = "source"  # source (the garment photo steers the image) | none (text only)
    seed: int = 0
    run_dir: str = MISSING
    ckpt_path: str | None = None  # a checkpoint, or "last"
    store: str | None = "auto"  # a folder of finished trainings; what is there is not trained again. auto: in sweeps
    plan: bool = False  # say what would train and what it needs, load no weight, and stop


def register() -> None:
    """Put the schema into Hydra's ConfigStore; the YAML files under conf/ start from it."""
    ConfigStore.instance().store(name="schema", node=Config)


@cache
def _schema() -> Any:
    return OmegaConf.structured(Config)


def from_dict(values: dict[str, Any]) -> Config:
    """A typed Config from plain values; unknown keys and wrong types raise ConfigError."""
    try:
        merged = OmegaConf.merge(_schema(), values)  # which copies it
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"the config does not fit: {str(error).splitlines()[0]}.") from error


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain values of a Config, as they are saved in a run's config.yaml, or of a section of it."""
    return OmegaConf.to_container(OmegaConf.structured(cfg))  # type: ignore[return-value]


def overridden(section: Section, request: Any) -> Section:
    """A part of the config with the request's values of the same names, where they are given (not None)."""
    names = {f.name for f in fields(section)} & set(vars(request))
    return replace(section, **{name: getattr(request, name) for name in names if getattr(request, name) is not None})


def overridden_sampling(sampling: SamplingConfig, request: Any) -> SamplingConfig:
    """``overridden``; another method comes with its settings in METHODS."""
    given = overridden(sampling, request)
    name = request.sampling_method  # `method` alone is a group of conf/
    return given if name is None else replace(given, method=name, method_options={})


def conf_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it when installed."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"
