"""What goes with any strategy, around its aggregation: each does nothing unless the config asks.

    screened(server, uploads, ...)    robust.method: which updates the strategy gets to see
    stepped(server, state, ...)       server.optimizer: where to go, given the aggregate
    late(server, client, ...)         devices.deadline: what would have come too late
    virtual(server, gathered)         devices.classes: what the round would have taken

What does not go together is said before round 1: fedlora/preflight/options.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.federation.server import screening
from fedlora.federation.server.exchange import Gathered
from fedlora.strategies import server_optimizers as server_opt
from fedlora.strategies.base import Client, Round, Upload

if TYPE_CHECKING:
    from fedlora.federation.server.strategy import FederatedLora


def screened(
    server: "FederatedLora", uploads: Iterator[Upload], round: Round, gathered: Gathered
) -> Iterator[Upload]:
    """The uploads that robust.method lets count; as they come where it is none."""
    if server.config.robust.method == "none":
        return uploads
    if not (found := list(uploads)):
        return iter(found)
    kept, gathered.verdict = screening.screen(
        found, server.strategy, server.state, round, server.config
    )
    return iter(kept)


def stepped(server: "FederatedLora", state: Any, clients: Sequence[Client], round: Round) -> Any:
    """The state after server.optimizer's step, loaded; as it is where there is none."""
    if (optimizer := server_opt.build_optimizer(server.config.server)) is None:
        return state
    downloads = (server.strategy.download(server.state, c, round).trainable for c in clients)
    trained = frozenset[str]().union(*downloads)
    state, server.moments = server_opt.stepped(
        optimizer, server.moments, server.state, state, trained
    )
    server.load(server.strategy.effective(state))
    return state


def late(
    server: "FederatedLora",
    client: Client,
    round: Round,
    facts: Mapping[str, Any],
    gathered: Gathered,
) -> str | None:
    """Note a reply's virtual seconds; the reason to refuse it, where they are too many."""
    if (found := server.planner.spent(client, round.number, facts)) is None:
        return None
    gathered.virtual[client.id] = found
    limit, took = server.config.devices.deadline, found[0].total
    if not limit or took <= limit:
        return None
    return f"{took:.3g} virtual seconds, devices.deadline = {limit:g}"


def virtual(server: "FederatedLora", gathered: Gathered) -> dict[str, Any]:
    """The "virtual" entry of the round's record; moves the server's virtual clock on."""
    if not (devices := server.planner.devices) or not gathered.virtual:
        return {}
    spent = {i: s for i, (s, _) in gathered.virtual.items()}
    works = {i: w for i, (_, w) in gathered.virtual.items()}
    landed = gathered.landed if server.config.round.buffer else None
    found = devices.record(spent, works, server.clock, server.config.devices.deadline, landed)
    server.clock = found["clock"]
    return {"virtual": found}
