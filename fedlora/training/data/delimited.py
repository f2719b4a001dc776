"""CSV and its kin, by Python's csv module with nothing guessed but the separator.

separator   data.separator; else the first line "sep=;" of Excel; else the one of , ; tab |
            under which the header holds most of the columns asked for, and the first rows are
            as long as it
row         must have as many fields as the header: else it is refused, with its line
quotation   a cell in quotation marks may hold separators and line ends. Where marks do not pair,
            or reading them as such joins cells of a line, or lines, that are whole rows, they are
            letters in a TSV whose every line has all fields, and an error elsewhere. Each row of
            several lines is judged by itself: its lines are rows where they have all fields and
            the very values of a column that has few, or are too many for chance
"""

import csv
import io
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

from fedlora.training.data.written import trimmed

SEPARATORS = (",", ";", "\t", "|")
NAMES = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}
SAMPLE = 200
"""Rows by which the separator is found."""
MANY = 8
"""Lines with all fields, one after the other, that no text in a single cell has by chance."""


class Delimited(NamedTuple):
    """A file's cells as they are written."""

    columns: dict[str, list[str | None]]
    lines: list[int]
    notes: tuple[str, ...]
    headers: list[int]
    """Lines that repeat the header, as where files were put together: no rows."""
    by_name: bool = False
    """Was the separator found by the names of columns alone that were asked for?"""


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
    stated = re.match(r"sep=(.)(\r\n|\r|\n)", text)
    body = text[stated.start(2) :] if stated else text  # its line stays, as a blank one
    given = separator or (stated[1] if stated else "")
    with _any_size():
        mark = given or _sniffed(body, asked, usual)
        by_name = not given and mark != _sniffed(body, (), usual)
        rows, notes = _rows(body, mark)
    if not rows:
        raise ValueError("it has no header line")
    header, *rows = rows
    names = _names(header.cells)
    _check_lengths(rows, len(names), mark)
    again = [row for row in rows if len(names) > 1 and row.cells == header.cells]
    rows = [row for row in rows if row not in again] if again else rows
    columns: dict[str, list[str | None]] = {
        name: [row.cells[i] for row in rows] for i, name in enumerate(names)
    }
    said = f"separator {NAMES.get(mark, mark)}" + ("" if given else ", found")
    lines, headers = [row.line for row in rows], [row.line for row in again]
    return Delimited(columns, lines, (said, *notes), headers, by_name)


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
    odd = mark == "\t" and any(len(row.cells) != len(rows[0].cells) for row in rows)
    if not joined and not stray and not odd:
        return rows, ()
    plain = list(_parsed(text, mark, csv.QUOTE_NONE))
    width = len(plain[0].cells) if plain else 0
    whole = width > 1 and all(len(row.cells) == width for row in plain)
    if whole and mark == "\t":
        return plain, ("its quotation marks are read as letters",)
    if stray:
        raise stray
    if not joined:
        return rows, ()
    return rows, (_told_of(rows, joined, plain, whole),)


def _told_of(
    rows: Sequence[_Row], joined: Sequence[_Row], plain: Sequence[_Row], whole: bool
) -> str:
    """A note on the rows of several lines.

    Raises:
        ValueError: a pair of stray marks made one of them.
    """
    width, starts = len(rows[0].cells), [row.line for row in plain]
    known = _few_values(rows, width)
    doubtful = []
    for row in joined:
        lines = plain[bisect_left(starts, row.line) : bisect_right(starts, row.last)]
        if any(len(x.cells) != width for x in lines) or len(lines) < 2:
            continue
        like = (sum(x.cells[i] in values for x in lines) - 1 for i, values in known.items())
        if len(lines) >= MANY or any(2 * n >= len(lines) - 1 for n in like):
            raise ValueError(_joins(row, width))
        doubtful.append(row)
    if whole and doubtful and not known:
        raise ValueError(_joins(doubtful[0], width))
    first = (doubtful or joined)[0]
    of_rows = f", {len(doubtful)} of them of lines with {width} fields each" if doubtful else ""
    return (
        f"{len(joined)} rows of several lines{of_rows}, the first from {first.line} to {first.last}"
    )


def _few_values(rows: Sequence[_Row], width: int) -> dict[int, set[str]]:
    """The columns of labels and their kind, by their place, with the values of one-line rows."""
    single = [row.cells for row in rows[1:] if row.last == row.line and len(row.cells) == width]
    values = {i: {cells[i] for cells in single} - {""} for i in range(width)}
    return {i: x for i, x in values.items() if 0 < 2 * len(x) <= len(single)}


def _joins(row: _Row, width: int) -> str:
    return (
        f"line {row.line}: read with its quotation marks this row ends in line {row.last}, though "
        f"each of these lines has all {width} fields by itself; double each mark that is part of a "
        'text, as in "he said ""no""", or write JSONL'
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
        header = [trimmed(name) for name in rows[0]]
        alike = sum(len(row) == len(header) for row in rows) / len(rows)
        return sum(name in header for name in asked), len(header) > 1, alike, len(header)

    return max((usual, *(m for m in SEPARATORS if m != usual)), key=likeness)


def _names(header: Sequence[str]) -> list[str]:
    """The header's names without the space, and what is not seen, around them; "column 3" for one
    that is empty."""
    names = [trimmed(name) or f"column {i}" for i, name in enumerate(header, 1)]
    if double := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"its header has the column {min(double)!r} twice; rename one")
    return names


def _check_lengths(rows: Sequence[_Row], width: int, mark: str) -> None:
    wrong = [row for row in rows if len(row.cells) != width]
    if wrong:
        places = ", ".join(f"line {r.line} has {len(r.cells)}" for r in wrong[:5])
        more = ", ..." if len(wrong) > 5 else ""
        raise ValueError(
            f"{len(wrong)} of {len(rows)} rows do not have the header's {width} fields: {places}"
            f"{more}. Read with the separator {NAMES.get(mark, mark)}: set data.separator if it is "
            "another, put cells that hold it into quotation marks, and drop what is too much"
        )
