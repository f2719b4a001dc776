"""A source's rows: its columns as texts, whole and distinct, each with its number in the book."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from datasets import Dataset

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data import row_units
from fedlora.training.data.account import EQUAL, HEADER, UNMATCHED, Book, empty
from fedlora.training.data.labels import as_label, check_clients, check_map
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table, classes, column, prompts, read
from fedlora.training.user_code import called, find

Task = Literal["classification", "causal-lm"]

log = logging.getLogger(__name__)


def rows_at(
    data: DataConfig, key: str, path: str, task: Task, book: Book, own_map: str = ""
) -> Rows:
    """The distinct rows of the source at `path`, the value of the config's `key`.

    Those without text, label or response are left out, noted. own_map: the key of a data.map that
    is this source's alone, whose every value must be there; as of data.path's it must.

    Raises:
        DataError: it cannot be read, lacks a column, or has no whole row.
    """
    table = read(data, key, path)
    own_map = "data.map" if key == "data.path" else own_map
    return _rows_of(table, data, key, path, task, book, own_map)


def rows_by_code(
    data: DataConfig, key: str, name: str, client: int | None, task: Task, book: Book
) -> Rows:
    """What the user's function gives for a client, or for None: the central test rows.

    Raises:
        DataError: it gives none, or as `rows_at`.
    """
    whose = "the central test rows" if client is None else f"client {client}'s rows"
    live = find(key, name)
    found = live.get(client) if isinstance(live, Mapping) else called(key, name, Dataset, client)
    if not isinstance(found, Dataset) or not len(found):
        raise DataError(f"{key} = {name!r}: it has no rows as {whose}, must be a Dataset of some")
    return _rows_of(Table.of(found), data, "", f"{name} ({whose})", task, book)


def distinct(rows: Rows, reason: str, book: Book) -> Rows:
    """The first of the rows that are equal, case and space apart, whatever the others' labels."""
    seen: dict[str, int] = {}
    equal: list[int] = []
    other: list[int] = []
    for i, key in enumerate(rows.keys):
        if (first := seen.setdefault(key, i)) != i:
            alike = not rows.label or rows.label[first] == rows.label[i]
            (equal if alike else other).append(rows.number[i])
    book.leave(reason, equal)
    book.leave(f"{reason}, with another label", other)
    return rows.select(seen.values())


def pairs_of(data: DataConfig) -> dict[str, str]:
    """data.map: each value to its new name."""
    return dict(pair.split("=", 1) for pair in data.map)


def mapped_of(rows: Rows, task: Task) -> Sequence[str]:
    """The values that data.map renames, after it did."""
    return rows.label if task == "classification" else rows.response


class _Needed(NamedTuple):
    """A column that no row may lack."""

    name: str
    values: list[str]


def _rows_of(
    table: Table,
    data: DataConfig,
    key: str,
    path: str,
    task: Task,
    book: Book,
    own_map: str = "",
) -> Rows:
    """The distinct, whole rows of a table that `path` names."""
    renames = pairs_of(data)
    label, response, group = [], [], []
    if task == "classification" or data.label in table.names:
        label = [as_label(x) for x in column(table, path, "data.label", data.label)]
    if task == "classification":
        text = column(table, path, "data.text", data.text)
        mapped = label
        label = [renames.get(x, x) for x in mapped]
        needed = [_Needed(data.text, text), _Needed(data.label, label)]
    else:
        text = prompts(table, path, data.prompt)
        mapped = column(table, path, "data.response", data.response)
        response = [renames.get(x, x) for x in mapped]
        needed = [_Needed(data.prompt, text)] if data.prompt else []
        needed.append(_Needed(data.response, response))
    book.renamed |= renames.keys() & set(mapped)
    if own_map:
        check_map(renames, renames.keys() & set(mapped), mapped, own_map)
    if key == "data.path" and data.partition == "natural":
        group = [
            as_label(x) for x in column(table, path, "data.natural-column", data.natural_column)
        ]
        check_clients([x for x in group if x], data)
        needed.append(_Needed(data.natural_column, group))
    units: tuple[bytes, ...] = ()
    if book.units and data.unit_column:
        who = column(table, path, "data.unit-column", data.unit_column)
        needed.append(_Needed(data.unit_column, who))
        units = row_units.by_value(who)
    elif book.units:
        units = row_units.by_row(table)
    beside = [*table.unmatched, *table.headers]
    numbers = book.read(path, [*table.lines, *beside], table.unit, table.notes)
    read, matched = len(table.lines), len(table.lines) + len(table.unmatched)
    book.leave(UNMATCHED, numbers[read:matched])
    book.leave(HEADER, numbers[matched:])
    own = (renames.get(x, x) for x in map(as_label, classes(table, data.label)))
    rows = Rows(
        *(tuple(text), tuple(label), tuple(response), tuple(group), numbers[:read]),
        unit=units,
        classes=tuple(dict.fromkeys(own)),
    )
    rows = _whole(rows, needed, path, book)
    return distinct(rows, EQUAL, book) if data.dedupe else rows


def _whole(rows: Rows, needed: Iterable[_Needed], path: str, book: Book) -> Rows:
    """The rows that have something in each needed column."""
    left: set[int] = set()
    for name, values in needed:
        bare = {i for i, value in enumerate(values) if not value.strip()} - left
        book.leave(empty(name), (rows.number[i] for i in bare))
        left |= bare
    if not len(rows):
        raise DataError(f"{path}: it has no rows")
    if len(left) == len(rows):
        raise DataError(f"{path}: each of its {len(rows)} rows has an empty column")
    if left:
        log.warning("%s: %d of %d rows have an empty column, left out", path, len(left), len(rows))
    return rows.select(i for i in range(len(rows)) if i not in left)
