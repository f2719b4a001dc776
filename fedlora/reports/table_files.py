"""Every table of a report as files: CSV for a spreadsheet, LaTeX for a paper.

A cell that a spreadsheet would take for a formula begins with an apostrophe in CSV. LaTeX is one
`tabular` with \\hline, which needs no package.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fedlora.reports.tables import Grid

FORMULA = ("=", "+", "-", "@", "\t", "\r")
NUMBER = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?%?|-")
SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    **{x: f"\\{x}" for x in "&%$#_{}"},
}  # fmt: skip


class TextTable(NamedTuple):
    """A head, and as many texts a row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, grid: Grid) -> "TextTable":
        return cls(grid.head, [[cell.text for cell in row] for row in grid.rows])


def write(folder: Path, tables: Mapping[str, TextTable]) -> None:
    """NAME.csv and NAME.tex of each table that has rows; those left there of others are removed."""
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        for end, made in ((".csv", as_csv), (".tex", as_latex)):
            path = folder / f"{name}{end}"
            if table.rows:
                path.write_text(made(table), encoding="utf-8", newline="")
            else:
                path.unlink(missing_ok=True)


def as_csv(table: TextTable) -> str:
    """RFC 4180, with a head."""
    file = io.StringIO()
    csv.writer(file).writerows([_inert(x) for x in row] for row in (table.head, *table.rows))
    return file.getvalue()


def as_latex(table: TextTable) -> str:
    """A tabular: the first column on the left, the others on the right."""
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", "\\hline"]
    for i, row in enumerate((table.head, *table.rows)):
        lines.append(" & ".join(map(escaped, row)) + " \\\\")
        lines += ["\\hline"] if not i else []
    return "\n".join([*lines, "\\hline", "\\end{tabular}"]) + "\n"


def escaped(text: str) -> str:
    """The text as LaTeX sets it: on one line, without control characters."""
    shown = re.sub(r"[\x00-\x1f\x7f]+", " ", text)
    return "".join(SPECIAL.get(x, x) for x in shown)


def _inert(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text
