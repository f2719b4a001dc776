"""From a data source to each client's own rows.

    source -> rows, distinct and limited -> central test | central validation | pool
                                            pool -> one part a client
                                            part -> train | own test | own validation

Every choice derives from the seed and the config, so a client that reads the same source finds
the very part that the server counted.
"""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.training.data.account import (
    ELSEWHERE,
    OWN_TEST,
    TESTED,
    UNDEALT,
    VALIDATED,
    Account,
    Book,
    repeats,
    without,
)
from fedlora.training.data.labels import check_labels, check_map, doubts
from fedlora.training.data.partition import partition
from fedlora.training.data.reading import Reader, distinct, pairs_of, rows_at, rows_by_code
from fedlora.training.data.rows import NO_ROWS
from fedlora.training.data.rows import ClientRows as ClientRows
from fedlora.training.data.rows import Rows as Rows
from fedlora.training.data.sites import sites_of
from fedlora.training.data.splits import central, limited, of_client, with_each_label
from fedlora.training.data.tables import quoted
from fedlora.training.data.validation import apart, drawn
from fedlora.training.user_code import is_code

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """All that a run reads: the label names, the central test set, and every client."""

    labels: tuple[str, ...]
    """The names that the task chooses from, in order; empty where it chooses from none."""
    test: Rows
    clients: tuple[ClientRows, ...]
    account: Account = field(default_factory=Account)
    """What became of every row that was read."""
    book: Book = field(default_factory=Book, compare=False)
    """Where each row stands in its source."""
    validation: Rows = NO_ROWS
    """The central validation set: what a run chooses by."""

    @property
    def held(self) -> tuple[Rows, ...]:
        """The central sets: of validation rows only where there are any."""
        return (self.test, *([self.validation] if len(self.validation) else []))

    def client(self, i: int) -> ClientRows:
        """One client's rows. Of the rest of a corpus a client needs only `labels`."""
        if not 0 <= i < len(self.clients):
            raise DataError(
                f"there are no rows for client {i}: data.path was split over "
                f"{len(self.clients)} clients; set clients.count, or the node's data.node-path"
            )
        return self.clients[i]


def load(data: DataConfig, task: Reader, clients: int, seed: int, units: bool = False) -> Corpus:
    """The corpus of a run: the same for the same arguments, and no global RNG is touched.

    units: with the unit of privacy of each row.

    With an empty `data.path` there is only the central test set of `data.test-path`, and every
    node brings its own rows (`load_node`).

    Raises:
        DataError: the source cannot be read, lacks a column, or cannot be split as asked.
    """
    book = Book(units)
    if data.clients:
        return _from_sites(data, task, clients, seed, book)
    if is_code(data.path):
        return _called(data, task, clients, seed, book)
    if not data.path and not data.test_path:
        raise DataError("data.path is empty: name the data, or at least a data.test-path")
    if not data.path:
        test = rows_at(data, "data.test-path", data.test_path, task, book)
        labels = task.labels(test, data)
        chosen_by = _validation(data, task, labels, book)
        _tell_unused(data, book)
        return _closed(data, labels, test, [], book, validation=chosen_by)
    rows = rows_at(data, "data.path", data.path, task, book)
    labels = task.labels(rows, data)
    pool = limited(rows, data, labels, seed, book)
    given = _given_test(data, task, labels, book)
    test, pool = central(pool, given, data, labels, seed, book)
    chosen_by, pool = _validating(data, task, labels, pool, seed, book)
    parts = partition(len(pool), pool.label, pool.group, data, clients, seed)
    dealt = {i for part in parts for i in part}
    book.leave(UNDEALT, (n for i, n in enumerate(pool.number) if i not in dealt))
    own = [of_client(pool.select(part), data, seed, i) for i, part in enumerate(parts)]
    return _closed(data, labels, test, own, book, set(rows.label), chosen_by)


def _closed(
    data: DataConfig,
    labels: tuple[str, ...],
    test: Rows,
    clients: Sequence[ClientRows],
    book: Book,
    there: Collection[str] = (),
    validation: Rows = NO_ROWS,
) -> Corpus:
    """The corpus, with its account, and its warnings in the log."""
    validation, parts = apart(test, validation, with_each_label(clients, labels), book)
    own = tuple(parts)
    account = book.close(labels, test, own, there, validation)
    unmatched = account.absent if data.labels else ()
    odd = () if data.labels else doubts(labels)
    account = replace(account, repeats=repeats(test, own), unmatched=unmatched, doubts=odd)
    for warning in account.warnings():
        log.warning("%s", warning)
    return Corpus(labels, test, own, account, book, validation)


def _given_test(data: DataConfig, task: Reader, labels: Sequence[str], book: Book) -> Rows | None:
    """The rows of data.test-path, where it is set."""
    if not data.test_path:
        return None
    rows = rows_at(data, "data.test-path", data.test_path, task, book)
    check_labels(task.names(rows), labels, data.test_path)
    return rows


def _validation(data: DataConfig, task: Reader, labels: Sequence[str], book: Book) -> Rows:
    """The rows of data.validation-path; none where it is not set."""
    if not data.validation_path:
        return Rows()
    rows = rows_at(data, "data.validation-path", data.validation_path, task, book)
    check_labels(task.names(rows), labels, data.validation_path)
    return rows


def _validating(
    data: DataConfig, task: Reader, labels: Sequence[str], pool: Rows, seed: int, book: Book
) -> tuple[Rows, Rows]:
    """The central validation rows, and the pool without what equals one of them."""
    if not data.validation_path:
        rows, rest = drawn(pool, data, labels, seed)
    else:
        rows, rest = _validation(data, task, labels, book), pool
    return rows, without(rows, rest, VALIDATED, book) if len(rows) else rest


def _from_sites(data: DataConfig, task: Reader, clients: int, seed: int, book: Book) -> Corpus:
    """The corpus of data.clients: each client has its own site's rows, and no other's.

    Where data.test-path is the central test and no row is there twice, the rows of each are those
    of a node that has its file, in the same order.
    """
    sites = sites_of(data)
    if len(sites) != clients:
        raise DataError(
            f"data.clients is {len(sites)} sites, one a client: clients.count must be "
            f"{len(sites)}, is {clients}"
        )
    parts = []
    for i, site in enumerate(sites):
        key = f"data.clients[{i}]"
        own_map = f"{key}.map" if site.data.map != data.map else ""
        rows = rows_at(site.data, key, site.path, task, book, own_map)
        check_labels(task.names(rows), data.labels, site.path, "data.labels")
        parts.append(replace(rows, group=(str(i),) * len(rows)))
    rows = Rows.joined(parts)
    if any(site.data.map == data.map for site in sites):
        check_map(pairs_of(data), book.renamed, task.mapped(rows), "data.map")
    labels = task.labels(rows, data)
    pool = distinct(rows, ELSEWHERE, book) if data.dedupe else rows
    pool = limited(pool, data, labels, seed, book)
    given = _given_test(data, task, labels, book)
    test, pool = central(pool, given, data, labels, seed, book)
    chosen_by, pool = _validating(data, task, labels, pool, seed, book)
    own_rows = []
    for i, site in enumerate(sites):
        at = [n for n, group in enumerate(pool.group) if group == str(i)]
        mine = pool.select(sorted(at, key=pool.number.__getitem__))  # as a node has its file
        if len(mine) < (least := data.fewest):
            raise DataError(
                f"client {i}, {site.path}, has {len(mine)} rows left and needs {least}: raise "
                "data.limit, lower data.test-size, or leave this site out"
            )
        own_rows.append(of_client(mine, data, seed, 0))
    found = _closed(data, labels, test, own_rows, book, set(rows.label), chosen_by)
    account = replace(found.account, sites=tuple(site.path for site in sites))
    return replace(found, account=account)


def _called(data: DataConfig, task: Reader, clients: int, seed: int, book: Book) -> Corpus:
    """The corpus of the user's own function: each client's rows, and those of the central test."""
    given = (data, "data.path", data.path)
    test, *parts = (rows_by_code(*given, i, task, book) for i in (None, *range(clients)))
    if data.dedupe:  # a client has no row of the central test set, as with data.test-path
        parts = [without(test, part, TESTED, book) for part in parts]
    if bare := [i for i, part in enumerate(parts) if not len(part)]:
        raise DataError(
            f"data.path = {data.path!r}: all rows of client {bare[0]} are central test rows too; "
            "give None other rows, or set data.dedupe = false"
        )
    whole = Rows.joined([test, *parts])
    check_map(pairs_of(data), book.renamed, task.mapped(whole), "data.map")
    labels = task.labels(whole, data)
    own = [of_client(p, data, seed, i) for i, p in enumerate(parts)]
    chosen_by = _validation(data, task, labels, book)
    return _closed(data, labels, test, own, book, set(whole.label), chosen_by)


def _tell_unused(data: DataConfig, book: Book) -> None:
    """Log the values of data.map that are not here: they may be elsewhere."""
    if unused := sorted(pairs_of(data).keys() - book.renamed):
        log.warning("data.map: %s: no row here has it", quoted(unused))


def load_node(
    data: DataConfig,
    task: Reader,
    labels: Sequence[str],
    seed: int = 0,
    client: int = 0,
    units: bool = False,
) -> ClientRows:
    """A deployed client's rows: `data.node-path` whole. `labels` is what the server sent.

    A directory with a train.jsonl in it is split already: test.jsonl, if there, is its own test,
    and validation.jsonl is what it validates on, where data.client-validation-fraction is set.
    What became of each row of it stands in the node's log.

    Raises:
        DataError: as in `load`, or the file has a label that the server does not know.
    """
    book = Book(units)
    _, (rows,) = apart(Rows(), Rows(), [_node_rows(data, task, labels, seed, client, book)], book)
    account = replace(book.close(labels, Rows(), [rows]), repeats=repeats(Rows(), [rows]))
    _tell_unused(data, book)
    log.warning("%s", ". ".join(account.lines()))  # less would reach no node's log
    return rows


SPLIT = ("train", "test")
"""Files of a node's directory that is split already."""


def _node_rows(
    data: DataConfig, task: Reader, labels: Sequence[str], seed: int, client: int, book: Book
) -> ClientRows:
    if is_code(data.node_path):
        rows = rows_by_code(data, "data.node-path", data.node_path, client, task, book)
        check_labels(task.names(rows), labels, data.node_path)
        return of_client(rows, data, seed, client)
    names = ("train", "test", "validation") if data.client_validation_fraction else SPLIT
    split = [Path(data.node_path, f"{name}.jsonl") for name in names]
    if split[0].is_file():
        parts = []
        for path in split:
            there = path.is_file() and path.stat().st_size > 0
            part = rows_at(data, "data.node-path", str(path), task, book) if there else Rows()
            check_labels(task.names(part), labels, str(path))
            parts.append(part)
        train, test, *rest = parts
        if data.dedupe:
            train = without(test, train, OWN_TEST, book)
        if not len(train):
            raise DataError(f"{split[0]}: all its rows are in {split[1]} too; leave them out there")
        return ClientRows(train, test, *rest)
    rows = rows_at(data, "data.node-path", data.node_path, task, book)
    rows = limited(rows, data, labels, seed, book)
    check_labels(task.names(rows), labels, data.node_path)
    return of_client(rows, data, seed, 0)


def load_calibration(data: DataConfig, task: Reader, path: str, corpus: Corpus) -> Rows:
    """The rows of lora.calibration: none of the corpus's own, as far as this process can tell.

    Raises:
        DataError: as in `load`, or a row is a client's or the central test set's too.
    """
    rows = rows_at(data, "lora.calibration", path, task, Book())
    check_labels(task.names(rows), corpus.labels, path)
    parts = [*corpus.held, *(part for c in corpus.clients for part in c.parts)]
    known = {key for part in parts for key in part.keys}
    if also := [text for text, key in zip(rows.text, rows.keys, strict=True) if key in known]:
        raise DataError(
            f"lora.calibration = {path!r}: {len(also)} of its {len(rows)} rows are a client's or "
            f"of a central set, such as {also[0][:60]!r}; take them out, or name other rows"
        )
    return rows


def describe(corpus: Corpus) -> dict[int, dict[str, int]]:
    """Client to label to its training rows of that label; "" where the data has no labels."""
    counts = [Counter(c.train.label or [""] * len(c.train)) for c in corpus.clients]
    names = corpus.labels or sorted(set().union(*counts))
    return {i: {name: count[name] for name in names} for i, count in enumerate(counts)}
