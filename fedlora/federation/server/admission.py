"""Which clients a run cannot use: of those that connected, and in preflight of those expected."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fedlora.config.reader import Config
from fedlora.federation.secure.rules import TOGETHER
from fedlora.strategies.base import Client, Strategy, uneven
from fedlora.strategies.forms import FORMS, ONE_RANK


def problems(config: Config, strategy: Strategy[Any], clients: Sequence[Client]) -> Iterator[str]:
    """Each reason, beyond those in the config, why the run cannot use these clients."""
    yield from strategy.problems(clients)
    if FORMS[config.lora.form].after and (gap := uneven(clients)):
        yield f"lora.form = {config.lora.form!r}, but {gap}: {ONE_RANK}"
    if config.secure.aggregation:
        yield from only_of_their_ranks(clients)


def only_of_their_ranks(clients: Sequence[Client]) -> Iterator[str]:
    """The clients that too few others share their ranks with, so that no sum would hide them."""
    kinds = Counter(_ranks(c) for c in clients)
    for c in clients:
        if kinds[_ranks(c)] < TOGETHER:
            ranks = sorted({x.rank for x in c.layers.values()})
            yield (
                f"secure.aggregation: client {c.id} is the only one of rank "
                f"{', '.join(map(str, ranks))} in these modules, so the rows of that rank and its "
                f"weight would be no sum; each rank must have {TOGETHER} clients at least: set "
                "clients.ranks, or one rank for all"
            )


def _ranks(client: Client) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((m, x.rank) for m, x in client.layers.items()))
