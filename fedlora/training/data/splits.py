"""Rows drawn in proportion to their labels: data.limit, the central test set, a client's own test.

No split takes a label's last training row while other labels have rows to give: see
`keep_each_label`. Where nothing would be lost, it changes nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.strategies.base import seeded
from fedlora.training.data.account import LIMITED, TESTED, Book, without
from fedlora.training.data.labels import source_of
from fedlora.training.data.rows import ClientRows, Rows


def split(rows: Rows, size: int, generator: torch.Generator) -> tuple[Rows, Rows]:
    """`size` rows drawn in proportion to the labels, and the other rows; both shuffled.

    Systematic sampling: from the shuffled rows sorted by label, every (n / size)-th from a random
    start. Every row is equally likely, and each label's number is its share, rounded up or down.
    """
    drawn, rest = drawn_of(rows, size, generator)
    return rows.select(drawn), rows.select(rest)


def drawn_of(rows: Rows, size: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """`split`, as numbers of rows."""
    n = len(rows)
    order = torch.randperm(n, generator=generator).tolist()
    strata = sorted(order, key=lambda i: rows.label[i]) if rows.label else order
    start = int(torch.randint(max(n, 1), (), generator=generator))
    drawn = {strata[(j * n + start) // size] for j in range(size)}
    return [i for i in order if i in drawn], [i for i in order if i not in drawn]


def keep_each_label(label: Sequence[str], short: list[int], long: list[int]) -> None:
    """Exchange rows so that `short` has one of each label of both, where it has room for that.

    In place: for each label that only `long` has, its first row there for the last row of the
    label that `short` has most of.
    """
    count = Counter(label[i] for i in short)
    for name in sorted({label[i] for i in long} - set(count)):
        common = max(count, key=lambda x: (count[x], x), default=name)
        if count[common] < 2:
            return
        give = max(at for at, i in enumerate(short) if label[i] == common)
        take = min(at for at, i in enumerate(long) if label[i] == name)
        short[give], long[take] = long[take], short[give]
        count.update({common: -1, name: 1})


def limited(rows: Rows, data: DataConfig, labels: Sequence[str], seed: int, book: Book) -> Rows:
    """At most data.limit of the rows, with one of each label where there is room for that."""
    if not 0 < data.limit < len(rows):
        return rows
    drawn, rest = drawn_of(rows, data.limit, seeded(seed, 0, 0, "data.limit"))
    if labels and rows.label:
        keep_each_label(rows.label, drawn, rest)
    return book.keep(LIMITED, rows, drawn)


def central(
    pool: Rows, given: Rows | None, data: DataConfig, labels: Sequence[str], seed: int, book: Book
) -> tuple[Rows, Rows]:
    """The central test set, `given` or drawn, and the clients' pool without it, shuffled.

    Raises:
        DataError: the test set would take all rows.
    """
    generator = seeded(seed, 0, 0, "data.test-size")
    if given is not None:
        pool = without(given, pool, TESTED, book) if data.dedupe else pool
        return given, split(pool, 0, generator)[1]
    if data.test_size >= len(pool):
        raise DataError(
            f"data.test-size = {data.test_size} leaves the clients nothing of the {len(pool)} "
            f"{'distinct ' if data.dedupe else ''}rows of {source_of(data)}"
        )
    test, rest = drawn_of(pool, data.test_size, generator)
    if labels and pool.label:
        keep_each_label(pool.label, rest, test)
    return pool.select(test), pool.select(rest)


def of_client(rows: Rows, data: DataConfig, seed: int, client: int) -> ClientRows:
    """Its rows split in two, with at least one on each side where there are two; and of those that
    train, one at least stays where some are held out to validate."""
    n = len(rows)
    size = max(1, round(n * data.client_test_fraction)) if data.client_test_fraction else 0
    test, train = split(rows, min(size, n - 1), seeded(seed, 0, client, "client-test-fraction"))
    if not (share := data.client_validation_fraction):
        return ClientRows(train, test)
    size = min(max(1, round(len(train) * share)), len(train) - 1)
    chance = seeded(seed, 0, client, "client-validation-fraction")
    validation, train = split(train, size, chance)
    return ClientRows(train, test, validation)


def with_each_label(clients: Sequence[ClientRows], labels: Sequence[str]) -> list[ClientRows]:
    """The clients, with a training row of each label that any of them holds out.

    A client gives one of the label that it has most of, unless that is the last one of its label.
    """
    found = _with_each(clients, labels)
    if not any(len(c.validation) for c in found):
        return found
    held = _with_each([ClientRows(c.train, c.validation) for c in found], labels)
    return [ClientRows(h.train, c.test, h.test) for c, h in zip(found, held, strict=True)]


def _with_each(clients: Sequence[ClientRows], labels: Sequence[str]) -> list[ClientRows]:
    found = list(clients)
    count = Counter(name for c in found for name in c.train.label)
    for name in labels:
        holders = (i for i, c in enumerate(found) if not count[name] and name in c.test.label)
        for i in holders:
            own = Counter(x for x in found[i].train.label if count[x] > 1)
            if own:
                common = max(own, key=lambda x: (own[x], x))
                found[i] = _exchanged(found[i], common, name)
                count.update({common: -1, name: 1})
                break
    return found


def _exchanged(client: ClientRows, common: str, rare: str) -> ClientRows:
    """Its last training row of one label for the first of another in its own test."""
    both, n = Rows.joined([client.train, client.test]), len(client.train)
    order = list(range(len(both)))
    give = max(i for i in range(n) if both.label[i] == common)
    take = n + client.test.label.index(rare)
    order[give], order[take] = take, give
    parts = both.select(order[:n]), both.select(order[n:])
    return replace(client, train=parts[0], test=parts[1])
