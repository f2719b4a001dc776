"""Columns of lists: several names, or words, in one cell.

a list     of Parquet, Arrow, JSON or the Hub: of texts, numbers or numbered classes
a text     a JSON list, '["a", "b"]'; else, where a separator is given, what it parts
"""

import json
from typing import Any

from datasets import ClassLabel, Value

from fedlora.errors import DataError
from fedlora.training.data.tables import Table, column


def lists(
    table: Table, where: str, key: str, name: str, separator: str | None = None
) -> list[list[str]]:
    """The cells of a column as lists of texts; a missing cell is an empty list.

    separator: what parts a text into its names, "" where nothing does; None: no text has any.

    Raises:
        DataError: there is no such column, or a cell of it is no list; says what it is.
    """
    if name not in table.names:
        column(table, where, key, name)  # says so, with what there is
    feature = table.cells.features[name]
    of, cells = inner(feature), table.cells[name][:]
    if isinstance(of, ClassLabel):
        return [["" if v is None or v < 0 else of.names[v] for v in x or ()] for x in cells]
    if of is not None:
        return [["" if v is None else str(v) for v in cell or ()] for cell in cells]
    if isinstance(feature, ClassLabel) or not isinstance(feature, Value):
        raise DataError(f'{key} = "{name}": {where} has no lists there but {feature}')
    return [
        _read(cell, f"{where}, {table.unit} {line},", key, name, separator)
        for cell, line in zip(cells, table.lines, strict=True)
    ]


def classes(table: Table, name: str) -> tuple[str, ...]:
    """The names of a column of numbered classes, or lists of such, or ordered categories, in their
    order; of any other none."""
    feature = table.cells.features.get(name)
    feature = inner(feature) or feature
    named = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    return named or table.ordered.get(name, ())


def inner(feature: Any) -> Any:
    """What a column of lists has lists of; None of another column."""
    return getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)


def _read(cell: Any, where: str, key: str, name: str, separator: str | None) -> list[str]:
    text = "" if cell is None else str(cell).strip()
    if not text:
        return []
    if text.startswith("["):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, list) and not any(isinstance(x, list | dict) for x in found):
            return ["" if x is None else str(x) for x in found]
    elif separator:
        return [part.strip() for part in text.split(separator)]
    or_part = "" if separator is None else ", or name what parts its names in data.label-separator"
    raise DataError(
        f'{key} = "{name}": {where} has {text[:40]!r} there, no list: write a JSON list{or_part}'
    )
