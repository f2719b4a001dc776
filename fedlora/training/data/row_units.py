"""The unit of privacy that each row of a table is, or belongs to, by a digest of its cells.

    unit-column ""       the row as read, all its columns, whatever of it a run trains on
    unit-column "who"    the value of that column: all rows of one person are one unit

Edge cases
    an empty cell                      is not in the digest: a column that only other rows fill
                                       changes nothing
    the order of rows or columns       nor is that
    a row without the unit's value     is left out of the training: nobody's, it would be counted
                                       for nobody
    a row that differs by one letter   is another unit; only a unit column says that it is not
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.training.data.tables import Table

SIZE = 16
"""Bytes of a digest."""


def by_row(table: Table) -> tuple[bytes, ...]:
    """Each row's digest."""
    return tuple(of_cells(cells) for cells in _cells(table))


def by_value(values: Sequence[str]) -> tuple[bytes, ...]:
    """The digest of each row's unit, by its name."""
    return tuple(hashlib.sha256(value.encode()).digest()[:SIZE] for value in values)


def of_cells(cells: Mapping[str, Any]) -> bytes:
    """One row's own."""
    parts = (repr((name, x)) for name, x in sorted(cells.items()) if not _missing(x))
    return hashlib.sha256("\n".join(parts).encode(errors="surrogatepass")).digest()[:SIZE]


def _cells(table: Table) -> Iterator[Mapping[str, Any]]:
    """The rows as they lie in the table: no picture or sound is decoded."""
    columns = {name: x.to_pylist() for name, x in _plain(table).items()}
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))


def _plain(table: Table) -> dict[str, Any]:
    found = table.cells.with_format("arrow")[:]
    return {name: found[name] for name in found.column_names}


def _missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())
