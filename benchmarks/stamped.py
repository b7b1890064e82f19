"""python -m benchmarks.stamped STEPS FILE [overrides]: train.py, with the time of every optimizer step written down.

It ends with the last of them, before validation, pictures and report.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback


class Stamps(Callback):
    """Unix times of the first ``steps`` training batches' ends, as a JSON list in ``file``."""

    def __init__(self, steps: int, file: Path) -> None:
        self.steps, self.file = steps, file
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.time())
        if len(self.times) == self.steps:
            self.file.write_text(json.dumps(self.times))
            os._exit(0)


def main() -> None:
    steps, file, *overrides = sys.argv[1:]
    from lora_dae import cli
    from lora_dae.training import run

    run.train = partial(run.train, extra_callbacks=[Stamps(int(steps), Path(file))])
    sys.argv = ["train.py", *overrides]
    cli.train()


if __name__ == "__main__":
    main()
