"""Speed and size, as ratios measured side by side in one run: ``make bench``."""

import os

# As the commands do (lora_dae/cli.py): rows of several sizes in turns would make all their kernels anew in every turn.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
