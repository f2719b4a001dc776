"""Rows that a run chooses by, early stopping and the best round: never rows that train or test.

    pool without the test -> central validation | the clients' pool
    a client's rows       -> train | own test | own validation     (`splits.of_client`)

`apart` then holds whatever was split to it, by the rows' keys (text or texts and response, case and
space apart): what equals a test row validates nothing, and what equals a validation row trains
nobody, also where data.dedupe is off and equal rows stay. Both are left out, on the account.
"""

from collections.abc import Sequence
from dataclasses import replace

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.strategies.base import seeded
from fedlora.training.data.account import TESTED_TOO, VALIDATED, Book, without_keys
from fedlora.training.data.rows import ClientRows, Rows
from fedlora.training.data.splits import drawn_of, keep_each_label


def drawn(pool: Rows, data: DataConfig, labels: Sequence[str], seed: int) -> tuple[Rows, Rows]:
    """The central validation rows of data.validation-size, and the pool without them.

    Raises:
        DataError: they would be all rows.
    """
    if not data.validation_size:
        return Rows(), pool
    share, n = data.validation_size, len(pool)
    size = int(share) if share >= 1 else max(1, round(n * share))
    if size >= n:
        raise DataError(
            f"data.validation-size = {share:g} leaves the clients nothing of the {n} rows that "
            "are no test rows"
        )
    taken, rest = drawn_of(pool, size, seeded(seed, 0, 0, "data.validation-size"))
    if labels and pool.label:
        keep_each_label(pool.label, rest, taken)
    return pool.select(taken), pool.select(rest)


def apart(
    test: Rows, validation: Rows, clients: Sequence[ClientRows], book: Book
) -> tuple[Rows, list[ClientRows]]:
    """The validation rows and the clients, without what equals a row of another part.

    Raises:
        DataError: no central validation row is left, or nothing to train on is left to a client.
    """
    if not (len(validation) or any(len(c.validation) for c in clients)):
        return validation, [*clients]
    tested = set(test.keys).union(*(c.test.keys for c in clients))
    kept = without_keys(tested, validation, TESTED_TOO, book)
    if len(validation) and not len(kept):
        raise DataError(
            f"all {len(validation)} central validation rows equal test rows: name others in "
            "data.validation-path, or set data.dedupe = true"
        )
    own = [without_keys(tested, c.validation, TESTED_TOO, book) for c in clients]
    known = set(kept.keys).union(*(rows.keys for rows in own))
    found = []
    for i, (client, mine) in enumerate(zip(clients, own, strict=True)):
        train = without_keys(known, client.train, VALIDATED, book)
        if len(client.train) and not len(train):
            raise DataError(
                f"every training row of client {i} equals a validation row; set data.dedupe = true"
            )
        found.append(replace(client, train=train, validation=mine))
    return kept, found
