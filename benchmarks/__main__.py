"""``python -m benchmarks``: what the enhancement costs, against the frozen network; benchmarks.steps has training.

Interleaved repeats, medians. Every figure is a ratio of two things measured in the same process on the same
tensors; seconds are printed for orientation only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from benchmarks.models import arranged, prepared
from benchmarks.timing import interleaved, show
from lora_dae.backbone.allocator import keep_freed_memory
from lora_dae.backbone.load import load_backbone
from lora_dae.backbone.studio.autoencoder import LATENT_CHANNELS
from lora_dae.config import BackboneConfig, SamplingConfig
from lora_dae.data.studio.attributes import draw_look
from lora_dae.data.studio.scene import photo
from lora_dae.enhancement.module import EnhancementModule
from lora_dae.enhancement.registration import register
from lora_dae.sampling.draw import Drawer, as_photos


def studio_unet() -> UNet2DConditionModel:
    unet = load_backbone(BackboneConfig()).unet
    return prepared(arranged(unet, (16, unet.config["in_channels"], 32, 32), 32))


def enhancement(repeats: int) -> dict[str, float]:
    """All that acts on latents against one UNet call, on the studio's latents and on SD 1.5's (random weights).

    With guidance a sampling step has two such calls, so its share is half of this.
    """
    keep_freed_memory()  # as the commands do
    result = {}
    sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    cases: dict[str, tuple[UNet2DConditionModel, tuple[int, ...], int]] = {
        "studio": (studio_unet(), (32, LATENT_CHANNELS, 32, 32), 32),
        "sd15": (sd15.to(memory_format=torch.channels_last), (1, 4, 64, 64), 77),  # type: ignore[call-overload]
    }
    for name, (unet, shape, length) in cases.items():
        unet.requires_grad_(False).eval()
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        text = torch.randn(shape[0], length, unet.config["cross_attention_dim"])
        conditional, source = (x + 0.1 * torch.randn_like(x) for _ in range(2))
        module = EnhancementModule(source_channels=shape[1])

        def network(unet: UNet2DConditionModel = unet, x: Tensor = x, text: Tensor = text) -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                unet(x, 500, text)

        tensors = (x, conditional, x)

        def gain(module: EnhancementModule = module, tensors: tuple[Tensor, ...] = tensors) -> None:
            with torch.no_grad():
                module(*tensors, 0.7, 0.714, 0.3)

        def full(
            module: EnhancementModule = module, tensors: tuple[Tensor, ...] = tensors, source: Tensor = source
        ) -> None:
            with torch.no_grad():
                module(*tensors, 0.7, 0.714, 0.3, source=source)

        functions = {"unet": network, "gain": gain, "full": full}
        seconds = interleaved(functions, repeats if name == "studio" else 3)
        for part in ("gain", "full"):
            result[f"enhancement_share_{name}_{part}"] = seconds[part] / seconds["unet"]
    return result


def registration(repeats: int) -> dict[str, float]:
    """To register a picture's source photo, once in a chain, against one UNet call: the search, and all of it.

    All: previews, the search, the photo moved and encoded again. Studio, 32 pictures.
    """
    keep_freed_memory()
    unet, backbone = studio_unet().requires_grad_(False).eval(), load_backbone(BackboneConfig())
    photos = np.stack([photo(draw_look(0, i, "target"), 0, i, 128).image for i in range(32)])
    module = EnhancementModule(source_channels=LATENT_CHANNELS, registered=True)
    text = torch.randn(len(photos), 32, unet.config["cross_attention_dim"])
    drawer = Drawer(backbone, module, "prediction", "source", 128, SamplingConfig())
    with torch.no_grad():
        latents, shown = backbone.encode_images(photos)[0], as_photos(photos)
        assert module.preview is not None and shown is not None
        module.preview.fit([(latents, shown)])
        target = latents.roll(1, 0)  # other garments: the search takes as long for any

    def network() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            unet(latents, 500, text)

    def search() -> None:
        assert module.preview is not None
        register(module.preview(target), module.preview(latents))

    def whole() -> None:
        placed = module.registering(shown, latents, drawer.encode)
        assert placed is not None
        placed.at(target, 3.0)

    seconds = interleaved({"unet": network, "search": search, "all": whole}, repeats)
    return {f"registration_in_calls_{part}": seconds[part] / seconds["unet"] for part in ("search", "all")}


def rendering(count: int) -> dict[str, float]:
    """Images a second of one core; the cache is rendered on all of them."""
    start = time.perf_counter()
    for i in range(count):
        photo(draw_look(0, i, "target"), 0, i, 128)
    return {"render_images_per_second_per_core": count / (time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks.json"))
    args = parser.parse_args()
    results = {**enhancement(args.repeats), **registration(args.repeats), **rendering(40)}
    show(results, args.output)


if __name__ == "__main__":
    main()
