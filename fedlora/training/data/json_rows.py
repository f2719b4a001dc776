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
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{unit} {number}: half of a surrogate pair, as \\ud83d alone, is no letter"
            ) from None
    if len(found) == 1 and found[0] and all(map(_is_column, found[0].values())):
        first = next(iter(found[0]))
        raise ValueError(
            f"{unit} 1: it is one object, of columns or a list of rows under {first!r}; "
            "write one object a row (pandas: orient='records', lines=True)"
        )
    columns, lists = _columns(found, [f"{unit} {n}" for n in numbers])
    return JsonRows(columns, numbers, unit, lists)


def _is_column(value: Any) -> bool:
    """Is it a column by its rows' numbers, or a list of rows?"""
    if isinstance(value, dict):
        return bool(value) and all(key.isdigit() for key in value)
    return isinstance(value, list) and all(isinstance(x, dict) for x in value)


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
    rows: Sequence[Mapping[str, Any]], places: Sequence[str]
) -> tuple[dict[str, list[str | None]], frozenset[str]]:
    """places: where each row stands, for a message."""
    columns: dict[str, list[str | None]] = {}
    lists: set[str] = set()
    objects: dict[str, int] = {}
    for i, row in enumerate(rows):
        flat = _flat(row, objects, i)
        if len({name for name, _ in flat}) < len(flat):
            names = [name for name, _ in flat]
            double = max(names, key=names.count)
            raise ValueError(f"{places[i]}: {double!r} is there as a name and within an object")
        for name, value in flat:
            if isinstance(value, list):
                lists.add(name)
            if name not in columns:
                columns[name] = [None] * len(rows)
            columns[name][i] = _text(value)
    for name in objects.keys() & columns.keys():
        if (other := next((i for i, x in enumerate(columns[name]) if x is not None), None)) is None:
            del columns[name]  # an object that is null in some rows
        else:
            raise ValueError(
                f"{name!r} is an object in {places[objects[name]]} and none in {places[other]}: "
                "write it alike in all rows"
            )
    return columns, frozenset(lists)


def _flat(
    row: Mapping[str, Any], objects: dict[str, int], at: int, prefix: str = ""
) -> list[tuple[str, Any]]:
    """The row's values by dotted names; `objects` gets the names of objects, and the first row."""
    found = []
    for name, value in row.items():
        if isinstance(value, dict):
            objects.setdefault(f"{prefix}{name}", at)
            found += _flat(value, objects, at, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)
