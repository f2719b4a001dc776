"""The unit of privacy that each row of a table is, or belongs to, by a digest of its cells.

    unit-column ""       the row as read, all its columns, whatever of it a run trains on
    unit-column "who"    the value of that column: all rows of one person are one unit

Edge cases
    an empty cell                      is not in the digest: a column that only other rows fill
                                       changes nothing
    the order of rows or columns       nor is that, nor what a column is called
    how a cell is written              case, space, Unicode's forms of a letter, and of a number its
                                       zeros and its comma: one cell, however written
    a row without the unit's value     is left out of the training: nobody's, it would be counted
                                       for nobody
    a row that differs by one letter   is another unit; only a unit column says that it is not

All but the last can make one unit of two, and so charge more; never two of one. A person's name or
number is read as a cell is: a column of whole numbers becomes one of decimals in some files as soon
as one row lacks its own.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fedlora.training.data.tables import Table
from fedlora.training.data.written import NUMBER, size

SIZE = 16
"""Bytes of a digest."""
FORM, FORM_OF_VALUES = 2, 3
"""Raised whenever a row's, or a unit column's value's, digest changes: sets of two forms cannot be
compared."""
LONGEST_NUMBER = 40


def by_row(table: Table) -> tuple[bytes, ...]:
    """Each row's digest."""
    return tuple(of_cells(cells) for cells in _cells(table))


def by_value(values: Sequence[str]) -> tuple[bytes, ...]:
    """The digest of each row's unit, by its name, however that is written."""
    return tuple(_digest(_written(x)) for x in values)


def by_picture(pixels: Sequence[str]) -> tuple[bytes, ...]:
    """The digest of each row's unit, by what says which picture it is."""
    return tuple(map(_digest, pixels))


def of_cells(cells: Iterable[Any]) -> bytes:
    """One row's own."""
    parts = sorted(_written(x) for x in cells if not _missing(x))
    return _digest("\n".join(parts))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:SIZE]


def _written(cell: Any) -> str:
    """A cell in one of the ways that it can be written, without a line end."""
    if isinstance(cell, list | dict):
        cell = json.dumps(cell, ensure_ascii=False, default=repr)
    text = " ".join(unicodedata.normalize("NFKC", str(cell)).split()).casefold()
    if len(text) <= LONGEST_NUMBER and NUMBER.fullmatch(text):
        return f"{size(text).normalize() + 0:f}{'%' * text.endswith('%')}"
    return text


def _cells(table: Table) -> Iterator[tuple[Any, ...]]:
    """The rows as they lie in the table: no picture or sound is decoded."""
    found = table.cells.with_format("arrow")[:]
    yield from zip(*(found[name].to_pylist() for name in found.column_names), strict=True)


def _missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())
