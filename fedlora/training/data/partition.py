"""Splits the rows among clients by flwr-datasets' partitioners, redrawn until each has some."""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
from datasets import Dataset

from fedlora.config.sections import DataConfig
from fedlora.errors import DataError
from fedlora.strategies.base import seeded
from fedlora.training.data.tables import quoted

DRAWS = 10
"""How often a partition is drawn anew where it leaves a client too few rows."""

log = logging.getLogger(__name__)


def partition(
    size: int, label: Sequence[str], group: Sequence[str], data: DataConfig, clients: int, seed: int
) -> list[list[int]]:
    """Row numbers by client, two rows a client at least (one, where it holds out none to test).

    `label` and `group` (of `data.natural-column`) are empty where the data has none. The rows are
    shuffled already. With "natural", client i has the i-th value in sorted order; with
    "pathological", client i's first label is the i-th and the others are drawn.

    Raises:
        DataError: the partition cannot be made; says for which client, and which key to change.
    """
    _check(size, label, group, data, clients)
    least = data.fewest
    columns = {"row": list(range(size)), "label": list(label), "group": list(group)}
    table = Dataset.from_dict({name: column for name, column in columns.items() if column})
    for draw in range(DRAWS):
        drawn = seeded(seed, draw, 0, "data.partition").initial_seed()
        parts = _parts(table, data, clients, drawn)
        sizes = [len(part) for part in parts]
        if min(sizes) >= least:
            break
    else:
        raise DataError(
            f"client {sizes.index(min(sizes))} would have {min(sizes)} of {size} rows, "
            f"and needs {least}: {_remedy(data, clients)}"
        )
    return parts


def _check(
    size: int, label: Sequence[str], group: Sequence[str], data: DataConfig, clients: int
) -> None:
    if data.partition == "natural" and (values := len(set(group))) != clients:
        raise DataError(
            f'data.natural-column = "{data.natural_column}" has {values} values, one a client: '
            f"clients.count must be {values}, is {clients}"
        )
    if data.partition in ("dirichlet", "pathological") and not label:
        raise DataError(
            f'data.partition = "{data.partition}" deals rows out by one class each, and data.label '
            f'= "{data.label}" names no column of such: set data.partition = "iid", or name one'
        )
    if data.partition == "pathological" and data.classes_per_client > len(set(label)):
        raise DataError(
            f"data.classes-per-client = {data.classes_per_client}, but there are only the labels "
            f"{quoted(label)}"
        )
    if clients > size:
        raise DataError(f"clients.count = {clients}, but there are only {size} rows to share")


def _parts(table: Dataset, data: DataConfig, clients: int, seed: int) -> list[list[int]]:
    """Row numbers by client, as flwr-datasets partitions them.

    Its IidPartitioner gives the same as the line here, at 5 ms a client.
    """
    if data.partition == "iid":
        return [part.tolist() for part in np.array_split(np.arange(len(table)), clients)]
    from flwr_datasets import partitioner as by  # seconds to import, which a node is spared

    shares: dict[str, Callable[[], Any]] = {
        "dirichlet": lambda: by.DirichletPartitioner(
            clients, "label", data.alpha, min_partition_size=0, self_balancing=False, seed=seed
        ),
        "pathological": lambda: by.PathologicalPartitioner(
            clients, "label", data.classes_per_client, "first-deterministic", seed=seed
        ),
        "natural": lambda: by.NaturalIdPartitioner("group"),
    }
    partitioner = shares[data.partition]()
    partitioner.dataset = table
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings():  # a progress bar; lost labels
            warnings.simplefilter("ignore")
            return [partitioner.load_partition(i)["row"][:] for i in range(clients)]
    except ValueError:  # of the pathological one only: the others cannot fail here
        name, rows = min(Counter(table["label"]).items(), key=lambda item: item[1])
        raise DataError(
            f"a label has fewer rows than clients that would share it (the rarest is "
            f'"{name}", {rows} rows): {_remedy(data, clients)}'
        ) from None


def _remedy(data: DataConfig, clients: int) -> str:
    fewer = f"lower clients.count = {clients}"
    return {
        "iid": fewer,
        "dirichlet": f"raise data.alpha = {data.alpha:g} or {fewer}",
        "pathological": f"lower data.classes-per-client = {data.classes_per_client} or {fewer}",
        "natural": f'leave out the rare values of data.natural-column = "{data.natural_column}"',
    }[data.partition]
