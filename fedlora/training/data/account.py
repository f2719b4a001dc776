"""What became of every row that was read: where it is, or why it was left out.

    book = Book()
    numbers = book.read("a.csv", table.lines, "line")   each row's number, over all that is read
    book.leave("equal to an earlier row", numbers)
    book.close(test, clients)                           -> Account

`close` finds each number exactly once, in what was left out, the central test set or a client's
rows; so no row is lost or doubled without a word.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedlora.errors import DataError
from fedlora.training.data.rows import NO_ROWS, ClientRows, Rows

SHOWN = 5
"""How many line numbers are kept of each reason."""

EQUAL = "equal to an earlier row"
ELSEWHERE = "equal to a row of another source"
UNMATCHED = "that data.line-pattern does not match"
HEADER = "that repeat the header"
LIMITED = "beyond data.limit"
TESTED = "also in the central test"
OWN_TEST = "also in the client's own test"
VALIDATED = "also in the validation rows"
TESTED_TOO = "held out to validate, and also in a test"
UNDEALT = "that data.partition gives to no client"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows of one source that were left out for one reason."""

    why: str
    rows: int
    first: tuple[int, ...]
    """Where the first of them stand: numbers of lines, or of rows."""


@dataclass(frozen=True, slots=True)
class SourceCount:
    """One source's rows."""

    path: str
    unit: str
    """What places are counted in: "line", or "row" where a file has no lines."""
    read: int
    left: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()
    """How it was read: separator, encoding."""

    @property
    def used(self) -> int:
        return self.read - sum(x.rows for x in self.left)


@dataclass(frozen=True, slots=True)
class Account:
    """Every row of a run's data. Counts are by label; under "" where the data has none."""

    sources: tuple[SourceCount, ...] = ()
    labels: tuple[str, ...] = ()
    test: Mapping[str, int] = field(default_factory=dict)
    """Of the central test set."""
    train: tuple[Mapping[str, int], ...] = ()
    """By client: its training rows."""
    held: tuple[Mapping[str, int], ...] = ()
    """By client: the rows that it holds out to test on."""
    repeats: Mapping[str, int] = field(default_factory=dict)
    """Rows in use that are there twice, by where: none where equal rows were left out."""
    absent: tuple[str, ...] = ()
    """Labels that are named, in data.labels or by the data, and that no row has."""
    unmatched: tuple[str, ...] = ()
    """Of data.labels: those that no row has, before any limit or split."""
    sites: tuple[str, ...] = ()
    """By client: its own source, where data.clients names them."""
    doubts: tuple[str, ...] = ()
    """What is odd about the labels, in words."""
    validation: Mapping[str, int] = field(default_factory=dict)
    """Of the central validation set."""
    validated: tuple[Mapping[str, int], ...] = ()
    """By client: the rows that it holds out to validate; empty where none does."""

    @property
    def untrained(self) -> list[str]:
        """The labels of which no client has a training row; none where clients are elsewhere."""
        there = [x for x in self.labels if x not in self.absent] if self.train else []
        return [x for x in there if not any(c.get(x) for c in self.train)]

    @property
    def unseen(self) -> dict[int, list[str]]:
        """Client to the labels of which it has no training row, though another has."""
        seen = [x for x in self.labels if x not in self.untrained and x not in self.absent]
        lacks = {i: [x for x in seen if not c.get(x)] for i, c in enumerate(self.train)}
        return {i: names for i, names in lacks.items() if names}

    def warnings(self) -> list[str]:
        """What speaks against a run on these rows."""
        none = ", ".join(f'"{name}"' for name in self.unmatched[:8])
        told = [f"data.labels names {none}, and no row has it."] if none else []
        return [*told, *self.doubts, *self._lost()]

    def _lost(self) -> list[str]:
        if not (lost := self.untrained):
            return []
        rows = Counter(self.test)
        for held in self.held:
            rows.update(held)
        told = ", ".join(f'"{name}" ({rows[name]} test rows)' for name in lost[:8])
        more = ", ..." if len(lost) > 8 else ""
        return [f"No client has a training row of {told}{more}: the model cannot learn it."]

    def lines(self) -> Iterator[str]:
        """The account in words: a line for each source, and what its rows became."""
        for s in self.sources[:SHOWN_SOURCES]:
            how = f" ({'; '.join(s.notes)})" if s.notes else ""
            yield f"{s.path}: {s.read} rows read{how}; {_left(s)}"
        if len(self.sources) > SHOWN_SOURCES:
            yield f"and {len(self.sources) - SHOWN_SOURCES} sources more"
        train, held = (sum(sum(c.values()) for c in part) for part in (self.train, self.held))
        yield (
            f"{sum(s.read for s in self.sources)} rows read = "
            f"{sum(s.read - s.used for s in self.sources)} left out + "
            f"{sum(self.test.values())} central test + {train} training + {held} clients' own test"
            f"{self._validating()}"
        )
        yield from (self._site(i, path) for i, path in enumerate(self.sites))
        if self.labels:
            yield "by label: " + "; ".join(self._by_label())
        yield from (f"{rows} {what}" for what, rows in self.repeats.items() if rows)
        if self.absent:
            yield f"no row has the label {', '.join(self.absent[:8])}"
        if unseen := self.unseen:
            i, names = next(iter(unseen.items()))
            yield (
                f"{len(unseen)} of {len(self.train)} clients have no training row of some label, "
                f"such as client {i} of {', '.join(names[:8])}"
            )

    def _validating(self) -> str:
        central = sum(self.validation.values())
        own = sum(sum(c.values()) for c in self.validated)
        found = {"central validation": central, "clients' own validation": own}
        return "".join(f" + {n} {what}" for what, n in found.items() if n)

    def _site(self, i: int, path: str) -> str:
        train, held = self.train[i], self.held[i]
        said = f"client {i}, {path}: {sum(train.values())} training, {sum(held.values())} own test"
        parts = [train, held]
        if self.validated:
            parts.append(self.validated[i])
            said += f", {sum(parts[-1].values())} own validation"
        names = [f"{x} {sum(part.get(x, 0) for part in parts)}" for x in self.labels[:SHOWN_LABELS]]
        more = [f"{len(self.labels) - SHOWN_LABELS} labels more"]
        told = ", ".join(names + more * (len(self.labels) > SHOWN_LABELS))
        return f"{said} ({told})" if told else said

    def _by_label(self) -> Iterator[str]:
        for name in self.labels[:SHOWN_LABELS]:
            train, held = (sum(c.get(name, 0) for c in part) for part in (self.train, self.held))
            told = f"{name} {train} training, {held + self.test.get(name, 0)} test"
            if self.validation or self.validated:
                parts = (self.validation, *self.validated)
                told += f", {sum(c.get(name, 0) for c in parts)} validation"
            yield told
        if len(self.labels) > SHOWN_LABELS:
            yield f"and {len(self.labels) - SHOWN_LABELS} labels more"

    def record(self) -> dict[str, Any]:
        """The account as JSON takes it: what a run's summary keeps."""
        found = asdict(self)
        without = ("validation", "validated") if not (self.validation or self.validated) else ()
        return {key: x for key, x in found.items() if key not in without}


SHOWN_LABELS = 12
SHOWN_SOURCES = 20


def empty(column: str) -> str:
    """The reason of a row that has nothing in a column, or nothing as its prompt."""
    return f'with nothing in "{column}"'


def _left(s: SourceCount) -> str:
    if not s.left:
        return "none left out"
    return ", ".join(f"{x.rows} {x.why} ({_places(s.unit, x)})" for x in s.left) + " left out"


def _places(unit: str, left: LeftOut) -> str:
    more = ", ..." if left.rows > len(left.first) else ""
    plural = "s" if left.rows > 1 else ""
    return f"{unit}{plural} {', '.join(map(str, left.first))}{more}"


@dataclass(slots=True)
class _Opened:
    path: str
    unit: str
    start: int
    lines: Sequence[int]
    left: dict[str, list[int]]
    notes: tuple[str, ...]


class Book:
    """The rows of a run while they are read and split: see the top of this file."""

    def __init__(self, units: bool = False) -> None:
        """units: are the rows' units of privacy asked for?"""
        self._opened: list[_Opened] = []
        self.units = units
        self.renamed: set[str] = set()
        """The values that data.map renames, of those that were there."""

    def read(
        self, path: str, lines: Sequence[int], unit: str, notes: Sequence[str] = ()
    ) -> tuple[int, ...]:
        """Numbers for the rows of a source, which stand at these lines of it."""
        last = self._opened[-1:]
        start = last[0].start + len(last[0].lines) if last else 0
        self._opened.append(_Opened(path, unit, start, lines, {}, tuple(notes)))
        return tuple(range(start, start + len(lines)))

    def leave(self, reason: str, numbers: Iterable[int]) -> None:
        """Note that the rows of these numbers are left out."""
        for n in sorted(numbers):
            self._source(n).left.setdefault(reason, []).append(n)

    def keep(self, reason: str, rows: Rows, numbers: Iterable[int]) -> Rows:
        """The selected rows; the others are left out for this reason."""
        kept = rows.select(numbers)
        self.leave(reason, set(rows.number) - set(kept.number))
        return kept

    def source_of(self, number: int) -> str:
        """The path of the source that the row of this number was read from."""
        return self._source(number).path

    def place(self, number: int) -> str:
        """Where the row of this number stands, "a.csv, line 7"."""
        s = self._source(number)
        return f"{s.path}, {s.unit} {s.lines[number - s.start]}"

    def _source(self, number: int) -> _Opened:
        return next(s for s in reversed(self._opened) if s.start <= number)

    def close(
        self,
        labels: Sequence[str],
        test: Rows,
        clients: Sequence[ClientRows],
        there: Collection[str] = (),
        validation: Rows = NO_ROWS,
    ) -> Account:
        """The account, when each number was found exactly once.

        there: the labels that rows had before any was left out by a limit or a split.

        Raises:
            DataError: it was not: a fault of this code, since no data can do that.
        """
        every = [test, validation, *(p for c in clients for p in c.parts)]
        labels = labels if any(p.label for p in every) else ()  # else no row is of one label
        parts = [p.number for p in every]
        parts += [tuple(left) for s in self._opened for left in s.left.values()]
        found = sorted(n for part in parts for n in part)
        total = sum(len(s.lines) for s in self._opened)
        if found != list(range(total)):
            raise DataError(
                f"{total} rows were read, and {len(found)} are accounted for ({len(set(found))} of "
                "them once): this is a fault of fedlora, please report it with this line"
            )
        own = any(len(c.validation) for c in clients)
        return Account(
            tuple(self._count(s) for s in self._opened),
            tuple(labels),
            _by_label(test, labels),
            tuple(_by_label(c.train, labels) for c in clients),
            tuple(_by_label(c.test, labels) for c in clients),
            absent=tuple(x for x in labels if there and x not in there),
            validation=_by_label(validation, labels) if len(validation) else {},
            validated=tuple(_by_label(c.validation, labels) for c in clients) if own else (),
        )

    def _count(self, s: _Opened) -> SourceCount:
        left = (
            LeftOut(reason, len(n), tuple(s.lines[i - s.start] for i in sorted(n)[:SHOWN]))
            for reason, n in s.left.items()
        )
        return SourceCount(s.path, s.unit, len(s.lines), tuple(left), s.notes)


def without(test: Rows, rows: Rows, reason: str, book: Book) -> Rows:
    """The rows that are not among the test's, case and space apart."""
    return without_keys(set(test.keys), rows, reason, book)


def without_keys(known: Collection[str], rows: Rows, reason: str, book: Book) -> Rows:
    """The rows whose keys are not among these."""
    return book.keep(reason, rows, (i for i, key in enumerate(rows.keys) if key not in known))


def repeats(test: Rows, clients: Sequence[ClientRows]) -> dict[str, int]:
    """How many rows in use equal others where that matters, case and space apart."""
    tested = set(test.keys).union(*(c.test.keys for c in clients))
    trained = [c.train.keys for c in clients]
    holders = Counter(key for keys in trained for key in set(keys))
    flat = [key for keys in trained for key in keys]
    return {
        "training rows equal a test row": sum(key in tested for key in flat),
        "training rows equal one of another client": sum(holders[key] > 1 for key in flat),
    }


def _by_label(rows: Rows, labels: Sequence[str]) -> dict[str, int]:
    """Label to its rows, for each of the labels; without labels, "" to all rows."""
    if not rows.label:
        return {"": len(rows)} if len(rows) else {}
    count = Counter(rows.label)
    names = labels or sorted(count)
    return {name: count[name] for name in names}
