"""python -m benchmarks.compare OLD NEW: which ratios of two runs of benchmarks.steps moved beyond their noise."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table


def moved(old: dict, new: dict) -> dict[str, tuple[float, float, bool]]:
    """Row -> (old ratio to the floor, new one, whether they differ by more than twice their joint spread)."""
    found = {}
    for name in old:
        if name in new:
            before, after = old[name]["of_floor"], new[name]["of_floor"]
            noise = 2 * (old[name]["of_floor_spread"] ** 2 + new[name]["of_floor_spread"] ** 2) ** 0.5
            found[name] = (before, after, abs(after - before) > noise)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    old, new = (json.loads(p.read_text(encoding="utf-8")) for p in (args.old, args.new))
    if old["machine"] != new["machine"]:
        raise SystemExit(
            f"error: {args.old} is of {old['machine']}, {args.new} of {new['machine']}: compare like with like."
        )
    cases = {case["title"]: case["rows"] for case in old["cases"]}
    both = [case for case in new["cases"] if case["title"] in cases]
    if not both:
        raise SystemExit(f"error: {args.old} and {args.new} have no case in common: compare like with like.")
    for case in both:
        table = Table("step", "old, of the floor", "new", "", title=case["title"])
        for name, (before, after, differs) in moved(cases[case["title"]], case["rows"]).items():
            word = ("slower" if after > before else "faster") if differs else "within noise"
            table.add_row(name, f"{before:.3f}", f"{after:.3f}", word)
        Console().print(table)


if __name__ == "__main__":
    main()
