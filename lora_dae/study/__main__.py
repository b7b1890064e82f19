"""``python -m lora_dae.study create|serve|report key=value ...``

create runs=[runs/a,runs/b] output=studies/one raters=20 pairs=30 opinions=10
serve  study=studies/one port=8000
report study=studies/one
"""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from lora_dae.config import ConfigError


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    commands = {"create": _create, "serve": _serve, "report": _report}
    if not given or given[0] not in commands:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        commands[given[0]](given[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# Each command imports its own part: the server needs no torch, and so little memory.


def _create(arguments: list[str]) -> None:
    from lora_dae.study.create import CreateRequest, create_study

    create_study(read_request(CreateRequest, arguments), Console())


def _serve(arguments: list[str]) -> None:
    from lora_dae.study.serve import ServeRequest, serve_study

    serve_study(read_request(ServeRequest, arguments))


def _report(arguments: list[str]) -> None:
    from lora_dae.study.report import ReportRequest, report_study

    report_study(read_request(ReportRequest, arguments), Console())


def read_request(schema: Any, arguments: list[str]) -> Any:
    """key=value words as the dataclass ``schema``; ConfigError for unknown keys, wrong types and unreadable values."""
    given = []
    for word in arguments:
        if "=" not in word:
            raise ConfigError(f"{word!r} is no key=value: use {', '.join(schema.__dataclass_fields__)}.")
        try:
            given.append(OmegaConf.from_dotlist([word]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{word!r} cannot be read: put the value into double quotes of its own.") from error
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *given))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{reason}: the keys are {', '.join(schema.__dataclass_fields__)}.") from error


if __name__ == "__main__":
    main()
