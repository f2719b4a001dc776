"""CSV and its kin, by Python's csv module with nothing guessed but the separator.

separator   data.separator; else the first line "sep=;" of Excel; else the one of , ; tab |
            under which the header holds most of the columns asked for, and the first rows are
            as long as it
row         must have as many fields as the header: else it is refused, with its line
quotation   a cell in quotation marks may hold separators and line ends. Where marks do not pair,
            or reading them as such joins lines that are whole rows by themselves, they are
            letters in a TSV whose every line has all fields, and an error elsewhere
"""

import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

SEPARATORS = (",", ";", "\t", "|")
NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
SAMPLE = 200
"""Rows by which the separator is found."""


class Delimited(NamedTuple):
    """A file's cells as they are written."""

    columns: dict[str, list[str | None]]
    lines: list[int]
    notes: tuple[str, ...]


class _Row(NamedTuple):
    line: int
    last: int
    """The line that it ends in."""
    cells: list[str]


def read_delimited(
    text: str, separator: str, asked: Sequence[str] = (), usual: str = ","
) -> Delimited:
    """The columns of a text with a header, and the line that each row begins in.

    separator: "" to find it; `usual` wins where several would do.

    Raises:
        ValueError: it has no header, or rows of another length, or stray quotation marks.
    """
    stated = re.match(r"sep=(.)\r?\n", text)
    skipped, body = (1, text[stated.end() :]) if stated else (0, text)
    given = separator or (stated[1] if stated else "")
    with _any_size():
        mark = given or _sniffed(body, asked, usual)
        rows, notes = _rows(body, mark)
    if not rows:
        raise ValueError("it has no header line")
    header, *rows = rows
    names = _names(header.cells)
    _check_lengths(rows, len(names), mark, skipped)
    columns: dict[str, list[str | None]] = {
        name: [row.cells[i] for row in rows] for i, name in enumerate(names)
    }
    said = f"separator {NAMES.get(mark, mark)}" + ("" if given else ", found")
    return Delimited(columns, [row.line + skipped for row in rows], (said, *notes))


@contextmanager
def _any_size() -> Iterator[None]:
    """The csv module's limit of 131,072 characters a cell, lifted."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parsed(text: str, mark: str, quoting: int = csv.QUOTE_MINIMAL) -> Iterator[_Row]:
    """The rows that are not blank."""
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=mark, quoting=quoting, strict=True)  # type: ignore[arg-type]
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            raise _StrayQuoteError(start, reader.line_num, str(e)) from None
        if len(cells) > 1 or any(cell.strip() for cell in cells):
            yield _Row(start, reader.line_num, cells)


class _StrayQuoteError(ValueError):
    def __init__(self, start: int, line: int, why: str) -> None:
        super().__init__(
            f"line {start}: a quotation mark there does not pair (seen in line {line}: {why}); "
            'double each mark that is part of a text, as in "he said ""no"""'
        )


def _rows(text: str, mark: str) -> tuple[list[_Row], tuple[str, ...]]:
    """The rows, header first, and what is to be said of them."""
    stray: _StrayQuoteError | None = None
    try:
        rows = list(_parsed(text, mark))
    except _StrayQuoteError as e:
        rows, stray = [], e
    joined = [row for row in rows if row.last > row.line]
    if not joined and not stray:
        return rows, ()
    plain = list(_parsed(text, mark, csv.QUOTE_NONE))
    width = len(plain[0].cells) if plain else 0
    if width > 1 and all(len(row.cells) == width for row in plain):
        if mark == "\t":
            return plain, ("its quotation marks are read as letters",)
        if not stray:
            raise ValueError(
                f"line {joined[0].line}: read with its quotation marks this row ends in line "
                f"{joined[0].last}, though every line has all {width} fields by itself; double "
                'each mark that is part of a text, as in "he said ""no""", or write JSONL'
            )
    if stray:
        raise stray
    first = joined[0]
    return rows, (
        f"{len(joined)} rows of several lines, the first from {first.line} to {first.last}",
    )


def _sniffed(text: str, asked: Sequence[str], usual: str) -> str:
    """The separator under which the first rows look most like the table that was asked for."""

    def likeness(mark: str) -> tuple[float, ...]:
        sample = io.StringIO(text, newline="")
        try:
            rows = [r for r in islice(csv.reader(sample, delimiter=mark), SAMPLE) if r]
        except csv.Error:
            return (0.0,)
        if not rows:
            return (0.0,)
        header = [name.strip() for name in rows[0]]
        alike = sum(len(row) == len(header) for row in rows) / len(rows)
        return sum(name in header for name in asked), len(header) > 1, alike, len(header)

    return max((usual, *(m for m in SEPARATORS if m != usual)), key=likeness)


def _names(header: Sequence[str]) -> list[str]:
    """The header's names without the space around them; "column 3" for one that is empty."""
    names = [name.strip() or f"column {i}" for i, name in enumerate(header, 1)]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"its header has the column {min(double)!r} twice; rename one")
    return names


def _check_lengths(rows: Sequence[_Row], width: int, mark: str, skipped: int) -> None:
    wrong = [row for row in rows if len(row.cells) != width]
    if wrong:
        places = ", ".join(f"line {r.line + skipped} has {len(r.cells)}" for r in wrong[:5])
        more = ", ..." if len(wrong) > 5 else ""
        raise ValueError(
            f"{len(wrong)} of {len(rows)} rows do not have the header's {width} fields: {places}"
            f"{more}. Read with the separator {NAMES.get(mark, mark)}: set data.separator if it is "
            "another, put cells that hold it into quotation marks, and drop what is too much"
        )
