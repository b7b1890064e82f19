"""The rooms: each imports only from those before it, and ARCHITECTURE.md says the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_dae"
# In the order in which data flows; cli.py stands at the door and may import all of them.
ROOMS = (
    "config rules diffusion data backbone adapter enhancement sampling evaluation".split()
    + "vqa study studio_app export training sweep dashboard cli".split()
)
MAX_LINES = 400
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str | None:
    """The room that a module belongs to; None for lora_dae/__init__.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported_rooms(source: str, package: list[str]) -> set[str]:
    """The rooms that a module's text imports, wherever in it; ``package`` is what "." means there."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names += [f"{module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "lora_dae" and len(part) > 1 and not part[1].startswith("_")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_from_earlier_rooms(path: Path) -> None:
    package = list(path.relative_to(ROOT).parent.parts)
    imported = imported_rooms(path.read_text(encoding="utf-8"), package)
    room = room_of(path)
    if room is None:
        allowed = {"sampling"}  # the package's own door: attach and detach
    elif path.name == "__main__.py":
        allowed = set(ROOMS)  # a room's command is a door as well
    else:
        assert room in ROOMS, f"{path.name} belongs to no room: put it into one, or add the room to ROOMS"
        allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert imported <= allowed, f"{path} ({room}) may not import from {sorted(imported - allowed)}"


def test_the_rule_sees_every_form_of_import() -> None:
    source = """
import lora_dae.training.run
from lora_dae import evaluation
def late():
    from lora_dae.sampling.loop import sample
    from .. import adapter
    from ..data.pair import Pair
    from . import layout
"""
    found = imported_rooms(source, ["lora_dae", "backbone"])
    assert found == {"training", "evaluation", "sampling", "adapter", "data", "backbone"}


def test_architecture_md_lists_the_rooms_in_this_order() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lists = [re.findall(r"^\s*lora_dae/(\w+)(?:\.py|/)", block, flags=re.MULTILINE) for block in blocks]
    listed = next((rooms for rooms in lists if len(rooms) > 2), [])
    assert [room for room in listed if room != "cli"] == ROOMS[:-1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_one_idea_per_file(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines: split it"
