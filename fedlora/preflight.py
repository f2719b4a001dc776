"""Settings that do not go together, said before anything runs, all at once.

`refused` reads the config alone. What takes the clients or the strategy's state to tell is said
at the start of the run: `compose.refusals`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlora.federation.secure import rules as secure
from fedlora.privacy import rules as privacy
from fedlora.strategies import forms

if TYPE_CHECKING:
    from fedlora.config.reader import Config


def refused(config: "Config") -> Iterator[str]:
    """Each combination that cannot be, and what to do instead."""
    yield from forms.refused(config)
    yield from privacy.refused(config)
    yield from secure.refused(config)
    yield from _buffer(config)


def _buffer(config: "Config") -> Iterator[str]:
    """What a round that ends early does not go with: fedlora/federation/server/asynchronous.py."""
    size = config.round.buffer
    if not size:
        return
    most = config.clients.per_round or config.clients.count
    if size > most:
        yield (
            f"round.buffer = {size}: must be at most {most}, the clients that train at a time "
            "(clients.per-round, or clients.count)"
        )
    if config.secure.aggregation:
        yield (
            "round.buffer with secure.aggregation: a masked sum needs all of its clients in one "
            "round; set round.buffer = 0"
        )
    if config.privacy.by_client:
        yield (
            "round.buffer with privacy.level = 'client': who is in a round then depends on how "
            "fast it is, which the accounting does not cover; set round.buffer = 0"
        )
    if config.ranks.policy == "legend":
        yield (
            "round.buffer with ranks.policy = 'legend': it changes a client's layers while the "
            "client still trains others; choose another policy"
        )
