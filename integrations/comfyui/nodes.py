"""One node: the enhancement in every step, by ComfyUI's post-CFG function. The maths is lora_dae's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_dae.config import ConfigError
from lora_dae.enhancement.denoised import enhance_denoised
from lora_dae.enhancement.files import load_enhancement


class LoraDaeEnhancement:
    """Model in, model out; between ``start_percent`` and ``end_percent`` of sampling the denoised image is edited."""

    CATEGORY = "LoRA-DAE"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802  # ComfyUI's name
        """The widgets."""
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "enhancement": ("STRING", {"default": "", "tooltip": "path of a run's enhancement.safetensors"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 4.0, "step": 0.05}),
                "start_percent": ("FLOAT", {"default": 0.0, **share}),
                "end_percent": ("FLOAT", {"default": 1.0, **share}),
                "first_order": ("BOOLEAN", {"default": True, "tooltip": "on for euler and ddim, off for all others"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, enhancement: str, **_: Any) -> float:  # noqa: N802  # ComfyUI's name
        """When the file was written: ComfyUI keeps what a node made while this and its widgets stay the same."""
        file = Path(enhancement)
        return file.stat().st_mtime if file.is_file() else 0.0

    def apply(
        self, model: Any, enhancement: str, strength: float, start_percent: float, end_percent: float, first_order: bool
    ) -> tuple[Any]:
        """A clone of ``model`` whose samplers call the module after guidance."""
        module = load_enhancement(enhancement).eval().requires_grad_(False)
        if module.gain is None:
            raise ConfigError(
                f"{enhancement} has no gain, the one part that this node adds: its training kept or asked for none. "
                "Leave the node out, or draw with lora_dae.attach for source texture and decoder stage."
            )
        if module.placement == "direction":
            raise ConfigError(
                f"{enhancement} learned to edit DDIM's direction term, which a node cannot: draw with lora_dae.attach."
            )
        sampling = model.get_model_object("model_sampling")
        begin, end = sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent)

        def edit(args: dict[str, Any]) -> Any:
            sigma = float(args["sigma"].max())
            if not end <= sigma <= begin:
                return args["denoised"]
            return enhance_denoised(
                module,
                args["denoised"],
                args.get("cond_denoised"),
                args["input"],
                sigma,
                following_sigma(sigma, args.get("model_options", {})),
                strength,
                float(first_order),
            )

        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(edit)
        return (clone,)


def following_sigma(sigma: float, model_options: dict[str, Any]) -> float:
    """The next noise level of the running schedule; 0 where ComfyUI does not tell (before ``sample_sigmas``)."""
    schedule = model_options.get("transformer_options", {}).get("sample_sigmas")
    if schedule is None:
        return 0.0
    return max((float(s) for s in schedule if float(s) < sigma * (1 - 1e-4)), default=0.0)
