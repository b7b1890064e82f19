"""Small JSON files that are whole at every moment, also after a kill."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


def write_json(path: Path, values: Any) -> None:
    """Write at once: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def unwritten(error: OSError, path: Path) -> str:
    """One sentence about a file (``path``, unless the error names another) that the disk did not take."""
    where = error.filename or path
    if error.errno in FULL:
        return f"no room left to write {where}: make some; earlier files stay."
    return f"{where} cannot be used ({error.strerror or error}): repair that and give the command again."


def read_json(path: Path) -> dict[str, Any]:
    """What is there, or {} where there is nothing readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
