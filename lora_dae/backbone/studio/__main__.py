"""``python -m lora_dae.backbone.studio STEP``: see the package's docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_dae.backbone.allocator import keep_freed_memory
from lora_dae.backbone.layout import STUDIO


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lora_dae.backbone.studio", description=__doc__)
    parser.add_argument("step", choices=("autoencoder", "denoiser", "card"))
    parser.add_argument("--minutes", type=float, default=150, help="training time in all, over every call")
    parser.add_argument("--work", type=Path, default=Path("build/backbone"), help="data cache and checkpoints")
    parser.add_argument("--weights", type=Path, default=STUDIO, help="where the diffusers folder goes")
    parser.add_argument("--photos", type=Path, help="a folder of real photos with captions, mixed in")
    args = parser.parse_args()
    keep_freed_memory()
    if args.step == "autoencoder":
        from lora_dae.backbone.studio import autoencoder

        autoencoder.train(args.minutes, args.work, args.weights, args.photos)
    elif args.step == "denoiser":
        from lora_dae.backbone.studio import denoiser

        denoiser.train(args.minutes, args.work, args.weights, args.photos)
    else:
        from lora_dae.backbone.studio import card

        card.write(args.work, args.weights)


if __name__ == "__main__":
    main()
