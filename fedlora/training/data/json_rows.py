"""JSON and JSON Lines as columns of texts: numbers, dates and true or false as they are written."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedlora.training.data.files import lines_of


class JsonRows(NamedTuple):
    """Objects as columns; an object within one gives the columns "outer.inner"."""

    columns: dict[str, list[str | None]]
    lines: list[int]
    unit: str
    """What `lines` counts: "line" of JSON Lines, "row" of a list."""
    lists: frozenset[str]
    """The columns that hold lists, and so no text."""


def read_json(text: str) -> JsonRows:
    """One object a line, or one list of objects.

    Raises:
        ValueError: it is neither; says in which line or row.
    """
    if text.lstrip().startswith("["):
        found = _loads(text)
        numbers, unit = list(range(1, len(found) + 1)), "row"
    else:
        numbers, found, unit = [], [], "line"
        for number, line in lines_of(text):
            try:
                found.append(_loads(line))
            except (ValueError, RecursionError) as e:
                raise ValueError(f"line {number}: {e}") from None
            numbers.append(number)
    for number, row in zip(numbers, found, strict=True):
        if not isinstance(row, dict):
            raise ValueError(f"{unit} {number}: must be an object with the columns, is {row!r:.40}")
    columns, lists = _columns(found)
    return JsonRows(columns, numbers, unit, lists)


def _loads(text: str) -> Any:
    return json.loads(
        text, parse_int=str, parse_float=str, parse_constant=_constant, object_pairs_hook=_once
    )


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, whose keys may not be there twice: one of the values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is there twice in one object")
    return found


def _columns(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[str | None]], frozenset[str]]:
    columns: dict[str, list[str | None]] = {}
    lists: set[str] = set()
    for i, row in enumerate(rows):
        for name, value in _flat(row):
            if isinstance(value, list):
                lists.add(name)
            if name not in columns:
                columns[name] = [None] * len(rows)
            columns[name][i] = _text(value)
    return columns, frozenset(lists)


def _flat(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in row.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)
