"""Which clients a run cannot use: of those that connected, and in preflight of those expected."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fedlora.config.reader import Config
from fedlora.strategies.base import Client, Strategy, uneven
from fedlora.strategies.forms import FORMS, ONE_RANK


def problems(config: Config, strategy: Strategy[Any], clients: Sequence[Client]) -> Iterator[str]:
    """Each reason, beyond those in the config, why the run cannot use these clients."""
    yield from strategy.problems(clients)
    if FORMS[config.lora.form].after and (gap := uneven(clients)):
        yield f"lora.form = {config.lora.form!r}, but {gap}: {ONE_RANK}"
    if config.secure.aggregation:
        yield from only_of_their_ranks(clients, config.secure.colluding + 2)


def only_of_their_ranks(clients: Sequence[Client], together: int) -> Iterator[str]:
    """The clients that too few others share their ranks with, so that no sum would hide them."""
    kinds = Counter(_ranks(c) for c in clients)
    for c in clients:
        if (n := kinds[_ranks(c)]) < together:
            which = "the only one" if n == 1 else f"one of {n}"
            ranks = sorted({x.rank for x in c.layers.values()})
            yield (
                f"secure.aggregation: client {c.id} is {which} of rank "
                f"{', '.join(map(str, ranks))} in these modules, so the rows of that rank and its "
                f"weight would be no sum; each rank must have {together} clients at least "
                "(secure.colluding and 2): set clients.ranks, or one rank for all"
            )


def _ranks(client: Client) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((m, x.rank) for m, x in client.layers.items()))
