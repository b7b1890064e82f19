"""What fits together in a config: every rule that spans its fields, checked before any weight is loaded."""

from __future__ import annotations

import math
from operator import attrgetter
from pathlib import Path

from lora_dae.config import (
    CONDITIONINGS,
    DIFFICULTIES,
    GATE_INPUTS,
    LOGGERS,
    LOSSES,
    METHODS,
    PLACEMENTS,
    SCHEDULERS,
    SOURCES,
    TARGET_GROUPS,
    Config,
    ConfigError,
    EvaluationConfig,
)

MOST_STEPS = 999  # of the 1000 timesteps that Stable Diffusion is trained on; solvers begin one further
OPTIONS: dict[str, tuple[object, ...]] = {
    "conditioning": CONDITIONINGS,
    "enhancement.placement": PLACEMENTS,
    "enhancement.gate_inputs": GATE_INPUTS,
    "enhancement.losses": LOSSES,  # each of a list
    "sampling.scheduler": SCHEDULERS,
    "sampling.method": tuple(METHODS),
    "data.name": SOURCES,
    "data.cache": ("disk", "memory", "off"),
    "data.captions.missing": ("error", "file_name", "category", "drop"),
    "data.missing_source": ("error", "drop"),
    "adapter.kind": ("lora", "loha", "lokr", "textual_inversion"),
    "adapter.init": ("kaiming", "gaussian"),
    "adapter.kernel": ("fused", "peft"),
    "adapter.targets": TARGET_GROUPS,
    "tracking.logger": LOGGERS,
    "backbone.prediction_type": ("auto", "epsilon", "v_prediction"),
    "backbone.weights": ("fp32", "bf16", "fp16", "int8"),
    "backbone.gradient_checkpointing": (False, True, "attention"),
    "backbone.attention": ("auto", "plain", "sdpa"),
    "export.dtype": ("fp32", "fp16", "bf16"),
}
LEAST = {  # None is left alone
    "backbone.text_chunks": 1,
    "adapter.words": 1,
    "adapter.rank": 1,
    "adapter.conv_rank": 1,
    "enhancement.strength": 0,
    "enhancement.max_steps": 1,
    "enhancement.batch_size": 1,
    "enhancement.learning_rate": 0,
    "enhancement.texture_steps": 1,
    "enhancement.texture_batch_size": 1,
    "enhancement.decoder_steps": 1,
    "enhancement.decoder_learning_rate": 0,
    "enhancement.judged_steps": 0,
    "data.batch_size": 1,
    "data.captions.shuffles": 0,
    "data.captions.keep_tags": 0,
    "data.max_images": 1,
    "data.train_size": 1,
    "data.val_size": 1,
    "data.test_size": 2,
    "sampling.num_inference_steps": 1,
    "sampling.batch_size": 1,
    "sampling.guidance_scale": 0,
    "sampling.source_guidance_scale": 0,
    "optimizer.learning_rate": 0,
    "optimizer.source_learning_rate": 0,
    "objective.garment_weight": 0,
    "objective.prior_weight": 0,
    "objective.prior_images": 1,
    "objective.min_snr_gamma": 0,
    "tracking.num_grid_prompts": 1,
}
SHARES = (
    "objective.caption_dropout",
    "objective.source_dropout",
    "enhancement.wrong_source",
    "adapter.dropout",
    "objective.low_resolution_share",
    "optimizer.ema_decay",
    "data.val_fraction",
    "data.test_fraction",
    "data.max_bad_fraction",
)


def check(cfg: Config, trains: bool = True) -> None:
    """Every rule over the config alone; raises ConfigError before any weight is loaded.

    ``trains``: False for what draws with a finished run, which younger rules over training do not shut out, nor
    files that only its measuring needed.
    """
    _check_values(cfg)
    check_evaluation(cfg.evaluation, files=trains)
    _check_data(cfg)
    _check_adapter(cfg, trains)
    _check_enhancement(cfg, trains)
    _check_sampling(cfg)
    if trains:
        _check_trainer(cfg)


def _check_values(cfg: Config) -> None:
    """Each field for itself."""
    for name, options in OPTIONS.items():
        value = attrgetter(name)(cfg)
        for one in value if name in ("enhancement.losses", "adapter.targets") else [value]:
            _one_of(name, one, options)
    for name, least in LEAST.items():
        value = attrgetter(name)(cfg)
        if value is not None and not value >= least:
            raise ConfigError(f"{name}={value} is below {least}: give at least {least}.")
    for name in SHARES:
        share = attrgetter(name)(cfg)
        if not 0 <= share < 1:
            raise ConfigError(f"{name}={share} is not in [0, 1): give a share such as 0.1.")
    for name in ("adapter.alpha", "adapter.conv_alpha"):
        value = attrgetter(name)(cfg)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} leaves the adapter nothing to learn with: give a number above 0.")
    if not 0 < cfg.objective.token_share <= 1:
        raise ConfigError(f"objective.token_share={cfg.objective.token_share} is not in (0, 1]: 1 is all tokens.")
    for name in ("sampling.num_inference_steps", "enhancement.judged_steps"):
        steps = attrgetter(name)(cfg)
        if steps > MOST_STEPS:
            raise ConfigError(
                f"{name}={steps} are more than there are timesteps to choose from: give at most {MOST_STEPS}."
            )


def _check_data(cfg: Config) -> None:
    d = cfg.data
    if d.name == "studio":
        _one_of("data.difficulty", d.difficulty, DIFFICULTIES)
    elif d.root is None and not cfg.plan:  # a plan counts by the photo then
        raise ConfigError(f"data={d.name} needs data.root: the folder of photos and captions.")
    if d.name in ("shards", "studio") and d.masks is not None:
        raise ConfigError(f"data={d.name} has the masks that it has: leave data.masks out.")
    if d.name == "shards" and d.max_images is not None:
        raise ConfigError("data.max_images needs the list of all photos, which shards do not have: leave it out.")
    if cfg.evaluation.wrong_source and cfg.conditioning != "source":
        raise ConfigError(
            "evaluation.wrong_source=true shows another pair's source photo, and conditioning=none shows none: "
            "drop one."
        )


def _check_adapter(cfg: Config, trains: bool) -> None:
    a = cfg.adapter
    if a.trains_text and (a.full_finetune or a.targets == ["text_encoder"]):
        raise ConfigError(
            "adapter.targets has text_encoder without LoRA in the UNet: add a group of the UNet such as "
            "cross_attention, or leave text_encoder out."
        )
    if trains and a.trains_text and a.kind != "lora":
        raise ConfigError(
            f"adapter.targets has text_encoder, which adapter.kind={a.kind} does not train: leave it out, or use "
            "kind=lora."
        )
    if a.init_from is not None and a.full_finetune:
        raise ConfigError("adapter.init_from starts an adapter, but adapter.full_finetune=true trains none: drop one.")
    if cfg.backbone.weights == "int8" and a.full_finetune:
        raise ConfigError("adapter.full_finetune=true trains weights that backbone.weights=int8 freezes: drop one.")
    if cfg.objective.prior_weight > 0 and a.init_from is not None:
        raise ConfigError(
            "objective.prior_weight keeps to the frozen backbone, which adapter.init_from changes: drop one."
        )
    if trains and a.full_finetune and (a.kind != "lora" or a.use_dora or a.use_rslora or a.dropout):
        raise ConfigError(
            "adapter.full_finetune=true trains the UNet itself: leave kind, use_dora, use_rslora and dropout out."
        )
    if trains and a.kind == "textual_inversion" and cfg.data.captions.shuffles:
        raise ConfigError(
            "adapter.kind=textual_inversion reads one caption a photo: leave data.captions.shuffles at 0."
        )
    if a.kind != "lora" and (a.use_dora or a.use_rslora or a.dropout or a.init_from or a.init != "kaiming"):
        raise ConfigError(
            f"adapter.kind={a.kind} has no use_dora, use_rslora, dropout, init and init_from: leave them as they are."
        )
    if a.kind == "textual_inversion" and cfg.enhancement.enabled:
        raise ConfigError("adapter.kind=textual_inversion has no module that learns on its text: add enhancement=none.")


def _check_enhancement(cfg: Config, trains: bool) -> None:
    e = cfg.enhancement
    if e.gain and not set(e.losses) & {"distribution", "power"}:
        raise ConfigError(
            "enhancement.losses leaves the gain nothing to learn from: keep distribution or power, or set "
            "enhancement.gain=false."
        )
    if e.joint and not (e.texture and cfg.conditioning == "source"):
        raise ConfigError(
            "enhancement.joint=true trains the source's texture with the adapter, but there is none: it needs "
            "conditioning=source and enhancement.texture=true."
        )
    if e.registered and e.enabled and (e.joint or not (e.texture and cfg.conditioning == "source")):
        raise ConfigError(
            "enhancement.registered=true moves source photos whose texture is brought in after the adapter's training: "
            "it needs conditioning=source, enhancement.texture=true and enhancement.joint=false."
        )
    if e.judged_guidance and (len(e.judged_guidance) != 2 or min(e.judged_guidance) < 0):
        raise ConfigError(
            f"enhancement.judged_guidance={e.judged_guidance}: give two scales >= 0, of text and source, or []."
        )
    if _swaps_nothing(cfg):
        raise ConfigError(
            "a step of one sample has no second one whose source photo could be the wrong one: give "
            "enhancement.batch_size and texture_batch_size (joint: data.batch_size) 2, or enhancement.wrong_source=0."
        )
    if e.placement == "direction" and cfg.sampling.scheduler != "ddim":
        raise ConfigError(
            f"enhancement.placement=direction edits DDIM's direction term, which sampling.scheduler="
            f"{cfg.sampling.scheduler} does not have: use ddim, or placement=prediction."
        )
    if e.placement == "direction" and e.enabled and not e.gain:
        raise ConfigError("enhancement.placement=direction edits by the gain, which enhancement.gain=false leaves out.")
    if trains and e.enabled and e.placement == "direction" and e.texture and cfg.conditioning == "source":
        raise ConfigError(
            "enhancement.placement=direction leaves no place for the source photo's texture: use enhancement=direction "
            "or enhancement.texture=false."
        )
    for name, least, most in (("guidance_range", 0, math.inf), ("steps_range", 2, MOST_STEPS)):
        given = getattr(e, name)
        if len(given) != 2 or not least <= given[0] <= given[1] <= most:
            raise ConfigError(
                f"enhancement.{name}={list(given)}: give two numbers, from {least} on, the smaller first."
            )


def _check_sampling(cfg: Config) -> None:
    s = cfg.sampling
    for option in s.method_options:
        _one_of(f"sampling.method_options of {s.method}", option, tuple(METHODS[s.method]))
    options = {**METHODS[s.method], **s.method_options}
    if not all(math.isfinite(value) for value in options.values()) or options.get("start", 0) >= options.get("end", 1):
        raise ConfigError(
            f"sampling.method_options={options} are not finite, or start is not before end: correct them."
        )
    if options.get("interval", 1) < 1 or options.get("interval", 1) % 1:
        raise ConfigError(
            f"sampling.method_options.interval={options['interval']} counts calls: give a whole number from 1 on."
        )
    check_method(cfg)


def _check_trainer(cfg: Config) -> None:
    trainer = cfg.trainer
    steps, interval = trainer.get("max_steps"), trainer.get("val_check_interval")
    if "max_steps" in trainer and (steps is None or int(steps) < 1):
        raise ConfigError(f"trainer.max_steps={steps} is no number of steps: give at least 1.")
    precision = str(trainer.get("precision", "auto"))  # in true halves the adapter's steps would be rounded away
    _one_of("trainer.precision", precision, ("auto", "32-true", "bf16-mixed", "16-mixed"))
    if interval is not None and interval < 1:
        raise ConfigError(f"trainer.val_check_interval={interval} counts steps here: give a whole number from 1 on.")
    patience = trainer.get("early_stop_patience")
    if patience is not None and (not isinstance(patience, int) or patience < 1):
        raise ConfigError(f"trainer.early_stop_patience={patience} counts validations: give 1 or more, or null.")
    if patience is not None and trainer.get("limit_val_batches") == 0:
        raise ConfigError("trainer.early_stop_patience counts validations, which limit_val_batches=0 leaves out.")
    if patience is not None and steps is not None and interval is not None and (1 + patience) * interval >= steps:
        raise ConfigError(
            f"trainer.early_stop_patience={patience} cannot stop {steps} steps early with a validation every "
            f"{interval}: give trainer.val_check_interval={max(1, int(steps) // (4 * (1 + patience)))}, or more steps."
        )
    distance = cfg.tracking.distance_every_n_steps
    if steps is not None and distance >= int(steps):
        raise ConfigError(
            f"tracking.distance_every_n_steps={distance} never comes in {steps} steps: give less, or 0 for none."
        )


def check_method(cfg: Config) -> None:
    """The rules over ``sampling.method`` with the rest of the config; raises ConfigError."""
    s = cfg.sampling
    options = {**METHODS[s.method], **s.method_options}
    if s.method == "freeu" and not all(options.values()):
        raise ConfigError("sampling.method_options has a FreeU scale of 0, for which diffusers leaves all of it out.")
    if s.method == "wavelet" and s.scheduler in ("unipc", "pndm", "heun"):
        raise ConfigError(
            f"sampling.method=wavelet corrects where a step leads to, and {s.scheduler} goes on from elsewhere: use "
            "ddim, dpm++ or euler."
        )
    scales = [s.guidance_scale] + [s.source_guidance_scale] * (cfg.conditioning == "source")
    if s.method in ("apg", "rescale", "frequency") and all(scale == 1 for scale in scales):
        raise ConfigError(
            f"sampling.method={s.method} changes what guidance adds, and sampling.guidance_scale=1 adds nothing: give "
            "more, or method=none."
        )


def check_evaluation(cfg: EvaluationConfig, files: bool = True) -> None:
    """The rules over ``evaluation`` alone; raises ConfigError. ``files``: also that those it names are there."""
    _one_of("evaluation.features", cfg.features, ("effnet", "inception"))
    _one_of("evaluation.split", cfg.split, ("test", "val"))
    if cfg.first_pair < 0:
        raise ConfigError(f"evaluation.first_pair={cfg.first_pair} is below 0: 0 is the split's first pair.")
    if files and cfg.lpips is not None and not Path(cfg.lpips).is_file():
        raise ConfigError(f"evaluation.lpips={cfg.lpips} does not exist: give AlexNet's features as safetensors.")
    if cfg.num_samples < 2:
        raise ConfigError(f"evaluation.num_samples={cfg.num_samples} is below 2: give at least 2.")
    if cfg.clean_fid and cfg.features == "inception":
        raise ConfigError("evaluation.features=inception and clean_fid=true both give a metric called fid: drop one.")
    if cfg.bootstrap != 0 and cfg.bootstrap < 2:
        raise ConfigError(f"evaluation.bootstrap={cfg.bootstrap}: give e.g. 1000, or 0 for no intervals.")


def _one_of(name: str, value: object, options: tuple[object, ...]) -> None:
    if value not in options:
        raise ConfigError(f"{name}={value} is unknown: use one of {', '.join(str(option) for option in options)}.")


def _swaps_nothing(cfg: Config) -> bool:
    """Whether gates are to learn from wrong sources, and each step sees one sample alone."""
    e = cfg.enhancement
    learns = e.enabled and e.placement != "none" and cfg.conditioning == "source" and e.wrong_source > 0
    sizes = [e.batch_size] * e.decoder + [cfg.data.batch_size if e.joint else e.texture_batch_size] * e.texture
    alone = cfg.trainer.get("devices", 1) == 1 and cfg.trainer.get("num_nodes", 1) == 1
    return learns and alone and 1 in sizes
