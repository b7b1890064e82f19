"""``python -m lora_dae.sweep <folder>``: the report over all finished runs below a folder, made again."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_dae.config import ConfigError
from lora_dae.sweep.report import write_sweep_report


def main() -> None:
    """Print the report's path, or one sentence and exit code 2."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lora_dae.sweep <folder of a sweep>")
    try:
        print(write_sweep_report(Path(sys.argv[1])))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
