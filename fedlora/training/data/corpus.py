"""From a data source to each client's own rows.

    source -> rows, distinct and limited -> central test | pool
                                            pool -> one part a client -> train | own test

Every choice derives from the seed and the config, so a client that reads the same source finds
the very part that the server counted.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.strategies.base import seeded
from fedlora.training.data.partition import partition
from fedlora.training.data.tables import column, prompts, quoted, read
from fedlora.training.user_code import called, find, is_code

Task = Literal["classification", "causal-lm"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """Texts, each with its label or response. A selection shares the strings of the whole."""

    text: tuple[str, ...] = ()
    """The text; for causal-lm the prompt, "" where there is none."""
    label: tuple[str, ...] = ()
    """The label's name. Empty where causal-lm data has no label column."""
    response: tuple[str, ...] = ()
    """For causal-lm."""
    group: tuple[str, ...] = ()
    """The value of `data.natural-column`, where that is the partition."""

    def __len__(self) -> int:
        return len(self.text)

    def select(self, numbers: Iterable[int]) -> "Rows":
        at = list(numbers)
        columns = (self.text, self.label, self.response, self.group)
        return Rows(*(tuple(column[i] for i in at) if column else () for column in columns))

    @property
    def keys(self) -> list[str]:
        """What makes a row distinct, case and space apart: text, or prompt and response."""
        parts = [column for column in (self.text, self.response) if any(column)]
        texts = zip(*parts, strict=True) if parts else ()
        return ["\n".join(" ".join(x.split()).casefold() for x in row) for row in texts]


@dataclass(frozen=True, slots=True)
class ClientRows:
    """What a client trains on, and what it holds out to test on its own distribution."""

    train: Rows
    test: Rows


@dataclass(frozen=True, slots=True)
class Corpus:
    """All that a run reads: the sorted label names, the central test set, and every client."""

    labels: tuple[str, ...]
    """Empty for causal-lm."""
    test: Rows
    clients: tuple[ClientRows, ...]

    def client(self, i: int) -> ClientRows:
        """One client's rows. Of the rest of a corpus a client needs only `labels`."""
        if not 0 <= i < len(self.clients):
            raise DataError(
                f"there are no rows for client {i}: data.path was split over "
                f"{len(self.clients)} clients; set clients.count, or the node's data.node-path"
            )
        return self.clients[i]


def load(data: DataConfig, task: Task, clients: int, seed: int) -> Corpus:
    """The corpus of a run: the same for the same arguments, and no global RNG is touched.

    With an empty `data.path` there is only the central test set of `data.test-path`, and every
    node brings its own rows (`load_node`).

    Raises:
        DataError: the source cannot be read, lacks a column, or cannot be split as asked.
    """
    if is_code(data.path):
        return _called(data, task, clients, seed)
    if not data.path and not data.test_path:
        raise DataError("data.path is empty: name the data, or at least a data.test-path")
    if not data.path:
        test = _rows(data, "data.test-path", data.test_path, task)
        return Corpus(_labels(test, data, task), test, ())
    rows = _rows(data, "data.path", data.path, task)
    labels = _labels(rows, data, task)
    pool = _limited(rows, data, seed)
    test, pool = _apart(pool, data, task, labels, seed)
    parts = partition(len(pool), pool.label, pool.group, data, clients, seed)
    own = (_client(pool.select(part), data, seed, i) for i, part in enumerate(parts))
    return Corpus(labels, test, tuple(own))


def _called(data: DataConfig, task: Task, clients: int, seed: int) -> Corpus:
    """The corpus of the user's own function: each client's rows, and those of the central test."""
    every = [_own_rows(data, task, "data.path", data.path, i) for i in (None, *range(clients))]
    if data.dedupe:  # a client has no row of the central test set, as with data.test-path
        known = set(every[0].keys)
        every[1:] = [p.select(i for i, k in enumerate(p.keys) if k not in known) for p in every[1:]]
    test, *parts = every
    if empty := [i for i, part in enumerate(parts) if not len(part)]:
        raise DataError(
            f"data.path = {data.path!r}: all rows of client {empty[0]} are central test rows too; "
            "give None other rows, or set data.dedupe = false"
        )
    whole = Rows(*(tuple(chain.from_iterable(getattr(p, c) for p in every)) for c in COLUMNS))
    labels = _labels(whole, data, task)
    return Corpus(labels, test, tuple(_client(p, data, seed, i) for i, p in enumerate(parts)))


COLUMNS = ("text", "label", "response")


def _own_rows(data: DataConfig, task: Task, key: str, name: str, client: int | None) -> Rows:
    """What the user's function gives for a client, or for None: the central test rows."""
    whose = "the central test rows" if client is None else f"client {client}'s rows"
    live = find(key, name)
    table = live.get(client) if isinstance(live, Mapping) else called(key, name, Dataset, client)
    if not isinstance(table, Dataset) or not len(table):
        raise DataError(f"{key} = {name!r}: it has no rows as {whose}, must be a Dataset of some")
    return _rows_of(table, data, "", f"{name} ({whose})", task)


def load_node(
    data: DataConfig, task: Task, labels: Sequence[str], seed: int = 0, client: int = 0
) -> ClientRows:
    """A deployed client's rows: `data.node-path` whole. `labels` is what the server sent.

    A directory with a train.jsonl in it is split already: test.jsonl, if there, is its own test.

    Raises:
        DataError: as in `load`, or the file has a label that the server does not know.
    """
    if is_code(data.node_path):
        rows = _own_rows(data, task, "data.node-path", data.node_path, client)
        _check_labels(rows, labels, data.node_path)
        return _client(rows, data, seed, client)
    split = [Path(data.node_path, f"{name}.jsonl") for name in ("train", "test")]
    if split[0].is_file():
        parts = []
        for path in split:
            there = path.is_file() and path.stat().st_size > 0
            part = _rows(data, "data.node-path", str(path), task) if there else Rows()
            _check_labels(part, labels, str(path))
            parts.append(part)
        return ClientRows(*parts)
    rows = _limited(_rows(data, "data.node-path", data.node_path, task), data, seed)
    _check_labels(rows, labels, data.node_path)
    return _client(rows, data, seed, 0)


def load_calibration(data: DataConfig, task: Task, path: str, corpus: Corpus) -> Rows:
    """The rows of lora.calibration: none of the corpus's own, as far as this process can tell.

    Raises:
        DataError: as in `load`, or a row is a client's or the central test set's too.
    """
    rows = _rows(data, "lora.calibration", path, task)
    _check_labels(rows, corpus.labels, path)
    parts = [corpus.test, *(part for c in corpus.clients for part in (c.train, c.test))]
    known = {key for part in parts for key in part.keys}
    if also := [text for text, key in zip(rows.text, rows.keys, strict=True) if key in known]:
        raise DataError(
            f"lora.calibration = {path!r}: {len(also)} of its {len(rows)} rows are a client's or "
            f"the central test set's, such as {also[0][:60]!r}; take them out, or name other rows"
        )
    return rows


def describe(corpus: Corpus) -> dict[int, dict[str, int]]:
    """Client to label to its training rows of that label; "" where the data has no labels."""
    counts = [Counter(c.train.label or [""] * len(c.train)) for c in corpus.clients]
    names = corpus.labels or sorted(set().union(*counts))
    return {i: {name: count[name] for name in names} for i, count in enumerate(counts)}


# -- rows --------------------------------------------------------------------------------------


def _rows(data: DataConfig, key: str, path: str, task: Task) -> Rows:
    """The distinct rows of a source. Those without text, label or response are left out, noted."""
    return _rows_of(read(data, key, path), data, key, path, task)


def _rows_of(table: Dataset, data: DataConfig, key: str, path: str, task: Task) -> Rows:
    """The distinct, whole rows of a table that `path` names."""
    renames = dict(pair.split("=", 1) for pair in data.map)
    label, response, group = [], [], []
    if task == "classification" or data.label in table.column_names:
        label = column(table, path, "data.label", data.label)
    if task == "classification":
        text = column(table, path, "data.text", data.text)
        label = needed = _renamed(label, renames, key)
    else:
        text = prompts(table, path, data.prompt)
        response = needed = _renamed(
            column(table, path, "data.response", data.response), renames, key
        )
    if key == "data.path" and data.partition == "natural":
        group = column(table, path, "data.natural-column", data.natural_column)
    rows = Rows(tuple(text), tuple(label), tuple(response), tuple(group))
    asked = text if task == "classification" or data.prompt else needed
    required = [c for c in (asked, needed, group) if c]
    whole = [i for i in range(len(rows)) if all(c[i].strip() for c in required)]
    if not whole:
        raise DataError(f"{path}: each of its {len(rows)} rows has an empty column")
    if len(whole) < len(rows):
        left = len(rows) - len(whole)
        log.warning("%s: %d of %d rows have an empty column, left out", path, left, len(rows))
    return _distinct(rows.select(whole)) if data.dedupe else rows.select(whole)


def _renamed(values: list[str], renames: dict[str, str], key: str) -> list[str]:
    unused = renames.keys() - set(values)
    if unused and key == "data.path":
        raise DataError(
            f'data.map: "{min(unused)}" is no value of that column; it has {quoted(values)}'
        )
    return [renames.get(value, value) for value in values]


def _distinct(rows: Rows) -> Rows:
    seen: dict[str, int] = {}
    for i, key in enumerate(rows.keys):
        seen.setdefault(key, i)
    return rows.select(seen.values())


def _labels(rows: Rows, data: DataConfig, task: Task) -> tuple[str, ...]:
    if task == "causal-lm":
        return ()
    labels = in_order(rows.label)
    if len(labels) < 2 or 2 * len(labels) > len(rows):
        raise DataError(
            f'data.label = "{data.label}" has {len(labels)} values in {len(rows)} rows, which is '
            f"no classification: {quoted(rows.label)}"
        )
    return labels


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels: whole numbers in their order, else as texts."""
    found = set(labels)
    numbers = all(re.fullmatch(r"-?\d+", x) for x in found)
    return tuple(sorted(found, key=int) if numbers else sorted(found))


def _check_labels(rows: Rows, labels: Sequence[str], path: str) -> None:
    unknown = Counter(label for label in rows.label if label not in set(labels))
    if labels and unknown:
        name, count = unknown.most_common(1)[0]
        raise DataError(
            f'{path} has the label "{name}" in {count} rows, which the run does not know: '
            f"it has {quoted(labels)}; rename it with data.map, or leave those rows out"
        )


# -- splits ------------------------------------------------------------------------------------


def _split(rows: Rows, size: int, generator: torch.Generator) -> tuple[Rows, Rows]:
    """`size` rows drawn in proportion to the labels, and the other rows; both shuffled.

    Systematic sampling: from the shuffled rows sorted by label, every (n / size)-th from a random
    start. Every row is equally likely, and each label's number is its share, rounded up or down.
    """
    n = len(rows)
    order = torch.randperm(n, generator=generator).tolist()
    strata = sorted(order, key=lambda i: rows.label[i]) if rows.label else order
    start = int(torch.randint(max(n, 1), (), generator=generator))
    drawn = {strata[(j * n + start) // size] for j in range(size)}
    return rows.select(i for i in order if i in drawn), rows.select(
        i for i in order if i not in drawn
    )


def _limited(rows: Rows, data: DataConfig, seed: int) -> Rows:
    if not 0 < data.limit < len(rows):
        return rows
    return _split(rows, data.limit, seeded(seed, 0, 0, "data.limit"))[0]


def _apart(
    pool: Rows, data: DataConfig, task: Task, labels: Sequence[str], seed: int
) -> tuple[Rows, Rows]:
    """The central test set, and the clients' pool without it, shuffled."""
    generator = seeded(seed, 0, 0, "data.test-size")
    if data.test_path:
        test = _rows(data, "data.test-path", data.test_path, task)
        _check_labels(test, labels, data.test_path)
        known = set(test.keys) if data.dedupe else set()
        pool = pool.select(i for i, key in enumerate(pool.keys) if key not in known)
        return test, _split(pool, 0, generator)[1]
    if data.test_size >= len(pool):
        raise DataError(
            f"data.test-size = {data.test_size} leaves the clients nothing of the {len(pool)} "
            f"{'distinct ' if data.dedupe else ''}rows of {data.path}"
        )
    return _split(pool, data.test_size, generator)


def _client(rows: Rows, data: DataConfig, seed: int, client: int) -> ClientRows:
    """Its rows split in two, with at least one on each side where there are two."""
    n = len(rows)
    size = max(1, round(n * data.client_test_fraction)) if data.client_test_fraction else 0
    test, train = _split(rows, min(size, n - 1), seeded(seed, 0, client, "client-test-fraction"))
    return ClientRows(train, test)
