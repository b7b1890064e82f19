"""What fits together in a config: every rule that spans its fields, checked before any weight is loaded."""

from __future__ import annotations

import math
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


def check(cfg: Config, trains: bool = True) -> None:
    """Every rule over the config alone; raises ConfigError before any weight is loaded.

    ``trains``: False for what draws with a finished run, which younger rules over training do not shut out.
    """
    _one_of("conditioning", cfg.conditioning, CONDITIONINGS)
    _one_of("enhancement.placement", cfg.enhancement.placement, PLACEMENTS)
    _one_of("enhancement.gate_inputs", cfg.enhancement.gate_inputs, GATE_INPUTS)
    for loss in cfg.enhancement.losses:
        _one_of("enhancement.losses", loss, LOSSES)
    if cfg.enhancement.gain and not set(cfg.enhancement.losses) & {"distribution", "power"}:
        raise ConfigError(
            "enhancement.losses leaves the gain nothing to learn from: keep distribution or power, or set "
            "enhancement.gain=false."
        )
    if cfg.enhancement.joint and not (cfg.enhancement.texture and cfg.conditioning == "source"):
        raise ConfigError(
            "enhancement.joint=true trains the source's texture with the adapter, but there is none: it needs "
            "conditioning=source and enhancement.texture=true."
        )
    _one_of("sampling.scheduler", cfg.sampling.scheduler, SCHEDULERS)
    _one_of("sampling.method", cfg.sampling.method, tuple(METHODS))
    for option in cfg.sampling.method_options:
        _one_of(f"sampling.method_options of {cfg.sampling.method}", option, tuple(METHODS[cfg.sampling.method]))
    _one_of("data.name", cfg.data.name, SOURCES)
    _one_of("data.cache", cfg.data.cache, ("disk", "memory", "off"))
    _one_of("data.captions.missing", cfg.data.captions.missing, ("error", "file_name", "category", "drop"))
    _one_of("data.missing_source", cfg.data.missing_source, ("error", "drop"))
    _one_of("adapter.kind", cfg.adapter.kind, ("lora", "loha", "lokr", "textual_inversion"))
    _one_of("adapter.init", cfg.adapter.init, ("kaiming", "gaussian"))
    _one_of("adapter.kernel", cfg.adapter.kernel, ("fused", "peft"))
    _one_of("tracking.logger", cfg.tracking.logger, LOGGERS)
    _one_of("backbone.prediction_type", cfg.backbone.prediction_type, ("auto", "epsilon", "v_prediction"))
    _one_of("backbone.weights", cfg.backbone.weights, ("fp32", "bf16", "fp16", "int8"))
    _one_of("backbone.gradient_checkpointing", cfg.backbone.gradient_checkpointing, (False, True, "attention"))
    _one_of("export.dtype", cfg.export.dtype, ("fp32", "fp16", "bf16"))
    for group in cfg.adapter.targets:
        _one_of("adapter.targets", group, TARGET_GROUPS)
    if cfg.adapter.trains_text and (cfg.adapter.full_finetune or cfg.adapter.targets == ["text_encoder"]):
        raise ConfigError(
            "adapter.targets has text_encoder without LoRA in the UNet: add a group of the UNet such as "
            "cross_attention, or leave text_encoder out."
        )
    if trains and cfg.adapter.trains_text and cfg.adapter.kind != "lora":
        raise ConfigError(
            f"adapter.targets has text_encoder, which adapter.kind={cfg.adapter.kind} does not train: leave it out, or "
            "use kind=lora."
        )
    if cfg.data.name == "studio":
        _one_of("data.difficulty", cfg.data.difficulty, DIFFICULTIES)
    elif cfg.data.root is None and not cfg.plan:  # a plan counts by the photo then
        raise ConfigError(f"data={cfg.data.name} needs data.root: the folder of photos and captions.")
    if cfg.data.name in ("shards", "studio") and cfg.data.masks is not None:
        raise ConfigError(f"data={cfg.data.name} has the masks that it has: leave data.masks out.")
    check_evaluation(cfg.evaluation)
    if cfg.evaluation.wrong_source and cfg.conditioning != "source":
        raise ConfigError(
            "evaluation.wrong_source=true shows another pair's source photo, and conditioning=none shows none: "
            "drop one."
        )
    if cfg.data.name == "shards" and cfg.data.max_images is not None:
        raise ConfigError("data.max_images needs the list of all photos, which shards do not have: leave it out.")
    at_least = {
        "backbone.text_chunks": (cfg.backbone.text_chunks, 1),
        "adapter.words": (cfg.adapter.words, 1),
        "adapter.rank": (cfg.adapter.rank, 1),
        "adapter.conv_rank": (1 if cfg.adapter.conv_rank is None else cfg.adapter.conv_rank, 1),
        "enhancement.strength": (cfg.enhancement.strength, 0),
        "enhancement.max_steps": (cfg.enhancement.max_steps, 1),
        "enhancement.batch_size": (cfg.enhancement.batch_size, 1),
        "enhancement.texture_steps": (cfg.enhancement.texture_steps, 1),
        "enhancement.texture_batch_size": (cfg.enhancement.texture_batch_size, 1),
        "enhancement.decoder_steps": (cfg.enhancement.decoder_steps, 1),
        "enhancement.judged_steps": (cfg.enhancement.judged_steps, 0),
        "data.batch_size": (cfg.data.batch_size, 1),
        "data.captions.shuffles": (cfg.data.captions.shuffles, 0),
        "data.captions.keep_tags": (cfg.data.captions.keep_tags, 0),
        "data.train_size": (cfg.data.train_size, 1),
        "data.val_size": (cfg.data.val_size, 1),
        "data.test_size": (cfg.data.test_size, 2),
        "sampling.num_inference_steps": (cfg.sampling.num_inference_steps, 1),
        "sampling.batch_size": (cfg.sampling.batch_size, 1),
        "sampling.guidance_scale": (cfg.sampling.guidance_scale, 0),
        "sampling.source_guidance_scale": (cfg.sampling.source_guidance_scale, 0),
        "optimizer.learning_rate": (cfg.optimizer.learning_rate, 0),
        "optimizer.source_learning_rate": (cfg.optimizer.source_learning_rate or 0, 0),
        "objective.garment_weight": (cfg.objective.garment_weight, 0),
        "objective.prior_weight": (cfg.objective.prior_weight, 0),
        "objective.prior_images": (cfg.objective.prior_images, 1),
        "objective.min_snr_gamma": (cfg.objective.min_snr_gamma, 0),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"{name}={value} is below {least}: give at least {least}.")
    for name, share in {
        "objective.caption_dropout": cfg.objective.caption_dropout,
        "objective.source_dropout": cfg.objective.source_dropout,
        "enhancement.wrong_source": cfg.enhancement.wrong_source,
        "adapter.dropout": cfg.adapter.dropout,
        "objective.low_resolution_share": cfg.objective.low_resolution_share,
        "optimizer.ema_decay": cfg.optimizer.ema_decay,
        "data.val_fraction": cfg.data.val_fraction,
        "data.test_fraction": cfg.data.test_fraction,
        "data.max_bad_fraction": cfg.data.max_bad_fraction,
    }.items():
        if not 0 <= share < 1:
            raise ConfigError(f"{name}={share} is not in [0, 1): give a share such as 0.1.")
    if not 0 < cfg.objective.token_share <= 1:
        raise ConfigError(f"objective.token_share={cfg.objective.token_share} is not in (0, 1]: 1 is all tokens.")
    judged = cfg.enhancement.judged_guidance
    if judged and (len(judged) != 2 or min(judged) < 0):
        raise ConfigError(f"enhancement.judged_guidance={judged}: give two scales >= 0, of text and source, or [].")
    if _swaps_nothing(cfg):
        raise ConfigError(
            "a step of one sample has no second one whose source photo could be the wrong one: give "
            "enhancement.batch_size and texture_batch_size (joint: data.batch_size) 2, or enhancement.wrong_source=0."
        )
    options = {**METHODS[cfg.sampling.method], **cfg.sampling.method_options}
    if not all(math.isfinite(value) for value in options.values()) or options.get("start", 0) >= options.get("end", 1):
        raise ConfigError(
            f"sampling.method_options={options} are not finite, or start is not before end: correct them."
        )
    if options.get("interval", 1) < 1 or options.get("interval", 1) % 1:
        raise ConfigError(
            f"sampling.method_options.interval={options['interval']} counts calls: give a whole number from 1 on."
        )
    check_method(cfg)
    if cfg.adapter.init_from is not None and cfg.adapter.full_finetune:
        raise ConfigError("adapter.init_from starts an adapter, but adapter.full_finetune=true trains none: drop one.")
    if cfg.backbone.weights == "int8" and cfg.adapter.full_finetune:
        raise ConfigError("adapter.full_finetune=true trains weights that backbone.weights=int8 freezes: drop one.")
    if cfg.objective.prior_weight > 0 and cfg.adapter.init_from is not None:
        raise ConfigError(
            "objective.prior_weight keeps to the frozen backbone, which adapter.init_from changes: drop one."
        )
    a = cfg.adapter
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
    if cfg.enhancement.placement == "direction" and cfg.sampling.scheduler != "ddim":
        raise ConfigError(
            f"enhancement.placement=direction edits DDIM's direction term, which sampling.scheduler="
            f"{cfg.sampling.scheduler} does not have: use ddim, or placement=prediction."
        )
    if cfg.enhancement.placement == "direction" and cfg.enhancement.enabled and not cfg.enhancement.gain:
        raise ConfigError("enhancement.placement=direction edits by the gain, which enhancement.gain=false leaves out.")
    e = cfg.enhancement
    if trains and e.enabled and e.placement == "direction" and e.texture and cfg.conditioning == "source":
        raise ConfigError(
            "enhancement.placement=direction leaves no place for the source photo's texture: use enhancement=direction "
            "or enhancement.texture=false."
        )
    for name, least, most in (("guidance_range", 0, math.inf), ("steps_range", 2, MOST_STEPS)):
        given = getattr(cfg.enhancement, name)
        if len(given) != 2 or not least <= given[0] <= given[1] <= most:
            raise ConfigError(
                f"enhancement.{name}={list(given)}: give two numbers, from {least} on, the smaller first."
            )
    for name, steps in (
        ("sampling.num_inference_steps", cfg.sampling.num_inference_steps),
        ("enhancement.judged_steps", cfg.enhancement.judged_steps),
    ):
        if steps > MOST_STEPS:
            raise ConfigError(
                f"{name}={steps} are more than there are timesteps to choose from: give at most {MOST_STEPS}."
            )
    interval = cfg.trainer.get("val_check_interval")
    if interval is not None and interval < 1:
        raise ConfigError(f"trainer.val_check_interval={interval} counts steps here: give a whole number from 1 on.")
    patience = cfg.trainer.get("early_stop_patience")
    if patience is not None and (not isinstance(patience, int) or patience < 1):
        raise ConfigError(f"trainer.early_stop_patience={patience} counts validations: give 1 or more, or null.")
    if patience is not None and cfg.trainer.get("limit_val_batches") == 0:
        raise ConfigError("trainer.early_stop_patience counts validations, which limit_val_batches=0 leaves out.")
    if int(cfg.trainer.get("max_steps", 1)) < 1:
        raise ConfigError(f"trainer.max_steps={cfg.trainer['max_steps']} is below 1: give at least 1.")


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


def check_evaluation(cfg: EvaluationConfig) -> None:
    """The rules over ``evaluation`` alone; raises ConfigError."""
    _one_of("evaluation.features", cfg.features, ("effnet", "inception"))
    _one_of("evaluation.split", cfg.split, ("test", "val"))
    if cfg.first_pair < 0:
        raise ConfigError(f"evaluation.first_pair={cfg.first_pair} is below 0: 0 is the split's first pair.")
    if cfg.lpips is not None and not Path(cfg.lpips).is_file():
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
