"""The table in the forms that other programs read: CSV (one line a number) and LaTeX."""

from __future__ import annotations

import csv
import io
import re

from lora_dae.evaluation.report.table import REFERENCES, ResultsTable, format_name

COLUMNS = ("row", "kind", "metric", "value", "low", "high", "better", "p_holm", "verdict", "std")
TEX_ARROWS = {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "→ 1": r"$\rightarrow 1$"}


def table_rows(table: ResultsTable) -> list[list[str | float | None]]:
    """A row of ``COLUMNS`` for each row and metric; p and verdict against the baseline where they are compared."""
    corrected = table.corrected()
    found: list[list[str | float | None]] = []
    for kind, rows in (("method", table.methods), ("reference", table.references)):
        for row, metrics in rows.items():
            for name, metric in metrics.items():
                m = metric.as_dict()
                p = corrected.get((row, name)) if kind == "method" else None
                said = table.verdict(row, name) if kind == "method" else ""
                found.append([row, kind, name, m["value"], m["low"], m["high"], m["better"], p, said, m.get("std")])
    return found


def csv_text(table: ResultsTable) -> str:
    """``table_rows`` as CSV, what is not known left empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(["" if cell is None else cell for cell in row] for row in table_rows(table))
    return out.getvalue()


def latex(table: ResultsTable) -> str:
    r"""A booktabs table for each block; better than the baseline in bold, worse in italics, intervals small."""
    marks = {"better": r"\textbf{%s}", "worse": r"\textit{%s}", "": "%s"}
    parts = [(title, list(table.methods), names) for title, names in table.blocks().items()]
    parts += [
        (f"{REFERENCES}: {t}", list(table.references), names) for t, names in table.blocks(of_references=True).items()
    ]
    lines: list[str] = []
    for title, rows, names in parts:
        heads = [f"{tex(format_name(n))} {TEX_ARROWS[table.direction(n)]}" for n in names]
        lines += [f"% {title}", r"\begin{tabular}{l" + "r" * len(names) + "}", r"\toprule"]
        lines += [" & ".join(["", *heads]) + r" \\", r"\midrule"]
        for row in rows:
            cells = []
            for name in names:
                value, interval, mark = table.cell(row, name)
                cells.append(marks[mark] % tex(value) + (rf" {{\scriptsize {tex(interval)}}}" if interval else ""))
            lines.append(" & ".join([tex(row), *cells]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([*lines, *(f"% {label}: {text}" for label, text in table.protocol.rows().items()), ""])


def tex(text: str) -> str:
    """Text with LaTeX's own characters escaped."""
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "/"))
    return text.replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")
