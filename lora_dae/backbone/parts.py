"""Loads one part of a backbone: from its diffusers folder, or out of a single checkpoint."""

from __future__ import annotations

import gzip
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel

from lora_dae.backbone.layout import CONFIGS, BackboneFolder
from lora_dae.config import ConfigError
from lora_dae.diffusion import is_sigma_space

Model = TypeVar("Model", bound=torch.nn.Module)
_PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}


def load_part(
    model_class: type[Model], folder: BackboneFolder, part: str, device: str | torch.device, dtype: torch.dtype
) -> Model:
    """``part`` (unet, vae, text_encoder, text_encoder_2) on ``device``, frozen, in eval mode.

    Only that part's weights are read. Raises ConfigError if its weights are damaged, incomplete, not finite or
    of other shapes than its config says.
    """
    own_folder = folder.vae_path if part == "vae" else folder.path / part
    from_file = folder.single_file is not None and part not in folder.variants
    where = folder.single_file if from_file else own_folder
    try:
        with _quiet():
            if from_file:
                model: Model = _from_file(model_class, folder, part, dtype)
                missing = sorted(n for n, p in model.named_parameters() if p.is_meta)
            else:
                model, info = model_class.from_pretrained(  # type: ignore[attr-defined]
                    own_folder,
                    variant=folder.variants[part],
                    use_safetensors=True,
                    torch_dtype=dtype,
                    output_loading_info=True,
                )
                missing = sorted(info["missing_keys"])
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["it is incomplete"])[0].rstrip(".:")
        raise ConfigError(
            f"the weights in {where} cannot be loaded ({reason}): restore them from the model's source."
        ) from error
    if missing:  # from_pretrained would leave these random, with no more than a warning
        raise ConfigError(f"the weights in {where} lack {len(missing)} tensors, {missing[0]} first: restore them.")
    broken = next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if broken is not None:
        raise ConfigError(f"the weights in {where} are not finite ({broken} of the {part}): restore them.")
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: BackboneFolder, part: str) -> CLIPTokenizer:
    """The tokenizer of a diffusers folder, or CLIP's real vocabulary with a config that the package has.

    Raises ConfigError where one of a folder's files is missing or damaged.
    """
    path = folder.path / part
    words = ("tokenizer.json",) if (path / "tokenizer.json").is_file() else ("vocab.json", "merges.txt")
    missing = next((name for name in (*words, "tokenizer_config.json") if not (path / name).is_file()), None)
    if missing is None:
        try:
            return CLIPTokenizer.from_pretrained(path)
        except Exception as error:  # tokenizers has no class of its own for a damaged file
            raise ConfigError(f"{path} cannot be read ({error}): restore it from the model's source.") from error
    if folder.single_file is None:
        raise ConfigError(f"{path} has no {missing}: restore the tokenizer from the model's source.")
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("tokenizer_class", None)
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), **settings)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's 49,408 tokens and 48,894 merges (Radford et al. 2021).

    The vocabulary follows from the merges: the 256 bytes, the same at the end of a word, one token a merge, and
    the two marks.
    """
    with gzip.open(CONFIGS / "clip_merges.txt.gz", "rt", encoding="utf-8") as stream:
        merges = [tuple(line.split()) for line in stream.read().splitlines()]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges  # type: ignore[return-value]


def load_scheduler(folder: BackboneFolder) -> Any:
    """The noise schedule that the UNet was trained on, with the prediction type that ``folder`` settled on.

    Schedulers of un-normalized samples (SDXL's Euler) are given back as DDIM on the same betas: training adds
    noise to normalized ones. So are those that know no zero terminal SNR, where that is asked for.
    """
    scheduler_class = getattr(diffusers, folder.scheduler_class, None)
    if scheduler_class is None:
        raise ConfigError(
            f"the backbone at {folder.path} uses {folder.scheduler_class}, which diffusers "
            f"{diffusers.__version__} does not have: name another class in scheduler/scheduler_config.json."
        )
    scheduler = scheduler_class.from_pretrained(folder.path / "scheduler")
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        raise ConfigError(
            f"the backbone at {folder.path} uses {folder.scheduler_class}, a noise schedule that no Stable Diffusion "
            "1.x, 2.x or XL was trained on: restore scheduler/scheduler_config.json, or give another backbone."
        )
    changes: dict[str, Any] = {}
    if folder.prediction_type not in (None, scheduler.config.prediction_type):
        changes["prediction_type"] = folder.prediction_type
    marked = bool(scheduler.config.get("rescale_betas_zero_snr"))
    # A class that does not know it keeps it in its config all the same.
    rescaled = marked and "rescale_betas_zero_snr" in inspect.signature(scheduler_class.__init__).parameters
    if folder.zero_terminal_snr and not rescaled:
        # Only trailing timesteps reach pure noise (Lin et al. 2024, section 3.3)
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    elif not folder.zero_terminal_snr and marked:
        changes["rescale_betas_zero_snr"] = False  # asked for
    if not changes and not is_sigma_space(scheduler):
        return scheduler
    defaults = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    config = {**defaults, **{k: v for k, v in scheduler.config.items() if not k.startswith("_")}, **changes}
    return DDIMScheduler.from_config(config)


def _from_file(model_class: Any, folder: BackboneFolder, part: str, dtype: torch.dtype) -> Any:
    """By diffusers' converters, with the configs that ``folder`` names; nothing is fetched."""
    tensors = _tensors(folder, part)
    if not tensors:
        raise KeyError(f"it holds no {part}")
    if issubclass(model_class, PreTrainedModel):
        return create_diffusers_clip_model_from_ldm(
            model_class, tensors, subfolder=part, config=str(folder.path), torch_dtype=dtype, local_files_only=True
        )
    return model_class.from_single_file(
        tensors, config=str(folder.path), subfolder=part, torch_dtype=dtype, local_files_only=True
    )


def _tensors(folder: BackboneFolder, part: str) -> dict[str, Tensor]:
    """This part's tensors alone, so that no more than one part is in memory twice."""
    assert folder.single_file is not None
    with safe_open(folder.single_file, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(_PREFIXES[part])]  # noqa: SIM118
        return {name: opened.get_tensor(name) for name in names}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no warning that AutoencoderTiny does not know its own block_out_channels."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    levels = [library.get_verbosity() for library in libraries]
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()
