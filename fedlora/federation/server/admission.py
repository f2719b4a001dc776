"""Which clients a run cannot be with: asked of those that came, by preflight of those to come."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fedlora.config.reader import Config
from fedlora.federation.secure.rules import TOGETHER
from fedlora.strategies.base import Client, Strategy, uneven
from fedlora.strategies.forms import FORMS, ONE_RANK


def problems(config: Config, strategy: Strategy[Any], clients: Sequence[Client]) -> Iterator[str]:
    """Why the run cannot be with these clients, whatever the config alone can tell."""
    yield from strategy.problems(clients)
    if FORMS[config.lora.form].after and (gap := uneven(clients)):
        yield f"lora.form = {config.lora.form!r}, but {gap}: {ONE_RANK}"
    if config.secure.aggregation:
        yield from only_of_their_ranks(clients)


def only_of_their_ranks(clients: Sequence[Client]) -> Iterator[str]:
    """Which clients nothing can be added to, however many others there are."""
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
