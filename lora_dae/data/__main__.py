"""``python -m lora_dae.data COMMAND [data=... overrides as for train.py]``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from rich.console import Console

from lora_dae.config import CaptionConfig, ConfigError, DataConfig, conf_dir, from_dict, register
from lora_dae.data.captioner import PROMPT
from lora_dae.data.export import LAYOUTS
from lora_dae.data.masks import PARTS
from lora_dae.data.sources import check_outside
from lora_dae.rules import check

console = Console()


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    try:
        cfg = data_config(args.overrides)
        check_outside(cfg, args.to, "--to")
        args.command(cfg, args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def data_config(overrides: list[str]) -> DataConfig:
    """``data.*`` as train.py would see it with these overrides; ConfigError for what it would refuse."""
    register()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose("train", [*overrides, "run_dir=."])
    except HydraException as error:
        raise ConfigError(f"these overrides do not fit: {str(error).splitlines()[0]}.") from error
    cfg = from_dict(OmegaConf.to_container(composed, resolve=True))  # type: ignore[arg-type]
    check(cfg)
    return cfg.data


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_dae.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("inspect", help="look before you train: a table and a contact sheet")
    command.add_argument("--to", type=Path, default=Path("contact_sheet.html"))
    command.add_argument("--per-split", type=int, default=24, help="pairs shown of each split")
    command.add_argument("--allow-duplicates", action="store_true", help="accept photos that are in two splits")
    command.set_defaults(command=_inspect)
    command = commands.add_parser("export", help="write the data in a published layout")
    command.add_argument("--layout", required=True, help=", ".join(LAYOUTS))
    command.add_argument("--to", type=Path, required=True, help="a new folder")
    command.set_defaults(command=_export)
    command = commands.add_parser("shards", help="write the data as tar shards, files as they are")
    command.add_argument("--to", type=Path, required=True, help="a new folder")
    command.set_defaults(command=_export, layout="shards")
    command = commands.add_parser("caption", help="let a vision model write the captions that are missing")
    command.add_argument("--to", type=Path, required=True, help="captions.jsonl, continued where it ends")
    command.add_argument("--endpoint", help="an OpenAI-compatible server such as http://localhost:8000/v1")
    command.add_argument("--model", required=True, help="its name there, or without --endpoint a transformers model")
    command.add_argument("--prompt", default=PROMPT)
    command.add_argument("--per-minute", type=float, default=60.0, help="at most so many requests")
    command.set_defaults(command=_caption)
    command = commands.add_parser("masks", help="let a segmentation model draw the garment masks that are missing")
    command.add_argument("--to", type=Path, required=True, help="a folder beside the data, continued where it ends")
    command.add_argument("--model", type=Path, required=True, help="a MediaPipe image segmenter, .tflite")
    command.add_argument("--part", choices=PARTS, default="garment")
    command.set_defaults(command=_masks)
    for command in commands.choices.values():
        command.add_argument("overrides", nargs="*", help="data=folder data.root=photos ...")
    return parser


def _inspect(cfg: DataConfig, args: argparse.Namespace) -> None:
    from lora_dae.data.inspect import check_duplicates, print_survey, survey
    from lora_dae.data.sheet import write_sheet
    from lora_dae.data.sources import licence_notice, load_splits

    splits = load_splits(cfg)
    found = survey(cfg, splits)
    print_survey(found, console)
    write_sheet(args.to, cfg, found, splits, args.per_split, licence_notice(cfg))
    console.print(f"contact sheet  {args.to}", soft_wrap=True, highlight=False)
    if not args.allow_duplicates:
        check_duplicates(found)


def _export(cfg: DataConfig, args: argparse.Namespace) -> None:
    from lora_dae.data.export import export

    counts = export(cfg, args.layout, args.to)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(f"{args.layout}  {told}  {args.to}", soft_wrap=True, highlight=False)


def _caption(cfg: DataConfig, args: argparse.Namespace) -> None:
    from lora_dae.data.captioner import endpoint_captioner, fill_captions, transformers_captioner

    if args.endpoint:
        describe = endpoint_captioner(args.endpoint, args.model, args.prompt, args.per_minute)
    else:
        describe = transformers_captioner(args.model, args.prompt)
    count = fill_captions(cfg, args.to, describe, args.model)
    console.print(
        f"{count} captions in {args.to}: read them, set \"reject\": true where they are wrong, then train with "
        f"data.captions.file={args.to}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _masks(cfg: DataConfig, args: argparse.Namespace) -> None:
    from lora_dae.data.masks import fill_masks, mediapipe_segmenter
    from lora_dae.data.sources import list_entries

    with mediapipe_segmenter(args.model, args.part) as segment:
        entries = list_entries(replace(cfg, captions=CaptionConfig(missing="drop")))  # captions do not matter here
        count, empty = fill_masks(entries, args.to, segment, cfg.background, args.part)
    console.print(f"{count} masks in {args.to}: train with data.masks={args.to}", soft_wrap=True, highlight=False)
    if empty:
        console.print(f"nothing found in {len(empty)} of them: {', '.join(empty[:5])}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
