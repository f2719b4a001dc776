"""A source's rows: its columns as texts, whole and distinct, each with its number in the book."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from datasets import Dataset

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data import row_units
from fedlora.training.data.account import EQUAL, HEADER, UNMATCHED, Book, empty
from fedlora.training.data.labels import as_label, check_clients, check_map
from fedlora.training.data.list_columns import classes
from fedlora.training.data.rows import Rows
from fedlora.training.data.tables import Table, column, read
from fedlora.training.user_code import called, find

log = logging.getLogger(__name__)


class Needed(NamedTuple):
    """A column that no row may lack."""

    name: str
    values: Sequence[str]


@dataclass(frozen=True, slots=True)
class Columns:
    """What a task takes of a table: columns of `Rows`, each empty or a value a row."""

    text: Sequence[str]
    label: Sequence[str] = ()
    response: Sequence[str] = ()
    second: Sequence[str] = ()
    target: Sequence[str] = ()
    needed: Sequence[Needed] = ()
    picture: Sequence[bytes | str] = ()
    unfit: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By the reason: the numbers of rows that the task cannot use."""
    mapped: Sequence[str] = ()
    """The values that data.map renames, as they are in the table."""
    classes: Sequence[str] = ()
    """The data's own numbered classes, renamed, where data.map does not name them whole."""


class Reader(Protocol):
    """How a task reads rows: the first part of `fedlora.training.tasks.base.Task`."""

    def read(
        self, table: Table, where: str, data: DataConfig, renames: Mapping[str, str]
    ) -> Columns:
        """The columns that the task takes, with the values of data.map renamed."""
        ...

    def labels(self, rows: Rows, data: DataConfig) -> tuple[str, ...]:
        """The names to choose from, in order; none where the task chooses from no names."""
        ...

    def names(self, rows: Rows) -> Sequence[str]:
        """Those names that the rows have, each as often as they have it."""
        ...

    def mapped(self, rows: Rows) -> Sequence[str]:
        """The values that data.map renames, after it did."""
        ...


def rows_at(
    data: DataConfig, key: str, path: str, task: Reader, book: Book, own_map: str = ""
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
    data: DataConfig, key: str, name: str, client: int | None, task: Reader, book: Book
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
            alike = all(x[first] == x[i] for x in (rows.label, rows.target) if x)
            (equal if alike else other).append(rows.number[i])
    book.leave(reason, equal)
    book.leave(f"{reason}, with another label", other)
    return rows.select(seen.values())


def pairs_of(data: DataConfig) -> dict[str, str]:
    """data.map: each value to its new name; "" of one that stands for none."""
    found = (pair.split("=", 1) for pair in data.map)
    return {old: new if new.strip() else "" for old, new in found}


def _rows_of(
    table: Table,
    data: DataConfig,
    key: str,
    path: str,
    task: Reader,
    book: Book,
    own_map: str = "",
) -> Rows:
    """The distinct, whole rows of a table that `path` names."""
    renames = pairs_of(data)
    found, group = task.read(table, path, data, renames), list[str]()
    needed = list(found.needed)
    book.renamed |= (used := renames.keys() & set(found.mapped))
    if own_map:
        check_map(renames, used, found.mapped, own_map)
    if key == "data.path" and data.partition == "natural":
        group = [
            as_label(x) for x in column(table, path, "data.natural-column", data.natural_column)
        ]
        check_clients([x for x in group if x], data)
        needed.append(Needed(data.natural_column, group))
    units: tuple[bytes, ...] = ()
    if book.units and table.by_name:
        raise DataError(
            f"{path}: only the names of columns that are asked for say which separator it has, and "
            "under privacy a row is one thing whatever a run asks for; set data.separator"
        )
    if data.unit_column and (book.units or data.withdrawn):
        who = column(table, path, "data.unit-column", data.unit_column)
        needed += [Needed(data.unit_column, who)] if book.units else []
        units = row_units.by_value(who)
    elif book.units:
        by_pixels = bool(found.picture)  # where a picture lies is none of what its row says
        units = row_units.by_picture(found.text) if by_pixels else row_units.by_row(table)
    beside = [*table.unmatched, *table.headers]
    numbers = book.read(path, [*table.lines, *beside], table.unit, table.notes)
    read, matched = len(table.lines), len(table.lines) + len(table.unmatched)
    book.leave(UNMATCHED, numbers[read:matched])
    book.leave(HEADER, numbers[matched:])
    own = found.classes or [renames.get(x, x) for x in map(as_label, classes(table, data.label))]
    rows = Rows(
        text=tuple(found.text),
        label=tuple(found.label),
        response=tuple(found.response),
        group=tuple(group),
        second=tuple(found.second),
        target=tuple(found.target),
        number=numbers[:read],
        unit=units,
        picture=tuple(found.picture),
        classes=tuple(x for x in dict.fromkeys(own) if x),
    )
    rows = _whole(rows, needed, path, book, found.unfit)
    return distinct(rows, EQUAL, book) if data.dedupe else rows


def _whole(
    rows: Rows, needed: Iterable[Needed], path: str, book: Book, unfit: Mapping[str, Sequence[int]]
) -> Rows:
    """The rows that have something in each needed column, and are not unfit."""
    left: set[int] = set()
    for why, numbers in unfit.items():
        book.leave(why, (rows.number[i] for i in numbers))
        left |= {*numbers}
    for name, values in needed:
        bare = {i for i, value in enumerate(values) if not value.strip()} - left
        book.leave(empty(name), (rows.number[i] for i in bare))
        left |= bare
    if not len(rows):
        raise DataError(f"{path}: it has no rows")
    if len(left) == len(rows) and unfit:
        told = ", ".join(f"{len(numbers)} {why}" for why, numbers in unfit.items())
        raise DataError(f"{path}: none of its {len(rows)} rows is left: {told}")
    if len(left) == len(rows):
        raise DataError(f"{path}: each of its {len(rows)} rows has an empty column")
    if bare_of := len(left) - sum(map(len, unfit.values())):
        log.warning("%s: %d of %d rows have an empty column, left out", path, bare_of, len(rows))
    return rows.select(i for i in range(len(rows)) if i not in left)
